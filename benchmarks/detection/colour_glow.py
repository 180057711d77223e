"""The paper's own case at the size of a core: a Glow of CIFAR-10 at 32x32 that was trained here.

Methods side by side for single images and groups of five; log norms of four random layers with the
Gaussians that the paper fits, and figures of all layers; the likelihood in bits per dimension
beside the paper's; and the same flow of images that come otherwise, as HSV. The protocol is that of
`benchmarks.detection.evidence`, the sets are those of `benchmarks.detection.colour`: Chars74K,
street characters, stands for SVHN. The weights are committed; training takes about an hour.

    python -m benchmarks.detection.colour_glow --data-dir FOLDER --train FOLDER --seconds 3000
    python -m benchmarks.detection.colour_glow --data-dir FOLDER --figures docs
"""

import functools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import colour, datasets, layers, methods, protocol, trained, zoo
from benchmarks.detection.colour import ON, OTHERS
from benchmarks.detection.densities import png_bytes
from benchmarks.detection.forward import fitted
from benchmarks.detection.methods import METHODS, PAPER
from benchmarks.detection.protocol import Array, Sizes
from benchmarks.detection.representations import CHANGES, Represented, dequantised, invariance
from benchmarks.detection.train import train
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported
from ood_monitor.densities.measurements import Measurements, Table
from ood_monitor.detector.plan import planned

Row = dict[str, Any]

FILE = zoo.WEIGHTS / "cifar10-glow.safetensors"
GROUPS = (1, 5)

#: Words for a detector's method, and methods of `benchmarks.detection.methods` beside them.
DETECTORS: tuple[Any, ...] = ("gradient_norms", "forward", "both")
PEERS = (
    *("PNG size", "log-likelihood", "typicality", "likelihood + complexity", "total norm", PAPER),
)

#: Those that are measured again of images that come otherwise.
REPRESENTED = ("log-likelihood", "typicality", "total norm", PAPER)

#: All images that are held out; groups of five are a fifth as many.
SIZES = Sizes(fit=1_000, calibration=1_000, test=600, ood=400)

#: Images of each set that are measured so, and of which norms are compared in double precision.
CHANGED, CHECKED = 300, 10

#: Bits per dimension on CIFAR-10 of the weights that y0ast/Glow-PyTorch publishes, whose code and
#: sizes the paper takes; those of the paper's own weights are not public.
PAPERS_BITS = 3.39

#: The paper's AUROC of CIFAR-10 and SVHN.
PAPERS_AUROC = 0.9997


def model() -> Watched:
    """Of 8 steps a level and 64 channels, where the paper has 32 and 512."""
    make = functools.partial(
        om.models.Glow, channels=3, size=32, levels=3, steps=8, hidden=64, log_scale_bound=1.0
    )
    return replace(trained.watched_glow(make, steps=0, factor=1), batch=16, warmup=300)


def of_groups(adapter: om.Adapter, forward: Measurements, x: Tensor, group: int) -> Measurements:
    """Of groups: norms of their likelihoods' gradients, and means of what a forward pass gave.

    Terms of a group add up, and so do its samples' expected norms, since gradients of independent
    samples of the model are uncorrelated. What fills no group is left out. Of single samples it is
    what a detector measures.
    """
    count = len(x) // group * group
    x, forward = x[:count], forward.take(np.arange(count))

    def mean(values: Array) -> Array:
        return np.asarray(values.reshape(-1, group, values.shape[1]).mean(1))

    tables = {kind: Table(it.names, mean(it.values)) for kind, it in forward.tables.items()}
    realised = methods.measured(methods.whole(adapter), x, group).tables
    values = mean(forward.log_likelihood)
    return Measurements(forward.terms, values, {**tables, **realised}, sample=forward.sample)


# Detection.


def detection(
    found: Mapping[str, Measurements], bits: Mapping[str, Array], group: int
) -> Iterator[Row]:
    """A row for each method, of groups and the bits of their PNG files."""
    for name, scores in (*of_peers(found, bits), *of_detectors(found)):
        case = {"shown": "detection", "group": group, "method": name}
        yield case | protocol.judged(scores)


def of_peers(
    found: Mapping[str, Measurements], bits: Mapping[str, Array]
) -> Iterator[tuple[str, Mapping[str, Array]]]:
    sums = {name: it.total for name, it in found.items()}
    views: dict[str, protocol.View] = {
        "bits": bits,
        "likelihood": sums,
        "complexity": {name: np.stack([sums[name], bits[name]], 1) for name in found},
        "whole": methods.log_norms(found),
    }
    for name in PEERS:
        method = METHODS[name]
        yield name, protocol.scored(method.make(found["fit"]), views[method.view])


def of_detectors(
    found: Mapping[str, Measurements],
) -> Iterator[tuple[str, Mapping[str, Array]]]:
    fit = found["fit"]
    for name in DETECTORS:
        joined = fitted(planned(fit.sample, name, None, None), fit)
        yield name, {of: joined.score(it) for of, it in found.items() if of != "fit"}


# Likelihood and representation.


def likelihood(watched: Watched, module: nn.Module, sets: Mapping[str, Tensor]) -> Row:
    adapter: Any = methods.adapter_of(watched, module)
    parts = {name: watched.prepare(images).split(methods.CHUNK) for name, images in sets.items()}
    bits = {
        name: round(float(torch.cat([adapter.bits_per_dimension(x) for x in each]).mean()), 3)
        for name, each in parts.items()
    }
    return {"shown": "likelihood", "bits_per_dimension": bits, "of_the_paper": PAPERS_BITS}


