"""The models of the evidence: a flow, an autoencoder, a diffusion and an autoregressive model.

Small, so that 2 CPU cores train each in minutes, which is what set their sizes and steps: never
what a detector makes of other images.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, trained
from benchmarks.detection.pixelcnn import PixelCNN
from benchmarks.detection.trained import Watched

#: Grey values that the autoregressive model tells apart.
VALUES = 16
WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Training:
    """What models of a set are trained on.

    Attributes:
        images: How many of its training images, the first; the others are held out.
        share: Of a model's steps: fewer where there are fewer images.
    """

    images: int
    share: float = 1.0


TRAINED_ON = {"Fashion-MNIST": Training(50_000), "MNIST": Training(8_000, share=0.4)}


def zoo() -> dict[str, Watched]:
    """For images of 32x32; the flow and the autoregressive model see them at 16x16."""
    vae = functools.partial(trained.VAE, 32, (16, 32, 64), 16)
    glow = functools.partial(om.models.Glow, channels=1, size=16, levels=3, steps=8, hidden=64)
    net = functools.partial(trained.unet, 32, (32, 64, 64))
    return {
        "Glow": trained.watched_glow(glow, steps=2_500, factor=2),
        "VAE": trained.watched_vae(vae, steps=3_000),
        "UNet": Watched(trained.signed, net, trained.denoising, trained.bound, 2_500, 32),
        "PixelCNN": pixelcnn(functools.partial(PixelCNN, VALUES, width=32), steps=1_200, factor=2),
    }


def tiny() -> dict[str, Watched]:
    """For images of 8x8, to be trained in seconds."""
    small = functools.partial(PixelCNN, VALUES, width=8, depth=1)
    return {**trained.tiny(), "PixelCNN": pixelcnn(small, steps=100, factor=1)}


def trained_tiny(images: Tensor) -> Iterator[tuple[str, Watched, nn.Module, dict[str, str]]]:
    """Each of these, trained, in eval mode, with what is known of its training."""
    for name, watched in tiny().items():
        module, facts = _trained(name, images.numpy().tobytes(), images.shape)
        yield name, watched, copy.deepcopy(module), facts


@functools.cache
def _trained(name: str, images: bytes, shape: torch.Size) -> tuple[nn.Module, dict[str, str]]:
    """Once for all quick runs of a process."""
    torch.manual_seed(0)
    watched = tiny()[name]
    module = watched.make()
    x = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(shape)
    facts = trained.train(module, watched, x)
    return module.eval(), facts


def pixelcnn(make: functools.partial[PixelCNN], steps: int, factor: int) -> Watched:
    def adapter(module: nn.Module) -> om.Adapter:
        return om.SequenceLikelihood(module, shifted=False, class_dim=1)

    prepare = functools.partial(tokens, factor=factor)
    return Watched(prepare, make, cross_entropy, adapter, steps)


def tokens(images: Tensor, factor: int) -> Tensor:
    """Averaged over squares, and in `VALUES` steps: integers (N, H, W)."""
    return (F.avg_pool2d(images.float(), factor)[:, 0] * VALUES / 256).long()


def cross_entropy(model: PixelCNN, x: Tensor) -> Tensor:
    """Of an image, in nats; the mean over images."""
    return F.cross_entropy(model(x), x, reduction="sum") / len(x)


def training_images(directory: Path, name: str) -> tuple[Tensor, Tensor]:
    """The images that a model of this set is trained on, and those held out, (N, 1, 32, 32)."""
    images = datasets.harmonised(datasets.read(directory, name, "train"))
    count = TRAINED_ON[name].images
    return images[:count], images[count:]


def weights_file(name: str, model: str) -> Path:
    return WEIGHTS / f"{datasets.SOURCES[name].folder}-{model.lower()}.safetensors"


def save(module: nn.Module, file: Path, facts: dict[str, str]) -> None:
    """In half precision, which is what is evaluated: weights that are committed are small."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, file, facts)


def load(watched: Watched, file: Path) -> tuple[nn.Module, dict[str, str]]:
    """The model in eval mode and single precision, and what is known of its training."""
    torch.manual_seed(0)
    module = watched.make()
    module.load_state_dict(load_file(file))
    with safe_open(file, framework="pt") as opened:
        return module.eval(), dict(opened.metadata())
