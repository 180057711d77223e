"""Near shifts: corrupted images, and images moved by the model's own gradient.

Fifteen corruptions at five severities of images of the test split, against other images of it; and
the L-infinity attacks of `benchmarks.detection.attacks`, which make normal images less likely, or
another set's more likely. All methods of the table, fitted as there. A full run takes half an hour
on one core.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import attacks, datasets, methods, protocol, zoo
from benchmarks.detection.corruptions import CORRUPTIONS, corrupted
from benchmarks.detection.densities import png_bytes
from benchmarks.detection.methods import DEFAULT, METHODS, PAPER, Seen
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]

SEVERITIES = (1, 2, 3, 4, 5)
#: How many images are changed in each way.
CHANGED = 40
#: Of the range of values; and PGD's number of steps.
EPSILONS, STEPS = (2 / 255, 8 / 255), 10


def judged(seen: Mapping[str, Seen]) -> dict[str, dict[str, float]]:
    """AUROC of each set against ``test``, by method."""
    views, found = methods.views(seen), {}
    for name, method in METHODS.items():
        if method.view in views:
            scores = protocol.scored(method.make(seen["fit"].terms), views[method.view])
            normal = scores.pop("test")
            found[name] = {k: round(protocol.auroc(normal, v), 4) for k, v in scores.items()}
    return found


def corruptions(
    watched: Watched,
    module: nn.Module,
    normal: Mapping[str, Seen],
    images: Tensor,
    severities: Sequence[int],
) -> Iterator[Row]:
    """A row for each severity and method."""
    for severity in severities:
        odd = {
            name: methods.seen(watched, module, corrupted(images, name, severity, seed=0), 1)
            for name in CORRUPTIONS
        }
        for method, aurocs in judged({**normal, **odd}).items():
            mean = round(statistics.mean(aurocs.values()), 4)
            yield {
                "shift": "corruption",
                "severity": severity,
                "method": method,
                "auroc": aurocs,
                "mean": mean,
            }


def attacked(
    watched: Watched, module: nn.Module, normal: Mapping[str, Seen], sets: Mapping[str, Tensor]
) -> Iterator[Row]:
    """A row for each method, of every attack on a model that takes real numbers."""
    adapter = methods.adapter_of(watched, module)
    odd = {}
    for name, images in sets.items():
        x = watched.prepare(images)
        low = -1.0 if isinstance(adapter, om.DenoisingBound) else 0.0
        odd[name] = moved(adapter, x, low)
        for epsilon in EPSILONS:
            reach = epsilon * (1 - low)
            sign: attacks.Sign = -1 if name == "in distribution" else 1
            one = attacks.fgsm(adapter, x, reach, sign=sign, value_range=(low, 1.0))
            many = attacks.pgd(
                adapter, x, reach, STEPS, reach / 4, sign=sign, value_range=(low, 1.0)
            )
            title = f"{name}, {round(255 * epsilon)}/255"
            odd |= {f"{title}, FGSM": moved(adapter, one, low)}
            odd |= {f"{title}, PGD": moved(adapter, many, low)}
    for method, aurocs in judged({**normal, **odd}).items():
        yield {"shift": "attack", "method": method, "auroc": aurocs}


def moved(adapter: om.Adapter, x: Tensor, low: float) -> Seen:
    grey = ((x - low) / (1 - low) * 255).round().byte()
    return methods.passes(adapter, x, 8 * png_bytes(grey))


def rows_of(
    model: str,
    watched: Watched,
    module: nn.Module,
    sets: Mapping[str, Tensor],
    near: str,
    severities: Sequence[int] = SEVERITIES,
) -> Iterator[Row]:
    """Half of the test images is as it is, the other half is what is corrupted."""
    half = len(sets["test"]) // 2
    kept = {"fit": sets["fit"], "test": sets["test"][:half]}
    normal = {name: methods.seen(watched, module, images, 1) for name, images in kept.items()}
    other = sets["test"][half:][:CHANGED]
    corrupt = corruptions(watched, module, normal, other, severities)
    yield from ({"model": model} | row for row in corrupt)
    if watched.prepare(other[:1]).is_floating_point():
        targets = {"in distribution": other, near: sets[near][:CHANGED]}
        yield from ({"model": model} | row for row in attacked(watched, module, normal, targets))


def claims(rows: list[Row]) -> list[Row]:
    """At severity 3, the mean over models: the default beside typicality and the paper's score."""
    means = {
        method: statistics.mean(
            row["mean"] for row in rows if row.get("severity") == 3 and row["method"] == method
        )
        for method in (DEFAULT, PAPER, "typicality")
    }
    text = "mean AUROC over corruptions at severity 3 and models"
    return [
        claim(f"{text}: {other} less {DEFAULT}", round(means[other] - means[DEFAULT], 4), 0.0)
        for other in (PAPER, "typicality")
    ]


def line(row: Row) -> str:
    if row["shift"] == "corruption":
        return f"{row['model']:9}severity {row['severity']}  {row['method']:28}{row['mean']:.3f}"
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    return f"{row['model']:9}{row['method']:28}{each}"


def full(data: Path, models: list[str]) -> Iterator[Row]:
    on = "Fashion-MNIST"
    sets = protocol.sets(data, on, Sizes())
    for model, watched in zoo.zoo().items():
        if model in models:
            module, _ = zoo.load(watched, zoo.weights_file(on, model))
            yield from rows_of(model, watched, module, sets, "MNIST")


def quick_rows() -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    small = {name: value[:150] for name, value in sets.items()}
    for model, watched, module, _ in zoo.trained_tiny(images):
        yield from rows_of(model, watched, module, small, "blurred", severities=(3,))


def main(
    quick: Annotated[bool, typer.Option(help="Tiny models of 8x8 digits; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick:
        datasets.require(data_dir, datasets.SOURCES)
    rows = quick_rows() if quick else full(data_dir, model or list(zoo.zoo()))
    reported(rows, line, claims, output)


if __name__ == "__main__":
    typer.run(main)
