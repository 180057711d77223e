"""Where the samples lie after elements were moved, copied or combined one by one."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ood_monitor.gradients.call import Call, Found, in_order, listed, numbers

__all__ = [
    "beside",
    "created",
    "flipped",
    "gathered",
    "indexed",
    "joined",
    "padded",
    "pointwise",
    "repeated",
    "repeated_rows",
    "reshaped",
    "stacked",
    "taken_along",
    "viewed",
    "written",
]


def pointwise(call: Call) -> Found:
    """Where broadcasting puts it, which counts dimensions from the last."""
    shape = call.result.shape
    if call.func in (torch.where, Tensor.where) and len(call.args) + len(call.kwargs) == 1:
        return None  # the places of what is true, as many as there are
    places = {(len(shape) - tensor.ndim + d, tensor.shape[d]) for tensor, d in call.data}
    place, size = places.pop()
    return place if not places and place >= 0 and shape[place] == size else None


def created(call: Call) -> Found:
    """Constants, of so many rows as the tensor that gives their type."""
    x = call.args[0]
    same = call.result.ndim > 0 and len(call.result) == len(x)
    return 0 if call.dimension_of(x) == 0 and same else None


def reshaped(call: Call) -> Found:
    """Its rows stay rows where as many elements come before and after them as did."""
    x, shape = call.args[0], call.result.shape
    d = call.dimension_of(x)
    if d is None:  # a constant, put into the shape of data
        return call.common()
    before = math.prod(x.shape[:d])
    places = (i for i in range(len(shape)) if math.prod(shape[:i]) == before and shape[i] > 1)
    return next(places, None)


def viewed(call: Call) -> Found:
    """By the same view of the rows' numbers, which are the same along all other dimensions."""
    x, *rest = call.args
    d = call.dimension_of(x)
    if d is None:  # a constant, expanded to data
        return pointwise(call)
    rows = numbers([*x.shape], d, x.shape[d])
    views = call.func(rows, *rest, **call.kwargs)
    return [_undisturbed(view, x.shape[d]) for view in listed(views)]


def _undisturbed(view: Tensor, length: int) -> int | None:
    """The dimension along which a view of so many rows' numbers has them all."""
    along = [i for i in range(view.ndim) if view.shape[i] > 1 and view.stride(i)]
    if len(along) != 1 or view.storage_offset() or view.stride(along[0]) != 1:
        return None
    return along[0] if view.shape[along[0]] == length else None


def repeated(call: Call) -> Found:
    """Copies along other dimensions. Along its own they come after all the samples."""
    x, counts = call.args[0], call.integers()
    d = call.only(x)
    if d is None:
        return None
    from_last = x.ndim - d
    copies = counts[-from_last] if from_last <= len(counts) else 1
    return call.result.ndim - from_last if copies == 1 else None


def repeated_rows(call: Call) -> Found:
    """Copies of a row beside it: as many of each sample's, or the rows are not in equal parts."""
    x, counts, along = call.args[0], call.argument(1, "repeats"), call.argument(2, "dim")
    d = call.dimension_of(x)
    if d is None or counts is None or (along is None and x.ndim > 1):
        return None
    if along is not None and along % x.ndim != d:
        return d
    counts = counts.cpu() if isinstance(counts, Tensor) else counts
    rows = numbers([x.shape[d]], 0, call.n).repeat_interleave(counts)
    return d if in_order(rows, 0, call.n) else None


def padded(call: Call) -> Found:
    """With nothing before or after the samples."""
    x, sides = call.args[0], call.argument(1, "pad")
    d = call.only(x)
    if d is None:
        return None
    own = list(sides)[2 * (x.ndim - 1 - d) : 2 * (x.ndim - d)]
    return None if any(own) else d


def flipped(call: Call) -> Found:
    """In reverse along other dimensions."""
    x = call.args[0]
    d = call.only(x)
    return None if d in {i % x.ndim for i in call.integers()} else d


def joined(call: Call) -> Found:
    """Of tensors joined along another dimension."""
    d, along = call.common(), call.argument(1, "dim", "axis", default=0)
    return None if along % call.result.ndim == d else d


def stacked(call: Call) -> Found:
    """Along a new dimension, before its own or after it."""
    d, along = call.common(), call.argument(1, "dim", "axis", default=0)
    return None if d is None else d + (along % call.result.ndim <= d)


