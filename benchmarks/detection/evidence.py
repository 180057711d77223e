"""The paper's table: every pair of sets, every model, single samples and groups of five.

All methods see the same model, images and split (`protocol`). Weights come from benchmarks/weights
(`benchmarks.detection.train` makes them); what the passes over the images give is kept in a folder.
A full run takes half an hour on one core.
"""

import functools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from benchmarks.detection import datasets, methods, protocol, zoo
from benchmarks.detection.methods import DEFAULT, METHODS, PAPER, Seen
from benchmarks.detection.protocol import FPR, Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]
GROUPS = (1, 5)
#: The two sets that the targets name.
NEAR = ("MNIST", "EMNIST letters")


def rows_of(
    model: str,
    watched: Watched,
    module: nn.Module,
    sets: Mapping[str, Tensor],
    facts: Row,
    cache: Path | None,
) -> Iterator[Row]:
    """A row for each method and size of groups."""
    costs = methods.costs(watched, module, sets["test"][:50])
    for group in GROUPS:
        found = passes(model, watched, module, sets, group, cache)
        views = methods.views(found)
        for name, method in METHODS.items():
            if method.view in views:
                scores = protocol.scored(method.make(found["fit"].terms), views[method.view])
                case = {"model": model, "group": group, "method": name}
                yield {**facts, **case, "forwards": costs[method.passes]} | protocol.judged(scores)


def passes(
    model: str,
    watched: Watched,
    module: nn.Module,
    sets: Mapping[str, Tensor],
    group: int,
    cache: Path | None,
) -> dict[str, Seen]:
    """What the model's passes give of each set, kept in files if there is a folder for them."""
    found = {}
    for name, images in sets.items():
        make = functools.partial(methods.seen, watched, module, images, group)
        file = cache and cache / f"{model.lower()}-{group}-{name.replace(' ', '-')}.npz"
        found[name] = methods.cached(file, make) if file else make()
    return found


def line(row: Row) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    head = f"{row['on']:14}{row['model']:9}{row['group']}  {row['method']:28}"
    flagged = "" if row["flagged"] is None else f"  flagged {row['flagged']:.3f}"
    return f"{head}{each}  mean {row['mean']:.3f}{flagged}  {row['forwards']} forwards"


def claims(rows: list[Row]) -> list[Row]:
    """What was to be reached, of the default's rows beside those of others."""
    found = []
    for model in ("VAE", "Glow"):
        near = [row for row in rows if (row["model"], row["on"]) == (model, "Fashion-MNIST")]
        for row in near:
            if (row["method"], row["group"]) == (DEFAULT, 1):
                mean = statistics.mean(row["auroc"][name] for name in NEAR)
                text = f"{model} of Fashion-MNIST: 1 - mean AUROC against {' and '.join(NEAR)}"
                found.append(claim(text, round(1 - mean, 4), 0.035))
    ours = mean_of_pairs(rows, DEFAULT)
    for other in ("typicality", PAPER):
        for group, mean in mean_of_pairs(rows, other).items():
            text = f"mean AUROC of all pairs, B = {group}: {other} less {DEFAULT}"
            found.append(claim(text, round(mean - ours[group], 4), 0.0))
    outside = [r for r in rows if r["method"] == DEFAULT and r["nominal_within"] is False]
    checked = [r for r in rows if r["method"] == DEFAULT and r["nominal_within"] is not None]
    text = f"cases of {len(checked)} whose flagged share's 95 % interval excludes {FPR}"
    return [*found, claim(text, len(outside), 0)]


def mean_of_pairs(rows: list[Row], method: str) -> dict[int, float]:
    """By the size of groups, over every model, set and other set."""
    return {
        group: statistics.mean(
            value
            for row in rows
            if (row["method"], row["group"]) == (method, group)
            for value in row["auroc"].values()
        )
        for group in GROUPS
    }


def full(
    data: Path, cache: Path, sizes: Sizes, names: list[str], models: list[str]
) -> Iterator[Row]:
    for on in names:
        sets = protocol.sets(data, on, sizes)
        for model, watched in zoo.zoo().items():
            if model in models:
                module, facts = zoo.load(watched, zoo.weights_file(on, model))
                where = cache / datasets.SOURCES[on].folder
                training = {"on": on, "training": facts}
                yield from rows_of(model, watched, module, sets, training, where)


def quick() -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    for model, watched, module, facts in zoo.trained_tiny(images):
        training = {"on": "digits", "training": facts}
        yield from rows_of(model, watched, module, sets, training, None)


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    cache_dir: Annotated[
        Path, typer.Option(help="Where passes are kept; delete to measure anew.")
    ] = Path("runs/evidence/passes"),
    on: Annotated[list[str] | None, typer.Option(help="A set; all if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.SOURCES)
    sizes = Sizes()
    names, models = on or list(zoo.TRAINED_ON), model or list(zoo.zoo())
    rows = quick() if quick_run else full(data_dir, cache_dir, sizes, names, models)
    reported(rows, line, claims, output, sizes=vars(sizes))


if __name__ == "__main__":
    typer.run(main)
