"""The detector's methods side by side: same models, images and split, fitted and judged alike.

`gradient_norms` is the default, `forward` needs no gradient, `both` joins them; the parts of
`forward` stand alone beside it. Where nothing else is said the protocol is that of
`benchmarks.detection.evidence`. A method that needs no gradient takes a minute on one core.
"""

import functools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, zoo
from benchmarks.detection.protocol import FPR, IN_DISTRIBUTION, Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, machine, ratios, save
from ood_monitor.calibration import ConformalPValue
from ood_monitor.densities.joined import Joined
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.plan import planned

Row = dict[str, Any]

#: What is compared, by name: arguments of a detector.
COMPARED: dict[str, dict[str, Any]] = {
    "gradient_norms": {"method": "gradient_norms"},
    "forward": {"method": "forward"},
    "both": {"method": "both"},
    "values": {"parts": ["values"]},
    "expected_norms": {"parts": ["expected_norms"]},
    "values, map": {"parts": ["values", "map"]},
}

#: Of which a likelihood or a bound is known by elements; a denoiser's is not.
MODELS = ("Glow", "VAE", "PixelCNN")

#: Images a cost is measured with.
BATCHES = (8, 64)


def rows_of(
    model: str, watched: Watched, module: nn.Module, sets: Mapping[str, Tensor], names: list[str]
) -> Iterator[Row]:
    """A row for each method."""
    adapter = watched.adapter(module)
    x = {name: watched.prepare(images) for name, images in sets.items()}
    for name in names:
        options = COMPARED[name]
        detector = om.Detector(adapter, chunk_size=methods.CHUNK, **options)
        found = {of: detector.measure(images) for of, images in x.items()}
        joined = fitted(found["fit"], options)
        scores = {of: joined.score(it) for of, it in found.items() if of != "fit"}
        yield {
            "model": model,
            "method": name,
            "parts": {part.kind: len(part.columns.names) for part in joined.parts},
            "sample": found["fit"].sample,
            "found": caught(scores),
            "forwards": costs(detector, x["test"]),
        } | protocol.judged(scores)


def fitted(measured: Measurements, options: dict[str, Any]) -> Joined:
    """The parts of a detector, fitted on all of these samples."""
    chosen = [options.get(name) for name in ("method", "density", "parts")]
    plan = planned(measured.sample, *chosen)
    return Joined.fit(plan.parts, measured, torch.finfo(torch.float32).eps)


def caught(scores: Mapping[str, Any]) -> dict[str, float]:
    """The share of each other set that has a p-value of at most FPR."""
    p_value = ConformalPValue.fit(scores["calibration"]).p_value
    return {
        name: round(float(np.mean(p_value(values) <= FPR)), 4)
        for name, values in scores.items()
        if name not in IN_DISTRIBUTION
    }


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


@torch.no_grad()
def forward(adapter: om.Adapter, x: Tensor) -> None:
    """A plain pass, which computes no expectation."""
    list(methods.Whole(adapter).log_likelihood(x))


def line(row: Row) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    head = f"{row['on']:14}{row['model']:9}{row['method']:16}"
    found = statistics.mean(row["found"].values())
    return f"{head}{each}  mean {row['mean']:.4f}  found {found:.2f}  {row['forwards']}"


def claims(rows: list[Row]) -> list[Row]:
    """What was to be reached, of all pairs of the models at hand."""
    pairs = {
        name: [value for row in rows if row["method"] == name for value in row["auroc"].values()]
        for name in COMPARED
    }
    if not pairs["forward"]:
        return []
    mean = statistics.mean(pairs["forward"])
    text = f"1 - mean AUROC of {len(pairs['forward'])} pairs"
    found = [claim(text, round(1 - mean, 4), 0.007)]
    if pairs["gradient_norms"]:
        both = ("forward", "gradient_norms")
        missed = {name: statistics.mean(misses(rows, name)) for name in both}
        text = f"share missed at fpr {FPR} by forward, in what gradient_norms misses"
        ratio = missed["forward"] / missed["gradient_norms"]
        found.append(claim(text, round(ratio, 3), 0.5))
    return found


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


def quick(compared: list[str]) -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    for model, watched, module, facts in zoo.trained_tiny(images):
        for row in rows_of(model, watched, module, sets, compared) if model in MODELS else ():
            yield {"on": "digits", "training": facts} | row


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
    compared, rows = method or list(COMPARED), []
    for row in quick(compared) if quick_run else full(data_dir, names, models, compared):
        typer.echo(line(row))
        rows.append(row)
    report = {"machine": machine(), "sizes": vars(Sizes()), "rows": rows, "claims": claims(rows)}
    for c in report["claims"]:
        typer.echo(f"{'holds' if c['holds'] else 'FAILS'}  {c['claim']}: {c['value']}")
    save(report, output)


if __name__ == "__main__":
    typer.run(main)
