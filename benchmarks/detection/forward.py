"""The detector's methods side by side: same models, images and split, fitted and judged alike.

`gradient_norms` is what the paper is about, `forward` needs no gradient, `both` joins them; the
parts of `forward` stand alone beside it, and so do the paper's own score, typicality and likelihood
less complexity. Where nothing else is said the protocol is that of `benchmarks.detection.evidence`.
Beside every pair of sets there are the fifteen corruptions of `benchmarks.detection.shifts` at
severity 3, and detectors of 100 fit samples. Methods that need no gradient take three minutes on
one core, all of them half an hour.
"""

import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, zoo
from benchmarks.detection.corruptions import CORRUPTIONS, corrupted
from benchmarks.detection.densities import png_bytes
from benchmarks.detection.protocol import FPR, Sizes, aurocs
from benchmarks.detection.shifts import CHANGED
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, peak_of_tensors, ratios, reported
from ood_monitor.calibration import ConformalPValue
from ood_monitor.densities.joined import Joined
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.plan import Plan, planned
from ood_monitor.testing import flagged_interval

Row = dict[str, Any]

#: What is compared, by name: arguments of a detector.
COMPARED: dict[str, dict[str, Any]] = {
    "gradient_norms": {"method": "gradient_norms"},
    "forward": {"method": "forward"},
    "both": {"method": "both"},
    "values": {"parts": ["values"]},
    "expected_norms": {"parts": ["expected_norms"]},
    "values, map": {"parts": ["values", "map"]},
    "without noise": {"parts": ["output_layer", "energies"]},
    "output_layer": {"parts": ["output_layer"]},
    "energies": {"parts": ["energies"]},
    "with null condition": {"parts": ["output_layer", "energies", "condition"]},
}

#: Those that are of denoisers alone: `benchmarks.detection.denoisers`.
OF_DENOISERS = ("without noise", "output_layer", "energies", "with null condition")

#: Methods of `benchmarks.detection.methods` that they are compared with.
PEERS = (methods.PAPER, "typicality", "likelihood + complexity")

#: Of which a likelihood or a bound is known by elements; a denoiser's is not.
MODELS = ("Glow", "VAE", "PixelCNN")

#: Images a cost is measured with, and peak memory; fit samples of a small detector, and how severe
#: corruptions are.
BATCHES, MANY, FEW, SEVERITY = (8, 64), 256, 100, 3

#: False-positive rates at which flagged test images are counted.
RATES = (0.01, 0.05)

#: What was to be reached against the near sets by models of Fashion-MNIST, and for corruptions.
NEAR = ("MNIST", "EMNIST letters")
NEAR_TARGETS = {"Glow": 0.99, "VAE": 0.995, "PixelCNN": 0.995}
CORRUPTED_TARGETS = {"Glow": 0.90, "VAE": 0.92, "PixelCNN": 0.81}
COST_TARGETS = {
    "forward": {"Glow": 1.5, "VAE": 1.8, "PixelCNN": 1.5},
    "gradient_norms": {"Glow": 8, "VAE": 3.5, "PixelCNN": 3.5},
}


def rows_of(
    model: str,
    watched: Watched,
    module: nn.Module,
    sets: Mapping[str, Tensor],
    names: list[str],
    *,
    timed: bool = True,
) -> Iterator[Row]:
    """A row for each method: every set, what is left of it with few fit samples, and the cost."""
    adapter = watched.adapter(module)
    x = {name: watched.prepare(images) for name, images in sets.items()}
    plans = plans_of(adapter, x, names)
    found = measured(adapter, x, plans.values())
    for name, plan in plans.items():
        detector = om.Detector(adapter, **COMPARED[name])
        joined = fitted(plan, found["fit"])
        scores = {of: joined.score(it) for of, it in found.items() if of != "fit"}
        few = fitted(plan, found["fit"].take(range(min(FEW, len(found["fit"])))))
        yield {
            "model": model,
            "method": name,
            "parts": {part.kind: len(part.columns.names) for part in joined.parts},
            "sample": plan.sample,
            "counts": counts(scores),
            "calibrated": len(scores["calibration"]),
            **(spent(detector, x["test"]) if timed else {}),
            "few": aurocs({of: few.score(it) for of, it in found.items() if of != "fit"}),
        } | protocol.judged(scores)
    others = [name for name in names if name in methods.METHODS]
    yield from peers(model, watched, adapter, sets, x, others)


def plans_of(adapter: om.Adapter, x: Mapping[str, Tensor], names: list[str]) -> dict[str, Plan]:
    """What each of the methods that are detectors measures of these samples."""
    sample = adapter.sample_of(x["fit"])
    return {
        name: planned(sample, options.get("method"), None, options.get("parts"))
        for name, options in COMPARED.items()
        if name in names
    }


