"""Surprise by place: what came less what the model expected, at each pixel, token or column."""

import torch
from torch import Tensor

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    batch_size,
    checked_elements,
    pieces,
    usable_by,
)
from ood_monitor.adapters.elements import Elements, counted_of, resolved
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.modules import Passes, gradless, scored

__all__ = ["surprise_by_place"]


def surprise_by_place(
    adapter: Adapter, batch: Batch, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """Log p less its expectation at each place of B samples, without gradients.

    The model is left as it was.

    Args:
        adapter: The model.
        batch: B samples, on any device.
        chunk_size: Samples a pass, to bound memory.

    Returns:
        ``{term: (B, *places)}``, float64, in nats, of each term that comes by element: summed over
        what is at one place, as the channels of a pixel; zero where nothing counts, as in padding.
        Where no expectation is known, log p itself.

    Raises:
        ValueError: A term or its elements are of the wrong form.
    """
    batch = without_ignored(adapter, batch)
    size = chunk_size or max(1, batch_size(batch))

    def found(passes: Passes[Adapter]) -> dict[str, Tensor]:
        usable = usable_by(adapter.module, batch)
        chunks = [
            gradless(passes.holder, lambda own=own: _by_place(passes, own))  # type: ignore[misc]
            for own in pieces(usable, size)
        ]
        return {term: torch.cat([part[term] for part in chunks]) for term in chunks[0]}

    return scored(found, adapter, adapter.module)


def _by_place(passes: Passes[Adapter], batch: Batch) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    for term, value in checked_elements(passes.fresh(), batch):
        if isinstance(value, Elements) and not value.apart:
            with torch.no_grad():
                terms[term] = _surprise(value)
        del value
    return terms


def _surprise(value: Elements) -> Tensor:
    """Of shape (B, *places), on the CPU."""
    log_prob = value.log_prob.detach().double()
    if value.expected is not None:
        log_prob = log_prob - resolved(value.expected).detach().double()
    surprise = counted_of(value, log_prob)
    at_a_place = [d for d in range(1, surprise.ndim) if value.axes and d not in value.axes]
    return (surprise.sum(at_a_place) if at_a_place else surprise).cpu()
