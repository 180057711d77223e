"""Denoisers without noise at one level alone, for calls of few steps: which level detects most.

The models, images and parts are those of `benchmarks.detection.denoisers`, which has what two
levels and three detect. A call of one step is watched by as few passes as there can be: one.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from ood_monitor_integrations.diffusers.plan import ONE_LEVEL
from torch import Tensor, nn

from benchmarks.detection import datasets, denoisers, kinds, protocol, zoo
from benchmarks.detection.denoisers import CORRUPTED, OURS_PARTS, Make
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]

#: Noise to signal, from little to much.
RATIOS = (0.015, 0.33, 1.0, 3.4)

#: Which `fit_pipeline` takes where a budget allows one level.
[CHOSEN] = ONE_LEVEL

#: Both levels that are taken by default.
BOTH = "two levels"


def rows(
    name: str, watched: Watched, make: Make, module: nn.Module, sets: Mapping[str, Tensor]
) -> Iterator[Row]:
    """A row for each level, and for the default."""
    x = {of: watched.prepare(images) for of, images in sets.items()}
    options: dict[Any, dict[str, Any]] = {ratio: {"ratios": (ratio,)} for ratio in RATIOS}
    for level, given in (options | {BOTH: {}}).items():
        found = denoisers.measured(make(module, **given), x, OURS_PARTS)
        scores = denoisers.scores_of(found, OURS_PARTS)
        yield {"model": name, "level": level} | protocol.judged(scores)


def full(data: Path, names: list[str]) -> Iterator[Row]:
    for on in zoo.TRAINED_ON:
        sets = protocol.sets(data, on, Sizes())
        for name, watched, make, file in denoisers.models(data, on, names):
            module, _ = zoo.load(watched, file)
            for row in rows(name, watched, make, module.eval(), sets):
                yield {"on": on} | row


def quick() -> Iterator[Row]:
    watched, module, sets, _ = denoisers.tiny()
    for row in rows(CORRUPTED, watched, denoisers.bound, module, sets):
        yield {"on": "digits"} | row


def told(row: Row) -> str:
    found, worst = statistics.mean(row["found"].values()), min(row["auroc"].values())
    head = f"{row['on']:14}{row['model']:20}{row['level']!s:12}"
    return f"{head}mean {row['mean']:.4f}  worst {worst:.4f}  found {found:.2f}"


def claims(rows: list[Row]) -> list[Row]:
    """That no other level has a better mean, and what one is short of two."""
    means = {
        level: statistics.mean(row["mean"] for row in rows if row["level"] == level)
        for level in (*RATIOS, BOTH)
    }
    best = max(means[ratio] for ratio in RATIOS)
    short = {"the best level": best - means[CHOSEN], "two levels": means[BOTH] - means[CHOSEN]}
    return [
        claim(f"mean AUROC that {CHOSEN} alone is short of {name}", round(value, 4), 0.005)
        for name, value in short.items()
    ]


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="A tiny model of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.EVERY)
    names = model or [CORRUPTED, *kinds.kinds()]
    reported(quick() if quick_run else full(data_dir, names), told, claims, output)


if __name__ == "__main__":
    typer.run(main)
