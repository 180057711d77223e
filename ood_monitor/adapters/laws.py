"""Laws of single elements as :class:`~ood_monitor.Elements`: what each expects of itself."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, ExponentialFamily, Independent

from ood_monitor.adapters.elements import Elements

__all__ = [
    "bernoulli",
    "categorical",
    "gaussian",
    "in_single",
    "of_distribution",
    "places",
]

#: Numbers of a vocabulary's probabilities that are in memory at once; on a CPU, in its cache.
_AT_ONCE, _AT_ONCE_ON_CPU = 1 << 22, 1 << 19


def places(x: Tensor) -> tuple[int, ...]:
    """The dimensions that are places: height and width of images (B, C, H, W)."""
    return (2, 3) if x.ndim == 4 else ()


def in_single(x: Tensor) -> Tensor:
    """In single precision at least: sums of half precision over a vocabulary are rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian(z: Tensor, mean: Tensor, log_sd: Tensor) -> Elements:
    """Independent Normals, which expect -log sd - 1/2 - 1/2 log 2 pi.

    Args:
        z: Shape (B, ...).
        mean: Of a shape that expands to it.
        log_sd: As ``mean``.
    """
    standard = (z - mean) * torch.exp(-log_sd)
    return Elements(
        -0.5 * (standard * standard + math.log(2 * math.pi)) - log_sd,
        expected=lambda: (-log_sd - 0.5 * (1 + math.log(2 * math.pi))).expand_as(z),
        axes=places(z),
    )


def bernoulli(log_prob: Tensor, x: Tensor, logits: Tensor) -> Elements:
    """Coins, of which x may also be the mean of many: it expects minus the entropy.

    Args:
        log_prob: Of each element, shape (B, ...).
        x: In [0, 1], of that shape.
        logits: Of that shape.
    """

    def expected() -> Tensor:
        found = in_single(logits)
        return found.sigmoid() * F.logsigmoid(found) + (-found).sigmoid() * F.logsigmoid(-found)

    def quadratic() -> tuple[Tensor, Tensor]:
        p = in_single(logits).sigmoid()
        return (x.to(p) - p).square(), p * (1 - p)

    return Elements(log_prob, expected, quadratic, axes=places(x))


def categorical(logits: Tensor, values: Tensor, **options: Any) -> Elements:
    """Whole numbers of a finite vocabulary.

    Args:
        logits: Shape (B, ..., V).
        values: What came, shape (B, ...).
        **options: Further attributes of the elements.
    """
    log_p = logits.log_softmax(-1)
    index = values.long().unsqueeze(-1)

    @functools.cache
    def moments() -> tuple[Tensor, ...]:
        return _in_parts(_moments, log_p, index).view(*values.shape, 3).unbind(-1)

    def quadratic() -> tuple[Tensor, Tensor]:
        return moments()[1], moments()[2]

    log_prob = log_p.gather(-1, index).squeeze(-1)
    return Elements(log_prob, lambda: moments()[0], quadratic, **options)


def of_distribution(distribution: Distribution, x: Tensor, *, is_shared: bool = False) -> Elements:
    """Elements of a distribution of torch or of another library that follows it.

    Independent dimensions are told apart. One without a dimension for samples is the same for all,
    and expects of each the same: None.

    Args:
        distribution: Of batch shape (B, ...), or of one that expands to it.
        x: Samples.
        is_shared: Whether it is the same for all samples, whatever its shape.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    log_prob: Tensor = distribution.log_prob(x)
    of_samples = not is_shared and len(distribution.batch_shape) == log_prob.ndim
    if of_samples and isinstance(distribution, Bernoulli):
        return bernoulli(log_prob, x, distribution.logits.expand_as(x))
    expected = None
    if of_samples and _has_entropy(distribution):
        entropy: Callable[[], Tensor] = distribution.entropy

        def expected() -> Tensor:
            return -entropy().expand_as(log_prob)

    return Elements(log_prob, expected, axes=places(log_prob))


def _has_entropy(distribution: Distribution) -> bool:
    """Whether its class has one, which is not yet computed."""
    kind = type(distribution)
    if issubclass(kind, ExponentialFamily) and kind.entropy is ExponentialFamily.entropy:
        return kind._mean_carrier_measure is not ExponentialFamily._mean_carrier_measure
    return kind.entropy is not Distribution.entropy


def _in_parts(function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> Tensor:
    """A function of rows, of few rows at a time: a copy of all probabilities may not fit."""
    rows = [tensor.flatten(0, -2) for tensor in tensors]
    most = _AT_ONCE_ON_CPU if tensors[0].device.type == "cpu" else _AT_ONCE
    size = max(1, most // tensors[0].shape[-1])
    parts = zip(*(torch.split(tensor, size) for tensor in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


def _moments(log_p: Tensor, index: Tensor) -> Tensor:
    """E[log p], the squared distance of what came, and what is expected of it, (rows, 3)."""
    log_p = in_single(log_p)
    p = log_p.exp()
    expected = (p * log_p.where(p > 0, 0.0)).sum(-1)  # of what cannot be, 0 and no number
    law = (p * (1 - p)).sum(-1)  # not 1 - sum p^2, which is rounding where the model is sure
    distance = p.scatter_add(-1, index, torch.full_like(p[..., :1], -1.0)).square().sum(-1)
    return torch.stack([expected, distance, law], -1)
