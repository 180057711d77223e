"""Denoisers without noise: their last layer and energies, beside gradient norms of the bound.

The committed UNets of Fashion-MNIST and of MNIST, by `benchmarks.detection.forward`'s protocol.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, trained, zoo
from benchmarks.detection.forward import NEAR, line, rows_of
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]

#: What is compared, of `benchmarks.detection.forward`; with three levels, these alone.
COMPARED = ("gradient_norms", "without noise", "output_layer", "energies", methods.PAPER)
WITH_THREE = ("without noise",)

TWO, THREE = "UNet", "UNet, three levels"


def bound(ratios: Any, unet: nn.Module) -> om.Adapter:
    return om.DenoisingBound(unet, trained.SCHEDULE, levels=(50, 500), ratios=ratios)


def variants(watched: Watched) -> Iterator[tuple[str, Watched, tuple[str, ...]]]:
    """The model, and what is compared on it."""
    for name, ratios, compared in ((TWO, 2, COMPARED), (THREE, 3, WITH_THREE)):
        adapter = functools.partial(bound, ratios)
        yield name, dataclasses.replace(watched, adapter=adapter), compared


def full(data: Path) -> Iterator[Row]:
    for on in zoo.TRAINED_ON:
        sets = protocol.sets(data, on, Sizes())
        for name, watched, compared in variants(zoo.zoo()["UNet"]):
            module, facts = zoo.load(watched, zoo.weights_file(on, "UNet"))
            for row in rows_of(name, watched, module.eval(), sets, list(compared)):
                yield {"on": on, "training": facts} | row


def quick() -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    torch.manual_seed(0)
    watched = trained.tiny()["UNet"]
    module = watched.make()
    facts = trained.train(module, watched, images)
    for name, variant, compared in variants(watched):
        for row in rows_of(name, variant, module.eval(), sets, list(compared)):
            yield {"on": "digits", "training": facts} | row


def claims(rows: list[Row]) -> list[Row]:
    ours = [row for row in rows if (row["model"], row["method"]) == (TWO, "without noise")]
    every = [value for row in ours for value in row["auroc"].values()]
    near = [row["auroc"][name] for row in ours for name in row["auroc"] if name in NEAR]
    cost = max(max(row["forwards"].values()) for row in ours)
    found = [claim(f"1 - mean AUROC of {len(every)} pairs", rounded(every), 0.001)]
    if near:
        found.append(claim("1 - mean AUROC of near pairs", rounded(near), 0.004))
    found.append(claim("plain forward passes a score", cost, 2.2))
    memory = [row["memory"] for row in ours if row["memory"] is not None]
    if memory:
        found.append(claim("peak memory of a score in that of a plain pass", max(memory), 1.1))
    return found


def rounded(aurocs: list[float]) -> float:
    return round(1 - statistics.mean(aurocs), 4)


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="A tiny model of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.SOURCES)
    rows = quick() if quick_run else full(data_dir)
    reported(rows, line, claims, output, sizes=vars(Sizes()))


if __name__ == "__main__":
    typer.run(main)
