r"""Variational autoencoders: the evidence lower bound as two terms.

.. math::
    \log p(x) \ge \mathbb E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, N(0, I)),

with a diagonal Gaussian q and one fixed draw z = mean + std * eps.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, describe, first_tensor

__all__ = ["ELBO"]


class ELBO(Adapter):
    """The evidence lower bound of a variational autoencoder with a Gaussian likelihood.

    Args:
        module: Has ``encode(x)``, giving (mean, log_variance) or an object whose ``latent_dist``
            has ``mean`` and ``logvar`` (diffusers' ``AutoencoderKL``), and ``decode(z)``, giving a
            tensor like x or an object with ``.sample``.
        variance: Variance of p(x|z) per dimension, in squared units of x.
        inputs: Takes x, shape (B, ...), from a batch as the loader yields it.
        seed: Seed of eps, one draw shared by all samples.

    Raises:
        ValueError: The variance is not positive, or the module lacks a method.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        variance: float = 1.0,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        seed: int = 0,
    ) -> None:
        if not variance > 0:
            raise ValueError(f"Expected a positive variance, got {variance}.")
        missing = [name for name in ("encode", "decode") if not hasattr(module, name)]
        if missing:
            raise ValueError(f"Expected {type(module).__name__} to have {missing}, got neither.")
        self.module = module
        self._variance, self._inputs, self._seed = variance, inputs, seed

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield ``reconstruction``, log p(x|z), and ``kl``, the negative divergence."""
        x = self._inputs(batch)
        if not x.is_floating_point():
            raise ValueError(f"Expected floating-point samples, got {describe(x)}.")
        mean, log_variance = _posterior(self.module.encode(x))  # type: ignore[operator]
        generator = torch.Generator().manual_seed(self._seed)
        eps = torch.randn(mean.shape[1:], generator=generator).to(mean)
        decoded = self.module.decode(mean + (0.5 * log_variance).exp() * eps)  # type: ignore[operator]
        error = (_like(x, getattr(decoded, "sample", decoded)) - x).square() / self._variance
        log_density = -0.5 * (error + math.log(2 * math.pi * self._variance))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        yield "reconstruction", log_density.flatten(1).sum(1)
        yield "kl", -divergence.flatten(1).sum(1)


def _posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    latent = getattr(encoded, "latent_dist", None)
    if latent is not None:
        return latent.mean, latent.logvar
    if not isinstance(encoded, list | tuple) or len(encoded) != 2:
        raise ValueError(
            f"Expected `encode` to give (mean, log_variance), got {describe(encoded)}."
        )
    return encoded[0], encoded[1]


def _like(x: Tensor, decoded: Tensor) -> Tensor:
    if decoded.shape != x.shape:
        raise ValueError(
            f"Expected `decode` to give the shape {tuple(x.shape)} of its input, got "
            f"{tuple(decoded.shape)}."
        )
    return decoded
