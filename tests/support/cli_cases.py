"""A flow, a pipeline and images for the command line, tiny and random."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ood_monitor as om

__all__ = [
    "bigram",
    "flow",
    "grey_images",
    "not_annotated",
    "nothing",
    "other_flow",
    "write_images",
    "write_pipeline",
]


def flow(hidden: int = 4) -> om.Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=hidden)
    return om.LogLikelihood(model)


class Columns(torch.nn.Module):
    """The second of two columns from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        )

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.split(1, 1)
        return -0.5 * torch.cat([first, second - self.net(first)], 1).square().sum(1)


def columns() -> om.Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return om.LogLikelihood(Columns())


def bigram() -> om.Adapter:
    """Of texts of nine tokens from 1 to 4, filled up with 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return om.SequenceLikelihood(torch.nn.Embedding(5, 5), padding=0)


def other_flow() -> om.Adapter:
    adapter = flow()
    with torch.no_grad():
        for parameter in adapter.module.parameters():
            parameter.add_(0.01)
    return adapter


def not_annotated():  # type: ignore[no-untyped-def]  # noqa: ANN201
    return flow()


def nothing() -> om.Adapter:
    return None  # type: ignore[return-value]


def grey_images(n: int, seed: int = 0) -> np.ndarray:
    """(N, 4, 4) bytes."""
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4), dtype=np.uint8)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


def write_pipeline(folder: Path) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    from support.diffusers_cases import unet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = unet(in_channels=1, out_channels=1).eval()
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder
