"""What a decoder's output says of the data: the observation models p(x|z) of autoencoders.

Each has ``log_prob(x, decoded)``, the log-probability of every dimension, in nats, of the shape of
x; your own may stand in their place. Ours also have ``elements(x, decoded)``, which adds what the
law expects of each dimension.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from ood_monitor.adapters.base import checked_range, describe
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.laws import bernoulli, in_single, of_distribution, places
from ood_monitor.checks import number, range_of, whole

__all__ = ["Bernoulli", "DiscretizedLogistic", "Gaussian", "Observation"]


class Observation(Protocol):
    """A density of x given what ``decode`` gave.

    It may also have ``elements(x, decoded)``, giving :class:`~ood_monitor.Elements` of the same
    log-probabilities and what is expected of each.
    """

    def log_prob(self, x: Tensor, decoded: Any) -> Tensor:
        """Log-probability of each dimension, in nats, of the shape of x, (B, ...)."""


@dataclass(frozen=True)
class Gaussian:
    """Independent Normals around the decoded mean.

    Attributes:
        variance: Per dimension, in squared units of x, where ``decode`` gives the mean; or None
            where it gives a pair (mean, log_variance) of its own.

    Raises:
        ValueError: The variance is not positive.
        TypeError: It is no number.
    """

    variance: float | None = 1.0

    def __post_init__(self) -> None:
        if self.variance is not None:
            number("variance", self.variance, 0, ends="()")

    def log_prob(self, x: Tensor, decoded: Any) -> Tensor:
        """As :meth:`Observation.log_prob`."""
        return self._normal(x, decoded).log_prob(x)  # type: ignore[no-any-return, no-untyped-call]

    def elements(self, x: Tensor, decoded: Any) -> Elements:
        """With a learned variance, what each expects: -log sd - 1/2 - 1/2 log 2 pi, in nats.

        With a stated one that is the same for every sample, and None.
        """
        return of_distribution(self._normal(x, decoded), x, is_shared=self.variance is not None)

    def _normal(self, x: Tensor, decoded: Any) -> Normal:
        if self.variance is None:
            mean, log_variance = _pair(x, decoded, "log_variance")
            sd = (0.5 * log_variance).exp()
        else:
            mean, sd = _like(x, decoded), torch.full_like(x, self.variance).sqrt()
        return Normal(mean, sd, validate_args=False)


@dataclass(frozen=True)
class Bernoulli:
    """Independent coins whose logits ``decode`` gives; x in [0, 1].

    Of values between 0 and 1 it is the expected log-probability of coins that show 1 so often.
    """

    def log_prob(self, x: Tensor, decoded: Any) -> Tensor:
        """As :meth:`Observation.log_prob`.

        Raises:
            ValueError: Values outside [0, 1].
        """
        checked_range(x, 0.0, 1.0, "a Bernoulli observation")
        return -F.binary_cross_entropy_with_logits(_like(x, decoded), x, reduction="none")

    def elements(self, x: Tensor, decoded: Any) -> Elements:
        """With minus the entropy of each coin, and the squared distance from its probability."""
        return bernoulli(self.log_prob(x, decoded), x, decoded)


@dataclass(frozen=True)
class DiscretizedLogistic:
    """The mass that a logistic density puts on each of equally spaced values.

    ``decode`` gives (mean, log_scale), in units of x; all mass beyond the ends is theirs.

    Attributes:
        bins: Number of values (256 for 8-bit images).
        low: The smallest value.
        high: The largest.

    Raises:
        ValueError: Fewer than 2 bins, or a range that is none.
        TypeError: No whole number of bins, or ends that are no numbers.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017)
        | https://arxiv.org/abs/1701.05517
    """

    bins: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        whole("bins", self.bins, 2)
        range_of("low and high", (self.low, self.high))

    def log_prob(self, x: Tensor, decoded: Any) -> Tensor:
        """As :meth:`Observation.log_prob`; the log-probability of a discrete value.

        Raises:
            ValueError: Values outside [low, high].
        """
        checked_range(x, self.low, self.high, f"{self.bins} bins")
        return self._log_mass(x, *_pair(x, decoded, "log_scale"))

    def elements(self, x: Tensor, decoded: Any) -> Elements:
        """With the expectation over all bins of each, and the quadratic pair of their masses.

        Both are computed bin by bin, so that no more than a few tensors of x's size are in memory.
        """
        log_prob = self.log_prob(x, decoded)
        mean, log_scale = (in_single(part) for part in decoded)
        moments = functools.cache(lambda: self._moments(x.to(mean), mean, log_scale))

        def quadratic() -> tuple[Tensor, Tensor]:
            return moments()[1], moments()[2]

        return Elements(log_prob, lambda: moments()[0], quadratic, axes=places(x))

    @property
    def _half(self) -> float:
        """Half of the width of a bin."""
        return 0.5 * (self.high - self.low) / (self.bins - 1)

    def _log_mass(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        half = self._half
        inverse_scale = (-log_scale).exp()
        above = (x - mean + half) * inverse_scale
        below = (x - mean - half) * inverse_scale
        # The difference of two sigmoids as a product: nothing cancels far from the mean.
        width = torch.log1p(-torch.exp(-2 * half * inverse_scale))
        mass = F.logsigmoid(above) + F.logsigmoid(-below) + width
        mass = torch.where(x < self.low + half, F.logsigmoid(above), mass)
        return torch.where(x > self.high - half, F.logsigmoid(-below), mass)

    def _moments(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[log p], the squared distance of the bin that came from the masses, and E of that."""
        came = ((x - self.low) / (2 * self._half)).round()
        inverse_scale = (-log_scale).exp().clamp(max=1e30)  # else an edge may be no number
        width = 2 * self._half * inverse_scale
        first = (self.low + self._half - mean) * inverse_scale
        log_width = torch.log1p(-torch.exp(-width))
        expected, distance, law = (torch.zeros_like(mean) for _ in range(3))
        log_beyond = first  # of the mass above a bin's lower edge; the first bin has none
        for i in range(self.bins):
            # An edge is that of two bins. The sums are those of `_log_mass`.
            above = first + i * width
            log_p = F.logsigmoid(above) if i < self.bins - 1 else log_beyond
            if 0 < i < self.bins - 1:
                log_p = log_p + log_beyond + log_width
            log_beyond = F.logsigmoid(-above)
            p = log_p.exp()
            expected.addcmul_(p, log_p)
            distance += ((came == i).to(p) - p).square_()
            law.addcmul_(p, 1 - p)
        return expected, distance, law


def _pair(x: Tensor, decoded: Any, second: str) -> tuple[Tensor, Tensor]:
    if not isinstance(decoded, list | tuple) or len(decoded) != 2:
        raise ValueError(f"Expected `decode` to give (mean, {second}), got {describe(decoded)}.")
    return _like(x, decoded[0]), _like(x, decoded[1])


def _like(x: Tensor, decoded: Any) -> Tensor:
    if not isinstance(decoded, Tensor) or decoded.shape != x.shape:
        raise ValueError(
            f"Expected `decode` to give the shape {tuple(x.shape)} of its input, got "
            f"{describe(decoded)}."
        )
    return decoded
