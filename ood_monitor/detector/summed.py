"""Gradient norms of a likelihood as a whole, where its terms come of one forward pass.

The paper's norms are those of the whole likelihood. Norms of each term alone take a backward pass
each, and detect no better where the terms' values stand beside them: .943 and .945, the mean of the
30 pairs of `docs/evidence.md`. Terms that take passes of their own, as noise levels do, stay apart.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, checked_terms
from ood_monitor.gradients import GradientNorms, Granularity, terms_and_norms
from ood_monitor.gradients.layers import Layers

__all__ = ["Summed", "norms_of"]


class Summed(Adapter):
    """An adapter's terms as their sum, then their values alone, which have no gradient.

    Args:
        adapter: Whose terms come of one forward pass.

    Attributes:
        of: The adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.of = adapter

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The adapter's own."""
        return self.of.module

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield the whole, then each term's values; a single term is the whole."""
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term, value in checked_terms(self.of, batch):
            total = value if total is None else total + value
            values[term] = value.detach()
        assert total is not None  # `checked_terms` refuses to give none
        if len(values) == 1:
            yield next(iter(values)), total
            return
        yield whole_of(values), total
        yield from values.items()


def whole_of(terms: Iterable[str]) -> str:
    """What the sum of several terms is called."""
    return "total" if "log_likelihood" in terms else "log_likelihood"


def norms_of(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers,
    granularity: Granularity | Mapping[str, Granularity] = "tensor",
    chunk_size: int | None,
) -> GradientNorms:
    """Terms, and squared norms of their gradients, or of their sum's if they are summed.

    Raises:
        ValueError: As :func:`~ood_monitor.gradient_norms`.
    """
    found = terms_and_norms(
        adapter, batch, layers=layers, granularity=granularity, chunk_size=chunk_size
    )
    if not isinstance(adapter, Summed) or len(found.log_likelihood) == 1:
        return found
    whole, *terms = found.log_likelihood
    return GradientNorms(
        {term: found.log_likelihood[term] for term in terms},
        {key: norms for key, norms in found.norms.items() if key.startswith(f"{whole}/")},
    )
