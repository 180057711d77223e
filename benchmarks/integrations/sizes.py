"""One detector of a denoiser for images of several sizes, beside one for each size.

A small convolutional UNet is trained on handwritten digits at three sizes. Of the same held-out
images a detector is fitted to all sizes together, by means over positions, and one to each size by
sums, as detectors of one size are. Both compare an image with calibration images of its own size.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import UNet2DModel
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import trained
from benchmarks.harness.measurement import claim, reported
from ood_monitor.calibration.conformal import binomial_interval
from ood_monitor.testing import flagged_interval

Row = dict[str, Any]
Array = NDArray[np.float64]

#: Sides of images; the rate at which they are flagged, and how surely intervals hold a share.
SIDES, FPR, CONFIDENCE = (8, 12, 16), 0.05, 0.99

#: Images that the model is trained on, and held-out ones of each size; the rest are to test with.
TRAINED, HELD_OUT = 600, 300

#: By how much one detector for all sizes may be worse than one for each, in AUROC.
LOSS = 0.01


def resized(images: Tensor, side: int) -> Tensor:
    """Images (N, 1, S, S) in [-1, 1] at another size."""
    if side == images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def unet() -> nn.Module:
    """Of convolutions alone, which takes any size that is a multiple of two."""
    network: nn.Module = UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return network


def train(network: nn.Module, images: Tensor, steps: int) -> float:
    """A batch of one size after the other; gives the mean loss of the last tenth."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    by_side, losses = [resized(images, side) for side in SIDES], list[float]()
    for step in range(steps):
        own = by_side[step % len(SIDES)]
        loss = trained.denoising(network, own[torch.randint(len(own), (64,))])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    network.eval()
    return float(np.mean(losses[-(steps // 10) :]))


def patches(side: int, count: int) -> Tensor:
    """Of two photographs, in grey, (N, 1, S, S) in [-1, 1]."""
    generator, found = np.random.default_rng(0), list[Array]()
    photos = [photo @ [0.299, 0.587, 0.114] / 127.5 - 1 for photo in load_sample_images().images]
    for i in range(count):
        photo = photos[i % len(photos)]
        y, x = (int(generator.integers(n - side)) for n in photo.shape)
        found.append(photo[y : y + side, x : x + side])
    return torch.from_numpy(np.stack(found)).float()[:, None]


def foreign(digits: Tensor) -> dict[str, Tensor]:
    """Sets of images unlike digits of a size, or nearly like them."""
    count, side = len(digits), digits.shape[-1]
    noise = torch.rand(digits.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {
        "inverted": -digits,
        "photographs": patches(side, count),
        "noise": noise,
        "half contrast": (digits + 1) / 2 - 1,
        "blurred": F.avg_pool2d(digits, 3, 1, 1, count_include_pad=False),
        "mirrored": digits.flip(-1),
    }


def rows(
    network: nn.Module, held_out: Tensor, test: Tensor, split: int, splits: int
) -> Iterator[Row]:
    """A row for each way to watch and each size."""
    pieces = held_out.split(HELD_OUT)  # each image is held out at one size
    batches = {side: resized(own, side) for side, own in zip(SIDES, pieces, strict=True)}
    make = partial(om.Detector, explain=0)
    one = make(trained.bound(network), any_size=True).fit(batches.values(), progress=False)
    own = {
        side: make(trained.bound(network)).fit([batches[side]], progress=False) for side in SIDES
    }
    for side in SIDES:
        for name, detector in (("one for all", one), ("one for each", own[side])):
            found = measured(detector, resized(test, side), f"1x{side}x{side}", splits)
            yield {"detector": name, "side": side, "split": split, **found}


def measured(detector: om.Detector, digits: Tensor, group: str, splits: int) -> Row:
    """How many digits are flagged, and how well others are told from them."""
    scores, grouped = detector.score(digits), detector.fitted.grouped
    flagged, n = int((scores.p_value <= FPR).sum()), len(digits)
    calibration = len(detector.fitted.calibration.scores)
    if grouped is not None:
        calibration = grouped.sizes[group]
    sound = flagged_interval(n, calibration, FPR, cells=2 * len(SIDES) * splits)
    auroc = {
        name: round(auroc_of(scores.score, detector.score(images).score), 4)
        for name, images in foreign(digits).items()
    }
    return {
        "calibration": calibration,
        "flagged": round(flagged / n, 4),
        "interval": [round(x, 4) for x in binomial_interval(flagged, n, CONFIDENCE)],
        "of a sound one": [round(x / n, 4) for x in sound],
        "auroc": auroc,
        "mean": round(float(np.mean(list(auroc.values()))), 4),
    }


def auroc_of(normal: Tensor, odd: Tensor) -> float:
    labels = np.repeat([0, 1], [len(normal), len(odd)])
    return float(roc_auc_score(labels, torch.cat([normal, odd])))


def claims(found: list[Row]) -> list[Mapping[str, Any]]:
    """That flags are as promised in every cell, and what one density for all sizes loses."""
    means = {
        name: np.mean([row["mean"] for row in found if row["detector"] == name])
        for name in ("one for all", "one for each")
    }
    outside = sum(
        not row["of a sound one"][0] <= row["flagged"] <= row["of a sound one"][1] for row in found
    )
    loss = round(float(means["one for each"] - means["one for all"]), 4)
    return [
        claim("cells with other than the promised share of flags", outside, 0),
        claim("mean AUROC lost by one detector for all sizes", loss, LOSS),
    ]


def line(row: Row) -> str:
    told = ", ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    low, high = row["interval"]
    return (
        f"{row['detector']}, {row['side']}: flagged {row['flagged']:.3f} ({low:.3f} to {high:.3f}),"
        f" AUROC {row['mean']:.3f}: {told}"
    )


def main(
    steps: Annotated[int, typer.Option(min=20, help="Of training.")] = 2_500,
    splits: Annotated[int, typer.Option(min=1, help="Of the images that are held out.")] = 3,
    quick: Annotated[bool, typer.Option(help="A few steps, and one split.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps, splits = (30, 1) if quick else (steps, splits)
    digits = trained.digits(fit=397, test=400)
    images = torch.cat([digits.train, digits.sets["fit"], digits.sets["test"]])
    images, unseen = trained.signed(images).tensor_split([TRAINED])
    network = unet()
    loss = train(network, images, steps)

    def found() -> Iterator[Row]:
        for split in range(splits):
            order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(split))
            held_out, test = unseen[order].tensor_split([len(SIDES) * HELD_OUT])
            yield from rows(network, held_out, test, split, splits)

    reported(found(), line, claims, output, steps=steps, loss=round(loss, 4))


if __name__ == "__main__":
    typer.run(main)
