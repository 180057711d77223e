"""Models with a tractable log-density: flows, distributions, your own callable."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, describe, first_tensor

__all__ = ["LogLikelihood"]


class LogLikelihood(Adapter):
    """log p(x), with its terms where the model shows them.

    Args:
        module: The model. Without ``function`` it must have ``log_prob_terms(x)``, a mapping of
            terms of shape (B,) whose sum is the log-likelihood, or ``log_prob(x)``, of shape (B,).
        function: ``function(module, x)`` in their place, returning either.
        inputs: Takes the sample x, shape (B, ...), from a batch as the loader yields it; by default
            the batch itself, or the first item of a list or tuple.
        bins: The number of equally spaced values in [0, 1] that x can take (256 for 8-bit images).
            If given, x is dequantised, (x (bins - 1) + u) / bins with uniform u, and the terms are
            those of the discrete x, a lower bound on log P(x) in expectation over u.
        seed: Seed of u, one draw shared by all samples.

    Raises:
        ValueError: The module has no log-density and no ``function`` was given, or bins < 2.

    References:
        A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2016),
        https://arxiv.org/abs/1511.01844, for dequantisation.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.NSF(features=2, transforms=1)
        >>> adapter = LogLikelihood(flow, lambda flow, x: flow().log_prob(x))
        >>> [(term, tuple(value.shape)) for term, value in adapter.log_likelihood(torch.rand(4, 2))]
        [('log_likelihood', (4,))]
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[[nn.Module, Tensor], Tensor | Mapping[str, Tensor]] | None = None,
        *,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        bins: int | None = None,
        seed: int = 0,
    ) -> None:
        if bins is not None and bins < 2:
            raise ValueError(f"Expected at least 2 bins, got {bins}.")
        self.module = module
        self._function = function or _density_of(module)
        self._inputs, self._bins, self._seed = inputs, bins, seed

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield the terms, all of one forward pass."""
        x, log_volume = self._dequantised(_floating(self._inputs(batch)))
        result = self._function(self.module, x)
        terms = dict(result) if isinstance(result, Mapping) else {"log_likelihood": result}
        # A change of variables: it belongs to the last term, the log-determinant if there is one.
        for last in list(terms)[-1:]:
            terms[last] = terms[last] + log_volume
        yield from terms.items()

    def _dequantised(self, x: Tensor) -> tuple[Tensor, float]:
        if self._bins is None:
            return x, 0.0
        if x.min() < 0 or x.max() > 1:
            raise ValueError(
                f"Expected values in [0, 1] for bins={self._bins}, got values from {x.min():.4g} "
                f"to {x.max():.4g}."
            )
        generator = torch.Generator().manual_seed(self._seed)
        u = torch.rand(x.shape[1:], generator=generator).to(x)
        return (x * (self._bins - 1) + u) / self._bins, -x[0].numel() * math.log(self._bins)


def _density_of(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor | Mapping[str, Tensor]]:
    for name in ("log_prob_terms", "log_prob"):
        if callable(getattr(module, name, None)):
            return lambda module, x, name=name: getattr(module, name)(x)  # type: ignore[misc]
    raise ValueError(
        f"Expected a module with `log_prob` or `log_prob_terms`, got {type(module).__name__}; pass "
        "`function=lambda module, x: ...` that returns the log-likelihood, shape (B,)."
    )


def _floating(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"Expected floating-point samples, got {describe(x)}.")
    return x
