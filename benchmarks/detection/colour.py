"""The evidence's table on colour images, by models of the paper's size: for those with a GPU.

A Glow with K = 32, L = 3 and 512 hidden channels, and the UNet of google/ddpm-cifar10-32, each
trained on CIFAR-10 for as long as it is told, which its rows say. Images are at their own 32x32
pixels. Protocol and methods are those of `benchmarks.detection.evidence`.

    python -m benchmarks.detection.colour --data-dir FOLDER --json benchmarks/results/colour.json
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.datasets import load_sample_images
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import datasets, evidence, protocol, trained, zoo
from benchmarks.detection.datasets import Pixels
from benchmarks.detection.methods import DEFAULT, PAPER
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.train import train
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, machine, save
from benchmarks.harness.models import ddpm_unet

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
    others = {name: rgb(directory, name, "test") for name in OTHERS}
    return seen, protocol.split(seen, held_out, rgb(directory, ON, "test"), others, sizes)


def tiny() -> dict[str, Watched]:
    """For crops of 16x16, to be trained in seconds."""
    small = functools.partial(om.models.Glow, channels=3, size=16, levels=1, steps=2, hidden=8)
    return {"Glow": trained.watched_glow(small, steps=0, factor=1)}


def photographs() -> tuple[Tensor, dict[str, Tensor]]:
    """The same of crops of scikit-learn's two photographs: one is known, the other is not."""
    known, other = (crops(image) for image in load_sample_images().images)
    images, fit, calibration, test = known.split([500, 220, 150, 170])
    return images, {"fit": fit, "calibration": calibration, "test": test, "flower": other[:100]}


def crops(photograph: Pixels, size: int = 16) -> Tensor:
    """Squares beside each other, shuffled, uint8, (N, 3, S, S)."""
    found = torch.from_numpy(photograph.copy()).unfold(0, size, size).unfold(1, size, size)
    squares = found.flatten(0, 1)
    return trained.drawn(squares, len(squares))


def rows(
    on: str,
    kinds: Mapping[str, Watched],
    images: Tensor,
    tested: Mapping[str, Tensor],
    folder: Path,
    seconds: float,
) -> Iterator[evidence.Row]:
    """Of models that are trained for so many seconds each, unless the folder has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, watched in kinds.items():
        where = folder / kind.lower()
        file = where / "trained.safetensors"
        if not file.exists():
            half = {"precision": HALF[kind]} if kind in HALF and device == "cuda" else {}
            train(watched, images, tested["fit"], where, file, seconds=seconds, **half)
        module, facts = zoo.load(watched, file)
        training = {"on": on, "training": facts | {"images": str(len(images))}}
        passes = folder / "passes"
        yield from evidence.rows_of(kind, watched, module.to(device), tested, training, passes)


def claims(found: list[evidence.Row]) -> list[evidence.Row]:
    """That the default beats typicality and the paper's score on the same model."""
    means = {(row["model"], row["group"], row["method"]): row["mean"] for row in found}
    return [
        claim(
            f"{model}, B = {group}: mean AUROC of {other} less that of {DEFAULT}",
            round(means[model, group, other] - mean, 4),
            0.0,
        )
        for (model, group, method), mean in means.items()
        for other in ("typicality", PAPER)
        if method == DEFAULT and (model, group, other) in means
    ]


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model of a photograph; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    folder: Annotated[
        Path, typer.Option(help="Where weights and passes are kept; delete to start again.")
    ] = Path("runs/colour"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    seconds: Annotated[float, typer.Option(help="Of training, each model.")] = 600.0,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick:
        datasets.require(data_dir, (ON, *OTHERS))
    with TemporaryDirectory() as temporary:
        if quick:
            folder, seconds = Path(temporary), 3.0
        on, kinds = ("a photograph", tiny()) if quick else (ON, models())
        images, tested = photographs() if quick else sets(data_dir, Sizes())
        chosen = {kind: kinds[kind] for kind in model or kinds}
        found: list[evidence.Row] = []
        for row in rows(on, chosen, images, tested, folder, seconds):
            typer.echo(evidence.line(row))
            found.append(row)
            # After each, since a machine with a GPU may be lent for less time than all take.
            save({"machine": machine(), "rows": found, "claims": claims(found)}, output)


if __name__ == "__main__":
    typer.run(main)