def beside(call: Call) -> Found:
    """`column_stack`, and `hstack` of more than one dimension."""
    rows = call.func is torch.hstack and any(tensor.ndim == 1 for tensor, _ in call.data)
    return None if rows or any(d for _, d in call.data) else 0


# By an index


def gathered(call: Call) -> Found:
    """Elements taken or put along another dimension, by an index of each sample or of all."""
    x, along, index = call.args[0], call.argument(1, "dim"), call.argument(2, "index")
    d = call.common()
    if d is None or along % call.result.ndim == d:
        return None
    if index.ndim != x.ndim or call.result.ndim != x.ndim:
        return d if index.ndim <= 1 and call.dimension_of(index) is None else None
    return d if index.shape[d] == x.shape[d] else None


def taken_along(call: Call) -> Found:
    """Elements taken along another dimension."""
    index, along = call.argument(1, "indices"), call.argument(2, "dim")
    d = call.common()
    if d is None or along is None or along % call.result.ndim == d:
        return None
    return d if index.shape[d] == call.args[0].shape[d] else None


def indexed(call: Call) -> Found:
    """Of ``x[index]``: by the numbers of the samples that it picks."""
    x, index = call.args
    d = call.dimension_of(x)
    if d is None:
        return None
    entries = index if isinstance(index, tuple) else (index,)
    if _MOVING.issuperset(map(type, entries)):
        place = _place_in_view(entries, x.ndim, d)
        if place is not None:
            return place
    return _place(_picked(x.shape, d, index, call.n), call.n)


#: What an index has that gives a view.
_MOVING = frozenset({int, slice, type(None), type(Ellipsis)})


def _place_in_view(entries: tuple[Any, ...], ndim: int, d: int) -> int | None:
    """Where a dimension is in the view that integers and slices give; None if it is not whole."""
    hidden = ndim - sum(entry is not None and entry is not Ellipsis for entry in entries)
    at = place = 0
    for entry in (*entries, Ellipsis):
        if entry is None:
            place += 1
        elif entry is Ellipsis:
            if d < at + hidden:
                return place + d - at
            at, place, hidden = at + hidden, place + hidden, 0
        elif at == d:
            return place if entry == slice(None) else None
        else:
            at, place = at + 1, place + isinstance(entry, slice)
    return None


def written(call: Call) -> Found:
    """Of ``x[index] = value``: a sample's values must come to lie where x has that sample.

    Of a constant x the dimension of the samples is the first that makes it so.
    """
    x, index, value = call.args
    own, put = call.dimension_of(x), call.dimension_of(value)
    if own is not None and put is None:
        return own
    divided = [i for i, size in enumerate(x.shape) if size > 1 and size % call.n == 0]
    for d in divided if own is None else [own]:
        picked = _picked(x.shape, d, index, call.n)
        place = _place(picked, call.n)
        if place is not None and put in (None, place - picked.ndim + getattr(value, "ndim", 0)):
            return d
    return None


def _picked(shape: Sequence[int], d: int, index: Any, n: int) -> Tensor:
    """Whose elements an index picks: the samples' numbers, with size 1 where it takes all."""
    entries = _entries(index, len(shape))
    sizes, position = list(shape), 0
    for entry in entries:
        if isinstance(entry, slice) and entry == slice(None) and position != d:
            sizes[position] = 1
        position += _taken(entry)
    return numbers(sizes, d, n)[tuple(entries)]


def _entries(index: Any, ndim: int) -> list[Any]:
    """One entry for each dimension (or several), on the CPU, without an ellipsis."""
    # A list with a slice in it is taken for a tuple by PyTorch.
    several = isinstance(index, list) and any(isinstance(entry, slice) for entry in index)
    given = list(index) if isinstance(index, tuple) or several else [index]
    entries = [entry.cpu() if isinstance(entry, Tensor) else entry for entry in given]
    rest = [slice(None)] * (ndim - sum(map(_taken, entries)))
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    at = dots[0] if dots else len(entries)
    return [*entries[:at], *rest, *entries[at + 1 :]]


def _taken(entry: Any) -> int:
    """How many dimensions an entry of an index stands for."""
    if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8):
        return entry.ndim
    return 0 if entry is None or entry is Ellipsis or isinstance(entry, bool) else 1


def _place(picked: Tensor, n: int) -> int | None:
    return next((i for i in range(picked.ndim) if in_order(picked, i, n)), None)
