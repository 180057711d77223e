"""A natural shift of domain: digits that others wrote and others scanned, under models of MNIST.

scikit-learn's digits (Optdigits: 43 writers in Turkey) are counts of ink in 8x8 blocks of bitmaps
of 32x32. MNIST (writers in the United States) is brought to the same form: cut to its ink, scaled
to that height, made black and white, and counted. The classes are the same, and so are the sizes;
what tells the sets apart without a model, the size of a PNG file does. Beside the digits there are
EMNIST's letters and Fashion-MNIST in that form. The models are an autoencoder, a Glow and zuko's
neural spline flow, the last of pixels as a row. A full run trains them in minutes on one core.

    python -m benchmarks.detection.domains --data-dir FOLDER --train runs/domains
    python -m benchmarks.detection.domains --data-dir FOLDER --json benchmarks/results/domains.json
"""

import functools
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
import zuko
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import cases, datasets, protocol, trained
from benchmarks.detection.cases import Case
from benchmarks.detection.datasets import Pixels
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched

#: Ink of a block, from none to all of its pixels; and a value of each, of 256.
COUNTS, STEP = 16, 15

ON, OTHERS = "MNIST", ("EMNIST letters", "Fashion-MNIST")
DIGITS = "digits of others"
SIZES = Sizes(fit=600, calibration=600, test=600, ood=300)
TRAINED_ON = 8_000


def counted(images: Pixels) -> Tensor:
    """Ink by block of images of 28x28, as Optdigits has it: uint8, (N, 1, 8, 8)."""
    maps = np.stack([bitmap(image) for image in images])
    blocks = maps.reshape(len(maps), 8, 4, 8, 4).sum((2, 4)).astype(np.uint8)
    return torch.from_numpy(blocks * np.uint8(STEP))[:, None]


def bitmap(image: Pixels) -> Any:
    """What is inked of an image, as large as a square of 32x32 holds it, in its middle."""
    ink = image > 127
    if not ink.any():
        return np.zeros((32, 32), bool)
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 32 / max(cut.shape)
    height, width = (max(1, round(scale * side)) for side in cut.shape)
    large = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR))
    found = np.zeros((32, 32), bool)
    top, left = (32 - height) // 2, (32 - width) // 2
    found[top : top + height, left : left + width] = large > 127
    return found


def optdigits() -> Tensor:
    """scikit-learn's, in the same form."""
    return torch.from_numpy((load_digits().images * STEP).astype(np.uint8))[:, None]


def case(directory: Path) -> Case:
    """Models of MNIST, and what they are shown."""
    images = counted(datasets.read(directory, ON, "train"))
    seen, held_out = images[:TRAINED_ON], images[TRAINED_ON:]
    foreign = {name: counted(datasets.read(directory, name, "test")) for name in OTHERS}
    others = {DIGITS: optdigits(), **foreign}
    test = counted(datasets.read(directory, ON, "test"))
    sets = protocol.split(seen, protocol.unlike(held_out, seen), test, others, SIZES)
    return Case("MNIST by blocks", {"train": seen, **sets}, models=models)


def unit(images: Tensor) -> Tensor:
    return images / float(COUNTS * STEP)


def signed(images: Tensor) -> Tensor:
    return 2 * unit(images) - 1


def models() -> dict[str, Watched]:
    """For images of 8x8 of 17 values."""
    vae = functools.partial(trained.VAE, 8, (16, 32, 64), 16)
    glow = functools.partial(om.models.Glow, channels=1, size=8, levels=2, steps=6, hidden=32)
    nsf = functools.partial(zuko.flows.NSF, 64, transforms=3, hidden_features=(128, 128))
    return {
        "VAE": trained.watched_vae(vae, 2_000),
        "Glow": of_flow(glow, 1_000),
        "zuko NSF": of_flow(nsf, 1_500),
    }


def of_flow(make: Any, steps: int) -> Watched:
    def adapter(flow: nn.Module) -> om.Adapter:
        return om.LogLikelihood(flow, read(flow), bins=COUNTS + 1, value_range=(-1.0, 1.0))

    return Watched(signed, make, dequantised_nll, adapter, steps, warmup=100)


def read(flow: nn.Module) -> Any:
    """The library's own reader of a Glow, in terms; zuko's flow takes pixels as a row.

    Its log-determinant alone is a small sum of large parts, whose rounding differs by a batch.
    """
    return None if isinstance(flow, om.models.Glow) else of_rows


def of_rows(flow: Any, x: Tensor) -> Tensor:
    """Log-density, (B,), in nats."""
    found: Tensor = flow().log_prob(x.flatten(1))
    return found


def dequantised_nll(flow: Any, x: Tensor) -> Tensor:
    noisy = 2 * ((x + 1) / 2 * COUNTS + torch.rand_like(x)) / (COUNTS + 1) - 1
    log_p = flow.log_prob if isinstance(flow, om.models.Glow) else functools.partial(of_rows, flow)
    return -cast(Tensor, log_p(noisy)).mean()


def main(
    quick: cases.Quick = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: cases.Models = None,
    train: cases.Training = None,
    folder: cases.Folder = Path("runs/domains/rows"),
    json: cases.Output = None,
) -> None:
    if quick:
        cases.run_quick(json)
        return
    datasets.require(data_dir, (ON, *OTHERS))
    cases.run([case(data_dir)], model or list(models()), train, folder, json)


if __name__ == "__main__":
    typer.run(main)
