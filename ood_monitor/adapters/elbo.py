r"""Variational autoencoders: the evidence lower bound as two terms.

.. math::
    \log p(x) \ge \mathbb E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, N(0, I)),

with a diagonal Gaussian q and K fixed draws :math:`z_k = \mu + \sigma \epsilon_k`. With the same
draws the importance-weighted bound is tighter,

.. math:: \log \frac1K \sum_k w_k, \quad w_k = p(x|z_k) \, N(z_k; 0, I) / q(z_k|x).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    checked_floating,
    describe,
    first_tensor,
    normal_draws,
)
from ood_monitor.adapters.observations import Gaussian, Observation

__all__ = ["ELBO"]


class ELBO(Adapter):
    """The evidence lower bound of a variational autoencoder.

    Args:
        module: Has ``encode(x)``, giving (mean, log_variance) or an object whose ``latent_dist``
            has ``mean`` and ``logvar`` (diffusers' ``AutoencoderKL``), and ``decode(z)``, giving
            what ``observation`` takes, itself or as ``.sample``.
        observation: p(x|z), one of :mod:`ood_monitor.adapters.observations` or your own.
        draws: K, of z for each sample.
        importance_weighted: Whether the terms add up to the importance-weighted bound, by a third
            term, which needs at least two draws.
        inputs: Takes x, shape (B, ...), from a batch as the loader yields it.
        seed: Seed of the draws, which all samples share.

    Raises:
        ValueError: The module lacks a method, no draw, or one to weight.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016)
        | https://arxiv.org/abs/1509.00519

    Example:
        >>> import torch
        >>> vae = nn.Module()
        >>> vae.encoder, vae.decode = nn.Linear(6, 4), nn.Linear(2, 6)
        >>> vae.encode = lambda x: vae.encoder(x).chunk(2, 1)
        >>> terms = ELBO(vae, observation=Gaussian(0.1)).log_likelihood(torch.zeros(3, 6))
        >>> [(term, tuple(values.shape)) for term, values in terms]
        [('reconstruction', (3,)), ('kl', (3,))]
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        observation: Observation | None = None,
        draws: int = 1,
        importance_weighted: bool = False,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        seed: int = 0,
    ) -> None:
        missing = [name for name in ("encode", "decode") if not hasattr(module, name)]
        if missing:
            raise ValueError(f"Expected {type(module).__name__} to have {missing}, got neither.")
        if draws < 1 + importance_weighted:
            needs = "2 draws to weight" if importance_weighted else "1 draw"
            raise ValueError(f"Expected at least {needs}, got {draws}.")
        self.module, self.seed = module, seed
        self._observation = Gaussian() if observation is None else observation
        self._draws, self._importance_weighted = draws, importance_weighted
        self._inputs = inputs

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield ``reconstruction``, log p(x|z), and ``kl``, the negative divergence.

        Both are means over the draws. With importance weights ``importance`` follows: what the
        weighted bound is above their sum.
        """
        x = checked_floating(self._inputs(batch))
        mean, log_variance = _posterior(self.module.encode(x))  # type: ignore[operator]
        eps = normal_draws(mean.shape[1:], self._draws, self.seed).to(mean)
        # A sample's draws are neighbours in a batch of B K: it still has its own rows.
        z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * eps
        log_likelihood = self._reconstruction(x, z)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        reconstruction, kl = log_likelihood.mean(1), -divergence.flatten(1).sum(1)
        yield "reconstruction", reconstruction
        yield "kl", kl
        if self._importance_weighted:
            # log N(z; 0, I) - log q(z|x), in which the normalisers cancel.
            prior = 0.5 * (eps.square() + log_variance[:, None] - z.square()).flatten(2).sum(2)
            # Weights beside the sum so far, since a difference of two bounds would be rounding.
            log_weights = log_likelihood + prior - (reconstruction + kl)[:, None]
            yield "importance", log_weights.logsumexp(1) - math.log(self._draws)

    def _reconstruction(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x|z) of each draw, shape (B, K)."""
        decoded = self.module.decode(z.flatten(0, 1))  # type: ignore[operator]
        copies = x.repeat_interleave(self._draws, 0) if self._draws > 1 else x
        log_prob = self._observation.log_prob(copies, getattr(decoded, "sample", decoded))
        return log_prob.flatten(1).sum(1).view(-1, self._draws)


def _posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    latent = getattr(encoded, "latent_dist", None)
    if latent is not None:
        return latent.mean, latent.logvar
    if not isinstance(encoded, list | tuple) or len(encoded) != 2:
        raise ValueError(
            f"Expected `encode` to give (mean, log_variance), got {describe(encoded)}."
        )
    return encoded[0], encoded[1]
