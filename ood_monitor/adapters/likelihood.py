"""Models with a tractable log-density: flows, distributions, your own callable."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    Condition,
    SampleKind,
    checked_floating,
    checked_range,
    checked_sample,
    first_tensor,
    images_in,
    no_condition,
    sample_or_image,
    term_values,
    uniform_draw,
)
from ood_monitor.adapters.elements import Elements, shifted
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.adapters.flows import Density, density_of
from ood_monitor.adapters.laws import of_distribution
from ood_monitor.checks import function as checked_function
from ood_monitor.checks import range_of, seed_of, whole

__all__ = ["LogLikelihood"]


class LogLikelihood(Adapter):
    """log p(x), with its terms where the model shows them.

    Args:
        module: The model. Without ``function`` it must have ``log_prob_terms(x)``, a mapping of
            terms of shape (B,) whose sum is the log-likelihood, or ``log_prob(x)``, of shape (B,),
            or be a flow of normflows or zuko, whose terms are known.
        function: ``function(module, x, **condition)`` in their place, returning either. It may
            also give :class:`~ood_monitor.Elements` in the place of (B,) values, or a
            ``torch.distributions`` object, whose log-probabilities of x and entropies are taken.
        inputs: Takes the sample x, shape (B, ...), from a batch as the loader yields it; by default
            the batch itself, or the first item of a list or tuple.
        condition: Gives the further keywords from a batch: normflows' label ``y``, zuko's context
            ``c``.
        bins: The number of equally spaced values that x can take (256 for 8-bit images). If given,
            x is dequantised, low + (high - low) (k + u) / bins for its k-th value with uniform u,
            and the terms are those of the discrete x, a lower bound on log P(x) in expectation
            over u.
        value_range: The smallest and the largest value, (low, high).
        seed: Seed of u, one draw shared by all samples.
        sample: What a sample is; by default ``"image"`` for grey or colour images (B, C, H, W) of
            at least 4 x 4 pixels. Say ``"row"`` for rows of a table, (B, D).

    Raises:
        ValueError: The module has no log-density and no ``function`` was given, bins < 2, a range
            that is none, or ``sample`` is no kind.
        TypeError: An option of another type.

    References:
        A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2016),
        https://arxiv.org/abs/1511.01844, for dequantisation.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.NSF(features=2, transforms=1)
        >>> terms = LogLikelihood(flow, sample="row").log_likelihood(torch.rand(4, 2))
        >>> [(term, tuple(columns.log_prob.shape)) for term, columns in terms]
        [('latent', (4, 2)), ('log_det', (4, 2))]
    """

    is_one_pass = True

    def __init__(
        self,
        module: nn.Module,
        function: Density | None = None,
        *,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        condition: Condition = no_condition,
        bins: int | None = None,
        value_range: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        sample: SampleKind | None = None,
    ) -> None:
        self._bins = None if bins is None else whole("bins", bins, 2)
        self._range = range_of("value_range", value_range)
        self.module, self.seed = module, seed_of("seed", seed)
        given = None if function is None else checked_function("function", function)
        self._function: Density = given or density_of(module)
        self._inputs = checked_function("inputs", inputs)
        self._condition = checked_function("condition", condition)
        self.sample = checked_sample(sample)

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor | Elements]]:
        """Yield the terms, all of one forward pass, by element where their laws are known."""
        x, log_volume = self._dequantised(checked_floating(self._inputs(batch)))
        result = self._function(self.module, x, **self._condition(batch))
        found = of_distribution(result, x) if isinstance(result, Distribution) else result
        terms = dict(found) if isinstance(found, Mapping) else {"log_likelihood": found}
        # A change of variables: it belongs to the last term, the log-determinant if there is one.
        for last in list(terms)[-1:]:
            terms[last] = _with(terms[last], log_volume)
        yield from terms.items()

    def sample_of(self, batch: Batch) -> SampleKind | None:
        """As said, or an image where that is plain."""
        return sample_or_image(self.sample, self._inputs(batch))

    def images(self, batch: Batch) -> Tensor | None:
        """Images of ``value_range``, mapped to [0, 1]."""
        return images_in(self._inputs(batch), self.sample_of(batch), self._range)

    def bits_per_dimension(self, batch: Batch) -> Tensor:
        """-log2 p(x) / D of each sample, shape (B,), of D dimensions; without gradients.

        As scores, of the model in eval mode; it and the batch are left as they were.
        """
        batch = without_ignored(self, batch)
        dimensions = self._inputs(batch)[0].numel()
        total = torch.stack(list(term_values(self, batch).values())).sum(0)
        return -total / (dimensions * math.log(2))

    def _dequantised(self, x: Tensor) -> tuple[Tensor, float]:
        if self._bins is None:
            return x, 0.0
        low, high = self._range
        checked_range(x, low, high, f"bins={self._bins}")
        u = uniform_draw(x.shape[1:], self.seed).to(x)
        unit = ((x - low) / (high - low) * (self._bins - 1) + u) / self._bins
        log_volume = x[0].numel() * math.log((high - low) / self._bins)
        return low + (high - low) * unit, log_volume


def _with(term: Tensor | Elements, constant: float) -> Tensor | Elements:
    return shifted(term, constant) if isinstance(term, Elements) else term + constant
