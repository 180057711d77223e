"""Invertible changes of images with their log-determinants, and a flow of what they give."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection.layers import mean_and_sd
from benchmarks.detection.methods import CHUNK
from ood_monitor.adapters.base import uniform_draw


@dataclass(frozen=True)
class Change:
    """y = T(x), of images x in (0, 1), (B, C, H, W).

    Attributes:
        there: T.
        back: Its inverse.
        log_det: log |det dT/dx| of each x, (B,), nats.
    """

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    log_det: Callable[[Tensor], Tensor]


class Represented(nn.Module):
    """The model of y = T(x) that a flow of x is: log p(y) = log p(x) - log |det dT/dx|."""

    def __init__(self, flow: nn.Module, change: Change) -> None:
        super().__init__()
        self.flow, self.change = flow, change

    def log_prob(self, y: Tensor) -> Tensor:
        x = self.change.back(y)
        likelihood: Tensor = self.flow.log_prob(x)  # type: ignore[operator]
        return likelihood - self.change.log_det(x)


def invariance(module: nn.Module, change: Change, x: Tensor) -> dict[str, Any]:
    """In double precision: by how much norms differ, and likelihoods in bits per dimension."""
    flow, x = module.double(), x.double()
    plain = om.LogLikelihood(flow, lambda it, images: it.log_prob(images))
    other = om.LogLikelihood(Represented(flow, change))
    pairs = [(plain, x), (other, change.there(x))]
    before, after = (
        torch.stack(list(om.gradient_norms(adapter, images, chunk_size=CHUNK).values()))
        for adapter, images in pairs
    )
    bits = [adapter.bits_per_dimension(images) for adapter, images in pairs]
    module.float()
    live = before > 1e-12 * before.max()
    shift = bits[1] - bits[0]
    return {
        "images": len(x),
        "norms_relative_difference": float(((after - before).abs() / before)[live].max()),
        "bits_per_dimension": [round(float(each.mean()), 3) for each in bits],
        "shift_mean_and_sd": mean_and_sd(shift.numpy()),
    }


def dequantised(x: Tensor, seed: int = 0) -> Tensor:
    """What a flow's adapter makes of images in [0, 1] of 256 values: in (0, 1), one draw for all.

    No two channels of a pixel are equal, since no two of the draw are: HSV is smooth there.
    """
    return (255 * x + uniform_draw(x.shape[1:], seed).to(x)) / 256


def to_hsv(x: Tensor) -> Tensor:
    """Hue, saturation and value in [0, 1], of RGB."""
    red, green, blue = x.unbind(1)
    (value, largest), smallest = x.max(1), x.amin(1)
    chroma = value - smallest
    sixths = torch.stack([green - blue, blue - red, red - green], 1) / chroma[:, None]
    turn = sixths.gather(1, largest[:, None])[:, 0] + 2 * largest
    return torch.stack([(turn % 6) / 6, chroma / value, value], 1)


def of_hsv(y: Tensor) -> Tensor:
    hue, saturation, value = y.unbind(1)
    turns = (torch.stack([n + 6 * hue for n in (5, 3, 1)], 1)) % 6
    share = torch.minimum(turns, 4 - turns).clamp(0, 1)
    return (value[:, None] * (1 - saturation[:, None] * share)).clamp(0, 1)


def hsv_log_det(x: Tensor) -> Tensor:
    """Per pixel -log V - log C - log 6: of dS/d(smallest) = -1 / V, dH/d(middle) = +-1 / (6 C)."""
    value, smallest = x.amax(1), x.amin(1)
    return -(value.log() + (value - smallest).log() + math.log(6)).flatten(1).sum(1)


def logit_log_det(x: Tensor) -> Tensor:
    return -(x.log() + torch.log1p(-x)).flatten(1).sum(1)


def stored(scale: float = 1.7, shift: float = -1.0) -> Change:
    """Scaled and shifted, with rows in reverse order."""
    return Change(
        lambda x: scale * x.flip(2) + shift,
        lambda y: ((y - shift) / scale).flip(2),
        lambda x: of_scale(x, scale),
    )


def of_scale(x: Tensor, scale: float) -> Tensor:
    """The log-determinant of a scale of all values."""
    return x.new_full((len(x),), x[0].numel() * math.log(scale))


def turned(scale: float = 1.7, shift: float = -1.0) -> Change:
    """Colours by a random rotation of theirs, scaled and shifted; images mirrored."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]

    def mixed(by: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, torch.einsum("ij,bjhw->bihw", by.to(x), x)).flip(3)

    return Change(
        lambda x: scale * mixed(matrix, x) + shift,
        lambda y: mixed(matrix.T, (y - shift) / scale),
        lambda x: of_scale(x, scale),
    )


CHANGES: dict[str, Change] = {
    "RGB to HSV": Change(to_hsv, of_hsv, hsv_log_det),
    "logit of each value": Change(torch.logit, torch.sigmoid, logit_log_det),
    "colours rotated, scaled, shifted, mirrored": turned(),
}
