"""Whose a row of a layer's input is, found on first use: by samples that are measured alone.

A layer has a row, or k of them, for each sample as a rule. A row is not its sample's where time
comes first, where a batch is put in another order, and where experts take some of the rows. So
when an adapter is first used, and whenever its layers have other numbers of rows, two samples of
the batch are measured alone: everything that runs then is theirs. Where they have other sums than
the batch gave them, all samples are measured alone.

Two samples whose sums are the same say nothing: that is no verdict, and the 1st, 2nd, 4th, 8th ...
of such uses compares again.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter
from ood_monitor.modules import precision_of
from ood_monitor.statistics.hooks import Taken

__all__ = ["Layout", "Single", "close", "layout_of", "precision_of_weights"]

_log = logging.getLogger(__name__)

#: Relative difference up to which a sample's sums alone and in a batch are the same.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_IN_HALF = 0.1
_TOLERANCE_OF_TERMS = 1e-4


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch are its samples'.

    Attributes:
        alone: Whether samples must be measured one by one.
        shared: Layers whose input is the same for all samples, and there once (an embedding of
            positions): all of it is each sample's.
    """

    alone: bool = False
    shared: frozenset[str] = frozenset()

    def sums(self, name: str, taken: Taken, size: int) -> Tensor:
        """Of each sample, (B, G)."""
        if name in self.shared:
            return taken.sums.sum(0, keepdim=True).expand(size, -1)
        return taken.sums

    def positions(self, name: str, taken: Taken) -> int:
        """Over how many positions the sums of a sample are."""
        return taken.positions * (len(taken.sums) if name in self.shared else 1)


@dataclass(frozen=True)
class Single:
    """What a pass gave of a batch, or of one sample.

    Attributes:
        taken: By layer.
        terms: (B,) of each.
    """

    taken: Mapping[str, Taken]
    terms: Mapping[str, Tensor]


@dataclass
class _Known:
    """Layouts of one adapter by the numbers of its layers' rows, and how often each was asked."""

    settled: dict[int, Layout] = field(default_factory=dict)
    open: dict[int, tuple[Layout, int]] = field(default_factory=dict)


#: By adapter.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def layout_of(adapter: Adapter, size: int, batch: Single, alone: Callable[[int], Single]) -> Layout:
    """How the rows of a batch of at least two samples lie.

    Args:
        adapter: What is scored; layouts are kept for as long as it lives.
        size: B.
        batch: What the pass over the batch gave.
        alone: Measures one sample, by its index.
    """
    if adapter not in _known:
        _known[adapter] = _Known()
    known: _Known = _known[adapter]
    key = hash(tuple((name, taken.rows) for name, taken in batch.taken.items()))
    if key in known.settled:
        return known.settled[key]
    before, asked = known.open.get(key, (Layout(), 0))
    asked += 1
    if asked & (asked - 1):
        known.open[key] = before, asked
        return before
    layout, is_settled = _compared(adapter, size, batch, alone)
    if is_settled:
        known.settled[key] = layout
        known.open.pop(key, None)
        _tell(adapter, layout)
    else:
        known.open[key] = layout, asked
    return layout


def _compared(
    adapter: Adapter, size: int, batch: Single, alone: Callable[[int], Single]
) -> tuple[Layout, bool]:
    """What two samples say, and whether it holds for others."""
    ends = _ends(size, batch)
    if not ends:
        return Layout(), False
    singles = {index: alone(index) for index in ends}
    dtype = precision_of_weights(adapter)
    if not all(_same_terms(batch, single, index, dtype) for index, single in singles.items()):
        _check_repeats(adapter, singles[ends[0]], alone(ends[0]), dtype)
        return Layout(alone=True), True
    names = {*batch.taken, *(name for single in singles.values() for name in single.taken)}
    shared, is_settled = set(), len(ends) > 1
    for name in names:
        own = {i: single.taken[name] for i, single in singles.items() if name in single.taken}
        if len(own) < len(ends) or name not in batch.taken:
            return Layout(alone=True), True  # an expert, that is called for some
        totals, taken = {i: t.sums.sum(0) for i, t in own.items()}, batch.taken[name]
        if close(totals[ends[0]], totals[ends[-1]], dtype):
            is_settled = False
        if len(taken.sums) == size and all(
            close(total, taken.sums[i], dtype) for i, total in totals.items()
        ):
            continue
        if not all(close(total, taken.sums.sum(0), dtype) for total in totals.values()):
            return Layout(alone=True), True
        shared.add(name)
    return Layout(shared=frozenset(shared)), is_settled


def _check_repeats(adapter: Adapter, once: Single, again: Single, dtype: torch.dtype) -> None:
    """That a sample has the same terms each time: else no measure of one alone means anything."""
    if not _same_terms(once, again, 0, dtype):
        raise ValueError(
            f"Expected {type(adapter).__name__} to give a sample the same terms each time, got "
            "others in a second pass: what it draws must come from a generator of its own."
        )


def _ends(size: int, batch: Single) -> list[int]:
    """The first and the last sample of those whose terms are all finite."""
    finite = torch.ones(size, dtype=torch.bool, device="cpu")
    for value in batch.terms.values():
        finite &= value.isfinite().cpu()
    indices: list[int] = finite.nonzero().flatten().tolist()
    return sorted({indices[0], indices[-1]}) if indices else []


def precision_of_weights(adapter: Adapter) -> torch.dtype:
    """The coarsest of an adapter's weights."""
    dtypes = {precision_of(p) for p in adapter.module.parameters() if p.is_floating_point()}
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def _same_terms(batch: Single, single: Single, index: int, dtype: torch.dtype) -> bool:
    rtol = max(_TOLERANCE_OF_TERMS, 8 * torch.finfo(dtype).eps)
    for term, values in batch.terms.items():
        # Beside the largest, since one near zero holds rounding.
        atol = rtol * float(values[values.isfinite()].abs().max())
        if not torch.isclose(single.terms[term][0], values[index], rtol=rtol, atol=atol):
            return False
    return True


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether sums are the same but for the rounding of a type."""
    rtol = _TOLERANCES.get(dtype, _TOLERANCE_IN_HALF)
    a, b = a.double(), b.double()
    # Beside the largest group, since one that is dead holds rounding.
    largest = torch.where(b.isfinite(), b, 0).max()
    return torch.allclose(a, b, rtol=rtol, atol=rtol * float(largest), equal_nan=True)


def _tell(adapter: Adapter, layout: Layout) -> None:
    if layout.alone:
        _log.info(
            "Samples of %s are measured one by one: rows of its layers' inputs are not its "
            "samples', or a sample's value depends on its batch.",
            type(adapter.module).__name__,
        )