def representations(
    module: nn.Module, x: Mapping[str, Tensor], found: Mapping[str, Measurements]
) -> Iterator[Row]:
    """The same methods on images as they are, and on what each change makes of them.

    Everything is measured of y = T(x) by the model of y, through T's inverse: `Represented`.

    Args:
        module: The flow.
        x: Of each set the images, before they are dequantised.
        found: What was measured of them one by one.
    """
    kept = [of for of in x if of != "calibration"]
    some = {of: dequantised(x[of][:CHANGED]) for of in kept}
    yield from changed("as they are", {of: found[of].take(np.arange(len(some[of]))) for of in kept})
    for name, change in CHANGES.items():
        few = torch.cat([each[:CHECKED] for each in some.values()])
        yield {"shown": "invariance", "change": name} | invariance(module, change, few)
        adapter = methods.Whole(om.LogLikelihood(Represented(module, change)))
        y = {of: change.there(it) for of, it in some.items()}
        yield from changed(name, {of: methods.measured(adapter, it, 1) for of, it in y.items()})


def changed(change: str, found: Mapping[str, Measurements]) -> Iterator[Row]:
    """A row for each method."""
    for name, each in of_represented(found):
        case = {"shown": "representation", "change": change, "group": 1, "method": name}
        yield case | protocol.with_mean(each)


def of_represented(found: Mapping[str, Measurements]) -> Iterator[tuple[str, dict[str, float]]]:
    views: dict[str, protocol.View] = {
        "likelihood": {name: it.total for name, it in found.items()},
        "whole": methods.log_norms(found),
    }
    for name in REPRESENTED:
        method = METHODS[name]
        yield name, protocol.aurocs(protocol.scored(method.make(found["fit"]), views[method.view]))


# The whole.


def rows_of(
    watched: Watched, module: nn.Module, sets: Mapping[str, Tensor], figures: Path | None
) -> Iterator[Row]:
    yield likelihood(watched, module, sets)
    adapter, x = watched.adapter(module), {of: watched.prepare(it) for of, it in sets.items()}
    detector = om.Detector(adapter, method="forward", chunk_size=methods.CHUNK)
    forward = {of: detector.measure(images) for of, images in x.items()}
    for group in GROUPS:
        found = {of: of_groups(adapter, forward[of], it, group) for of, it in x.items()}
        bits = {of: protocol.grouped(8 * png_bytes(it), group) for of, it in sets.items()}
        yield from detection(found, bits, group)
        yield from layers.rows(found, group)
        if group == 1:
            yield from representations(module, x, found)
            if figures is not None:
                layers.figure(found).savefig(figures / "colour-glow-layers.png", dpi=110)


def line(row: Row) -> str:
    if "auroc" not in row:
        return "  ".join(f"{name} {value}" for name, value in row.items())
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    head = f"{row.get('change', ''):44}B = {row['group']}  {row['method']:24}"
    found = "  ".join(f"{value:.2f}" for value in row.get("found", {}).values())
    return f"{head}{each}  mean {row['mean']:.4f}  found {found}"


def claims(rows: list[Row]) -> list[Row]:
    """What the paper says of its case, and that the library's own method is no worse."""
    (told,) = (row for row in rows if row["shown"] == "likelihood")
    bits = told["bits_per_dimension"]["test"]
    differences = [r["norms_relative_difference"] for r in rows if r["shown"] == "invariance"]
    return [
        claim("bits per dimension of test images", bits, PAPERS_BITS),
        *of_aurocs([row for row in rows if row["shown"] == "detection"]),
        *of_layers([row for row in rows if row["shown"] == "layers"]),
        claim("largest relative change of a norm with the representation", max(differences), 1e-6),
    ]


def of_aurocs(rows: list[Row]) -> Iterator[Row]:
    by_method = {(row["method"], row["group"]): row for row in rows}
    for group in GROUPS:
        paper = by_method[PAPER, group]
        if (street := paper["auroc"].get("Chars74K")) is not None:
            text = f"1 - AUROC of {PAPER}, B = {group}, of Chars74K for SVHN"
            yield claim(text, round(1 - street, 4), round(1 - PAPERS_AUROC, 4))
        for worse, better in (("typicality", PAPER), ("total norm", PAPER), (PAPER, "forward")):
            less = by_method[worse, group]["mean"] - by_method[better, group]["mean"]
            text = f"mean AUROC, B = {group}: {worse} less {better}"
            yield claim(text, round(less, 4), 0.0)


def of_layers(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        share = statistics.mean(row["larger"].values())
        text = f"share of layers with no larger norms on foreign data, B = {row['group']}"
        yield claim(text, round(1 - share, 4), 0.5)


def quick() -> tuple[Watched, nn.Module, dict[str, Tensor], dict[str, str]]:
    """Of a photograph: the tiny model of `benchmarks.detection.colour`, soon trained."""
    images, sets = colour.photographs()
    watched = replace(colour.tiny()["Glow"], steps=60, batch=64)
    torch.manual_seed(0)
    module = watched.make()
    facts = trained.train(module, watched, images)
    return watched, module.eval(), sets, facts


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="A tiny model of a photograph; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    training: Annotated[
        Path | None, typer.Option("--train", help="Train it, with checkpoints there, instead.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of training.")] = 3_000.0,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figure.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, (ON, *OTHERS))
        images, sets = colour.sets(data_dir, SIZES)
    if training is not None:
        train(model(), images, sets["fit"], training, FILE, seconds=seconds)
        return
    if quick_run:
        watched, module, sets, facts = quick()
    else:
        watched = model()
        module, facts = zoo.load(watched, FILE)
    counts = {name: len(each) for name, each in sets.items()}
    rows = rows_of(watched, module, sets, figures)
    reported(rows, line, claims, output, training=facts, sizes=counts)


if __name__ == "__main__":
    typer.run(main)
