r"""Variational autoencoders: the evidence lower bound as two terms.

.. math::
    \log p(x) \ge \mathbb E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, N(0, I)),

with a diagonal Gaussian q and K fixed draws :math:`z_k = \mu + \sigma \epsilon_k`. With the same
draws the importance-weighted bound is tighter,

.. math:: \log \frac1K \sum_k w_k, \quad w_k = p(x|z_k) \, N(z_k; 0, I) / q(z_k|x).
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    Condition,
    SampleKind,
    checked_floating,
    checked_sample,
    describe,
    first_tensor,
    images_in,
    keywords_of,
    no_condition,
    normal_draws,
    repeated,
    sample_or_image,
)
from ood_monitor.adapters.elements import Elements, averaged
from ood_monitor.adapters.observations import Gaussian, Observation
from ood_monitor.checks import flag, function, having, seed_of, whole

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
        condition: Gives further keywords of ``encode`` and ``decode`` from a batch: labels. A
            method that does not name one is not given it.
        seed: Seed of the draws, which all samples share.
        sample: What a sample is; by default ``"image"`` for grey or colour images (B, C, H, W) of
            at least 4 x 4 pixels.

    Raises:
        ValueError: The module lacks a method, no draw, or one to weight, or ``sample`` is no kind.
        TypeError: An option of another type.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016)
        | https://arxiv.org/abs/1509.00519

    Example:
        >>> import torch
        >>> vae = nn.Module()
        >>> vae.encoder, vae.decode = nn.Linear(6, 4), nn.Linear(2, 6)
        >>> vae.encode = lambda x: vae.encoder(x).chunk(2, 1)
        >>> terms = dict(ELBO(vae, observation=Gaussian(0.1)).log_likelihood(torch.zeros(3, 6)))
        >>> tuple(terms["reconstruction"].total().shape), tuple(terms["kl"].shape)
        ((3,), (3,))
    """

    is_one_pass = True

    def __init__(
        self,
        module: nn.Module,
        *,
        observation: Observation | None = None,
        draws: int = 1,
        importance_weighted: bool = False,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        condition: Condition = no_condition,
        seed: int = 0,
        sample: SampleKind | None = None,
    ) -> None:
        missing = [name for name in ("encode", "decode") if not hasattr(module, name)]
        if missing:
            raise ValueError(f"Expected {type(module).__name__} to have {missing}, got neither.")
        self._importance_weighted = flag("importance_weighted", importance_weighted)
        self._draws = whole("draws", draws, 1 + self._importance_weighted)
        self.module, self.seed = module, seed_of("seed", seed)
        self._observation = having("observation", observation or Gaussian(), "log_prob")
        self._inputs, self._condition = function("inputs", inputs), function("condition", condition)
        self.sample = checked_sample(sample)

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor | Elements]]:
        """Yield ``reconstruction``, log p(x|z), and ``kl``, the negative divergence.

        Both are means over the draws. The first is by element where the observation has
        ``elements``. With importance weights ``importance`` follows: what the weighted bound is
        above their sum.

        Raises:
            ValueError: Samples of whole numbers, what ``encode`` or ``decode`` gives is of another
                kind, or a keyword that neither names.
        """
        x = checked_floating(self._inputs(batch))
        mean, log_variance = _posterior(self._call("encode", x, batch))
        eps = normal_draws(mean.shape[1:], self._draws, self.seed).to(mean)
        # A sample's draws are neighbours in a batch of B K: it still has its own rows.
        z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * eps
        found = self._reconstruction(x, z, batch)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        reconstruction, kl = self._averaged(found), -divergence.flatten(1).sum(1)
        yield "reconstruction", reconstruction
        yield "kl", kl
        if self._importance_weighted:
            # log N(z; 0, I) - log q(z|x), in which the normalisers cancel.
            prior = 0.5 * (eps.square() + log_variance[:, None] - z.square()).flatten(2).sum(2)
            log_likelihood = _summed(found).view(-1, self._draws)
            # Weights beside the sum so far, since a difference of two bounds would be rounding.
            bound = log_likelihood.mean(1) + kl
            log_weights = log_likelihood + prior - bound[:, None]
            yield "importance", log_weights.logsumexp(1) - math.log(self._draws)

    def sample_of(self, batch: Batch) -> SampleKind | None:
        """As said, or an image where that is plain."""
        return sample_or_image(self.sample, self._inputs(batch))

    def images(self, batch: Batch) -> Tensor | None:
        """Images in the range of the observation, [0, 1] if it has none, mapped to [0, 1]."""
        ends = [getattr(self._observation, name, None) for name in ("low", "high")]
        low, high = (0.0, 1.0) if None in ends else map(float, ends)  # type: ignore[arg-type]
        return images_in(self._inputs(batch), self.sample_of(batch), (low, high))

    def _reconstruction(self, x: Tensor, z: Tensor, batch: Batch) -> Tensor | Elements:
        """Log p(x|z) of each draw, B K rows."""
        decoded = self._call("decode", z.flatten(0, 1), repeated(batch, self._draws))
        decoded = getattr(decoded, "sample", decoded)
        copies = x.repeat_interleave(self._draws, 0) if self._draws > 1 else x
        elements = getattr(self._observation, "elements", None)
        if elements is None:
            return self._observation.log_prob(copies, decoded).flatten(1).sum(1)
        return elements(copies, decoded)  # type: ignore[no-any-return]

    def _averaged(self, found: Tensor | Elements) -> Tensor | Elements:
        if isinstance(found, Elements):
            return averaged(found, self._draws)
        return found.view(-1, self._draws).mean(1)

    def _call(self, name: str, x: Tensor, batch: Batch) -> Any:
        """``encode`` or ``decode`` of x, with the keywords that it names."""
        condition = self._condition(batch)
        method: Callable[..., Any] = getattr(self.module, name)
        if not condition:
            return method(x)
        other = getattr(self.module, "decode" if name == "encode" else "encode")
        unknown = [key for key in condition if not (_names(method, key) or _names(other, key))]
        if unknown:
            raise ValueError(
                f"Expected keywords that `encode` or `decode` of {type(self.module).__name__} "
                f"names, got {unknown}: name them in the method that takes them."
            )
        return method(x, **{k: value for k, value in condition.items() if _names(method, k)})


def _summed(found: Tensor | Elements) -> Tensor:
    return found.total() if isinstance(found, Elements) else found


def _names(method: Callable[..., Any], keyword: str) -> bool:
    """Whether a method takes a keyword; one whose signature is not known does."""
    parameters = keywords_of(method)
    if parameters is None or keyword in parameters:
        return True
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    latent = getattr(encoded, "latent_dist", None)
    if latent is not None:
        return latent.mean, latent.logvar
    if not isinstance(encoded, list | tuple) or len(encoded) != 2:
        raise ValueError(
            f"Expected `encode` to give (mean, log_variance), got {describe(encoded)}."
        )
    return encoded[0], encoded[1]
