"""The evidence's table on colour images, by models of the paper's size: for those with a GPU.

A Glow with K = 32, L = 3 and 512 hidden channels, and the UNet of google/ddpm-cifar10-32, each
trained on CIFAR-10 for as long as it is told, which its rows say. Images are at their own 32x32
pixels. Protocol and methods are those of `benchmarks.evidence`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import ood_monitor as om
from benchmarks import datasets, evidence, protocol, trained, zoo
from benchmarks.measuring import machine, save
from benchmarks.models import ddpm_unet
from benchmarks.protocol import Sizes
from benchmarks.train import train
from benchmarks.trained import Watched

ON, OTHERS = "CIFAR-10", ("CIFAR-100", "GTSRB", "Chars74K")

#: Of the training images, the last, which no model is trained on.
HELD_OUT = 2_000

#: What a UNet is trained in, where there is a GPU; a flow needs all of its bits.
HALF = {"UNet": "bf16-mixed"}


def models() -> dict[str, Watched]:
    flow = trained.watched_glow(glow, steps=0, factor=1)
    unet = Watched(trained.signed, ddpm_unet, trained.denoising, trained.bound, steps=0)
    return {
        "Glow": replace(flow, batch=256, warmup=300, rate=1e-4),
        "UNet": replace(unet, batch=256, warmup=200, rate=2e-4),
    }


def glow() -> om.models.Glow:
    return om.models.Glow(3, 32, levels=3, steps=32, hidden=512, log_scale_bound=0.5)


def rgb(directory: Path, name: str, split: str) -> Tensor:
    """As they are, uint8, (N, 3, 32, 32)."""
    images = datasets.read(directory, name, split)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def sets(directory: Path, sizes: Sizes) -> tuple[Tensor, dict[str, Tensor]]:
    """What models are trained on, and the sets of `protocol.sets`."""
    images = rgb(directory, ON, "train")
    seen, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
    held_out = trained.drawn(protocol.unlike(held_out, seen), sizes.fit + sizes.calibration)
    test = protocol.unlike(rgb(directory, ON, "test"), seen, held_out)
    found = {
        "fit": held_out[: sizes.fit],
        "calibration": held_out[sizes.fit :],
        "test": trained.drawn(test, sizes.test),
    }
    protocol.check_disjoint({"training": seen, **found})
    for name in OTHERS:
        found[name] = trained.drawn(rgb(directory, name, "test"), sizes.ood)
    return seen, found


def rows(
    data: Path, folder: Path, kinds: list[str], seconds: float, sizes: Sizes
) -> Iterator[evidence.Row]:
    """Of models that are trained for so many seconds each, unless the folder has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, tested = sets(data, sizes)
    for kind in kinds:
        watched, where = models()[kind], folder / kind.lower()
        file = where / "trained.safetensors"
        if not file.exists():
            half = {"precision": HALF[kind]} if kind in HALF and device == "cuda" else {}
            train(watched, images, tested["fit"], where, file, seconds=seconds, **half)
        module, facts = zoo.load(watched, file)
        training = {"on": ON, "training": facts | {"images": str(len(images))}}
        passes = folder / "passes"
        yield from evidence.rows_of(kind, watched, module.to(device), tested, training, passes)


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    folder: Annotated[
        Path, typer.Option(help="Where weights and passes are kept; delete to start again.")
    ] = Path("runs/colour"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    seconds: Annotated[float, typer.Option(help="Of training, each model.")] = 600.0,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if words := datasets.missing(data_dir, (ON, *OTHERS)):
        typer.echo(words, err=True)
        raise typer.Exit(1)
    found, sizes = list[evidence.Row](), Sizes()
    for row in rows(data_dir, folder, model or list(models()), seconds, sizes):
        typer.echo(evidence.line(row))
        found.append(row)
        report = {"machine": machine(), "sizes": vars(sizes), "rows": found, "claims": []}
        save(report, output)


if __name__ == "__main__":
    typer.run(main)
