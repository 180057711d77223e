"""The fast path: one recorded forward pass, and one plain backward pass per term.

Further ones follow where the owners of rows have to be found; and once a shape a second recording,
where it is open whether rows that are as many as the samples are theirs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, OnePass, checked_terms, tensors_in
from ood_monitor.gradients.factors import Granularity, count_of, full_precision
from ood_monitor.gradients.recorder import Recorder
from ood_monitor.modules import Passes

__all__ = ["Recorded", "recorded_norms", "recorded_rows", "recorded_terms"]


@dataclass(frozen=True)
class Recorded:
    """What the fast path gives of one batch.

    Attributes:
        log_likelihood: ``{term: (B,)}``, in nats.
        norms: ``{"term/parameter": (n,)}``, or ``(n, rows)``; zero where no gradient came.
        left_over: Parameters that only the loop gets right, and why.
        found_owners: Parameters with rows whose owners were found in weighted passes; others of
            the same parameter may be left over.
        last_of_graph: Terms after which no other needs the graph of their forward pass.
        constant: Terms without any graph, which are values alone.
    """

    log_likelihood: dict[str, Tensor]
    norms: dict[str, Tensor]
    left_over: dict[str, str]
    found_owners: set[str]
    last_of_graph: frozenset[str]
    constant: frozenset[str] = frozenset()


def recorded_norms(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
    last_of_graph: frozenset[str] = frozenset(),
    *,
    finds_owners: bool = True,
) -> Recorded:
    """Terms and squared gradient norms.

    Args:
        passes: The model.
        batch: B = n * group samples.
        n: Number of groups of consecutive samples.
        selected: Which parameters, by name.
        by: The granularity of each.
        last_of_graph: As an earlier pass found it: their backward pass frees the graph as it goes,
            which saves the memory that the gradients then take.
        finds_owners: Whether further backward passes may find whose rows are.
    """
    key = n, tuple(tuple(tensor.shape) for tensor in tensors_in(batch))
    if passes.holder not in _shapes:
        _shapes[passes.holder] = _Seen()
    seen: _Seen = _shapes[passes.holder]
    made = partial(
        _recorded,
        *(passes, batch, n, selected, by, last_of_graph),
        confirms=key not in seen.confirmed,
        finds_owners=finds_owners,
    )
    found, guessed = made(by_size=seen.by_size.get(key, True))
    if guessed and found.left_over and key not in seen.by_size:
        other, _ = made(by_size=False)
        seen.by_size[key] = len(other.left_over) >= len(found.left_over)
        found = found if seen.by_size[key] else other
    if finds_owners and len(seen.confirmed) < _MOST_SHAPES:
        seen.confirmed.add(key)
    return found


@dataclass
class _Seen:
    """What passes of an adapter over batches of some shapes have shown.

    Attributes:
        confirmed: Those of which owners were found twice.
        by_size: Whether rows are the samples' where they are as many as the batch has, of those of
            which this was tried both ways: it may be by chance.
    """

    confirmed: set[Any] = field(default_factory=set)
    by_size: dict[Any, bool] = field(default_factory=dict)


_shapes: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Shapes remembered of an adapter; further ones are confirmed each time.
_MOST_SHAPES = 1000


def _recorded(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
    last_of_graph: frozenset[str],
    **options: bool,
) -> tuple[Recorded, bool]:
    """What a recorder of these options gives, and whether it took rows for those of samples."""
    adapter = passes.fresh()
    recorder = Recorder(adapter.module, selected, tensors_in(batch), n, by, **options)
    values: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    constant: set[str] = set()
    for term, value in recorded_terms(recorder, checked_terms(adapter, batch)):
        values[term] = value.detach()
        constant |= set() if value.requires_grad else {term}
        found = _squared_norms(recorder, value, n, by, keep_graph=term not in last_of_graph)
        norms |= {f"{term}/{name}": squared for name, squared in found.items()}
        del value  # frees the term's graph before the next forward pass
    last = frozenset(term for i, term in enumerate(values) if i not in recorder.shared)
    left, owned = recorder.left_over, recorder.found_owners
    return Recorded(values, norms, left, owned, last, frozenset(constant)), recorder.guessed


def recorded_rows(
    module: nn.Module,
    one: OnePass,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> Recorded:
    """As :func:`recorded_norms`, of all terms by one pass.

    Raises:
        ValueError: The values are not one a row.
    """
    count = len(one.terms)
    recorder = Recorder(module, selected, tensors_in(one.batch), count * n, by)
    with recorder:
        value = one.values(one.batch)
    if value.ndim != 1 or len(value) % count:
        raise ValueError(f"Expected a value a row, got shape {tuple(value.shape)}.")
    found = _squared_norms(recorder, value, count * n, by, keep_graph=False)
    norms = {
        f"{term}/{name}": part
        for name, squared in found.items()
        for term, part in zip(one.terms, squared.chunk(count), strict=True)
    }
    values = dict(zip(one.terms, value.detach().chunk(count), strict=True))
    return Recorded(values, norms, recorder.left_over, recorder.found_owners, frozenset())


def _squared_norms(
    recorder: Recorder,
    value: Tensor,
    n: int,
    by: Callable[[str], Granularity],
    *,
    keep_graph: bool,
) -> dict[str, Tensor]:
    """By parameter, with zeros where no gradient came."""
    found = recorder.squared_norms(value, keep_graph=keep_graph)
    norms = {}
    for name, leaf in recorder.leaves.items():
        zeros = full_precision(leaf.new_zeros(n, *count_of(by(name), leaf.shape)))
        norms[name] = found.get(name, zeros)
    return norms


def recorded_terms(
    recorder: Recorder, terms: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The terms, with the recorder on only while the adapter makes them."""
    while True:
        with recorder:
            item = next(terms, None)
        if item is None:
            return
        yield item
        del item