def measured(
    adapter: om.Adapter, x: Mapping[str, Tensor], plans: Iterable[Plan]
) -> dict[str, Measurements]:
    """Of each set all that the methods take, by one pass."""
    kinds = list(dict.fromkeys(part.kind for plan in plans for part in plan.parts))
    if not kinds:
        return {}
    detector = om.Detector(adapter, parts=kinds, chunk_size=methods.CHUNK)
    return {of: detector.measure(images) for of, images in x.items()}


def peers(
    model: str,
    watched: Watched,
    adapter: om.Adapter,
    sets: Mapping[str, Tensor],
    x: Mapping[str, Tensor],
    names: list[str],
) -> Iterator[Row]:
    """A row for each of the other methods."""
    if not names:
        return
    seen = {of: methods.measured(methods.whole(adapter), images, 1) for of, images in x.items()}
    sums = {of: it.log_likelihood.sum(1) for of, it in seen.items()}
    bits = {of: 8 * png_bytes(methods.shown(watched, images)) for of, images in sets.items()}
    views = {
        "bits": bits,
        "whole": methods.log_norms(seen),
        "likelihood": sums,
        "complexity": {of: np.stack([sums[of], bits[of]], 1) for of in seen},
    }
    for name in names:
        method = methods.METHODS[name]
        scores = protocol.scored(method.make(seen["fit"]), views[method.view])
        yield {"model": model, "method": name} | protocol.judged(scores)


def corruptions(
    model: str, watched: Watched, module: nn.Module, sets: Mapping[str, Tensor], names: list[str]
) -> Iterator[Row]:
    """A row for each method, of half of the test images against corrupted ones of the other."""
    adapter, half = watched.adapter(module), len(sets["test"]) // 2
    other = sets["test"][half:][:CHANGED]
    images = {"fit": sets["fit"], "test": sets["test"][:half]} | {
        name: corrupted(other, name, SEVERITY, seed=0) for name in CORRUPTIONS
    }
    x = {name: watched.prepare(each) for name, each in images.items()}
    plans = plans_of(adapter, x, names)
    found = measured(adapter, x, plans.values())
    for name, plan in plans.items():
        joined = fitted(plan, found["fit"])
        each = aurocs({of: joined.score(it) for of, it in found.items() if of != "fit"})
        mean = round(statistics.mean(each.values()), 4)
        yield {"model": model, "method": name, "corrupted": each, "mean": mean}


def fitted(plan: Plan, measured: Measurements) -> Joined:
    """The parts of a detector, fitted on all of these samples."""
    return Joined.fit(plan.parts, measured, torch.finfo(torch.float32).eps)


def counts(scores: Mapping[str, Any]) -> dict[str, int]:
    """How many test images have a p-value of at most each rate."""
    p_value = ConformalPValue.fit(scores["calibration"]).p_value(scores["test"])
    return {str(fpr): int((p_value <= fpr).sum()) for fpr in RATES}


def spent(detector: om.Detector, x: Tensor) -> Row:
    """Time and memory of a score."""
    return {"forwards": costs(detector, x), "memory": memory(detector, x)}


def costs(detector: om.Detector, x: Tensor) -> dict[str, float]:
    """Time of what a score measures, in plain forward passes without a gradient, by batch."""
    found: dict[str, float] = {}
    for batch in BATCHES:
        chunk = x[:batch]
        plain = functools.partial(forward, detector.adapter, chunk)
        measure = functools.partial(detector.measure, chunk)
        measure()  # which is checked on first use
        times = ratios(plain, {"score": measure}, methods.ROUNDS)
        found[f"B = {batch}"] = round(times["score"], 2)
    return found


def memory(detector: om.Detector, x: Tensor) -> float | None:
    """Of tensors, at the peak of a score of many images and of a plain pass; None of few images."""
    if len(x) < MANY:
        return None
    plain = functools.partial(forward, detector.adapter, x[:MANY])
    measure = functools.partial(detector.measure, x[:MANY])
    return round(peak_of_tensors(measure) / peak_of_tensors(plain), 2)


@torch.no_grad()
def forward(adapter: om.Adapter, x: Tensor) -> None:
    """A plain pass, which computes no expectation; of a denoiser, at one level."""
    if isinstance(adapter, om.DenoisingBound):
        adapter = adapter.with_levels(adapter.levels[:1])
    list(methods.Whole(adapter).log_likelihood(x))


def line(row: Row) -> str:
    if "corrupted" in row:
        return (
            f"{row['on']:22} {row['model']:20}{row['method']:24}corrupted  mean {row['mean']:.4f}"
        )
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    head = f"{row['on']:22} {row['model']:20}{row['method']:24}"
    found = statistics.mean(row["found"].values())
    return f"{head}{each}  mean {row['mean']:.4f}  found {found:.2f}  {row.get('forwards', '')}"


def claims(rows: list[Row]) -> list[Row]:
    """What was to be reached, of the models, sets and methods at hand."""
    pairs = [row for row in rows if "auroc" in row]
    ours = [row for row in pairs if row["method"] == "forward"]
    found = [*near(ours), *of_corruptions(rows), *of_costs(pairs)]
    found += [*of_counts(pairs), *of_memory(pairs)]
    if ours:
        every = [value for row in ours for value in row["auroc"].values()]
        text = f"1 - mean AUROC of {len(every)} pairs"
        found.insert(0, claim(text, round(1 - statistics.mean(every), 4), 0.007))
    missed = {name: misses(pairs, name) for name in ("forward", "gradient_norms")}
    if all(missed.values()):
        text = f"share missed at fpr {FPR} by forward, in what gradient_norms misses"
        ratio = statistics.mean(missed["forward"]) / statistics.mean(missed["gradient_norms"])
        found.append(claim(text, round(ratio, 3), 0.5))
    return found


def near(ours: list[Row]) -> Iterator[Row]:
    """Against the sets that are hardest to tell from Fashion-MNIST, and with few fit samples."""
    few = []
    for row in ours:
        if row["on"] == "Fashion-MNIST":
            mean = statistics.mean(row["auroc"][name] for name in NEAR)
            few.append(statistics.mean(row["few"][name] for name in NEAR))
            target = round(1 - NEAR_TARGETS[row["model"]], 4)
            text = f"{row['model']} of Fashion-MNIST: 1 - mean AUROC of near pairs"
            yield claim(text, round(1 - mean, 4), target)
    if few:
        text = f"1 - mean AUROC of near pairs with {FEW} fit samples"
        yield claim(text, round(1 - statistics.mean(few), 4), 0.02)


def of_corruptions(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if "corrupted" in row and row["method"] == "forward":
            text = f"{row['model']}: 1 - mean AUROC of corruptions at severity {SEVERITY}"
            yield claim(text, round(1 - row["mean"], 4), 1 - CORRUPTED_TARGETS[row["model"]])


def of_costs(pairs: list[Row]) -> Iterator[Row]:
    """The larger of a model's costs, of the sets that it was trained on."""
    for method, targets in COST_TARGETS.items():
        for model, target in targets.items():
            rows = [r for r in pairs if (r["model"], r["method"]) == (model, method)]
            for batch in rows[0]["forwards"] if rows else ():
                value = max(row["forwards"][batch] for row in rows)
                text = f"{model}, {method}, {batch}: plain forward passes a score"
                yield claim(text, value, target)


def of_counts(pairs: list[Row]) -> Iterator[Row]:
    """How many counts of flagged test images are not a sound detector's."""
    cells = [(row, fpr) for row in pairs if "counts" in row for fpr in RATES]
    outside = 0
    for row, fpr in cells:
        low, high = flagged_interval(row["tested"], row["calibrated"], fpr, cells=len(cells))
        outside += not low <= row["counts"][str(fpr)] <= high
    if cells:
        yield claim(f"of {len(cells)} counts of flagged test images, outside their law", outside, 0)


def of_memory(pairs: list[Row]) -> Iterator[Row]:
    """The larger peak of a model's two."""
    for model in dict.fromkeys(row["model"] for row in pairs):
        found = [r.get("memory") for r in pairs if (r["model"], r["method"]) == (model, "forward")]
        most = max((ratio for ratio in found if ratio is not None), default=None)
        if most is not None:
            text = f"{model}, forward, B = {MANY}: peak memory of a score in that of a plain pass"
            yield claim(text, most, 1.1)


def misses(rows: list[Row], method: str) -> list[float]:
    """The share of each other set that is not found."""
    return [1 - v for row in rows if row["method"] == method for v in row["found"].values()]


def full(data: Path, names: list[str], models: list[str], compared: list[str]) -> Iterator[Row]:
    for on in names:
        sets = protocol.sets(data, on, Sizes())
        for model in models:
            watched = zoo.zoo()[model]
            module, facts = zoo.load(watched, zoo.weights_file(on, model))
            for row in rows_of(model, watched, module.eval(), sets, compared):
                yield {"on": on, "training": facts} | row
            if on == "Fashion-MNIST":  # as in `shifts`
                for row in corruptions(model, watched, module, sets, compared):
                    yield {"on": on} | row


def quick(compared: list[str]) -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    for model, watched, module, facts in zoo.trained_tiny(images):
        if model in MODELS:
            for row in rows_of(model, watched, module, sets, compared):
                yield {"on": "digits", "training": facts} | row
            for row in corruptions(model, watched, module, sets, compared):
                yield {"on": "digits"} | row


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    on: Annotated[list[str] | None, typer.Option(help="A set; all if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; all if none.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.SOURCES)
    names, models = on or list(zoo.TRAINED_ON), model or list(MODELS)
    of_likelihoods = [name for name in COMPARED if name not in OF_DENOISERS]
    compared = method or [*of_likelihoods, *PEERS]
    rows = quick(compared) if quick_run else full(data_dir, names, models, compared)
    reported(rows, line, claims, output, sizes=vars(Sizes()))


if __name__ == "__main__":
    typer.run(main)
