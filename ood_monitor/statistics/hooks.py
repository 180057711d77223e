"""Sums of squares of what layers are given, taken in hooks while a pass runs.

Of the input h of a layer, with channel c at position p, and of each sample,

    s_j = sum over positions p and channels c with c mod 32 = j of h_c(p)^2.

Nothing of the size of an activation is kept, or made: the sum over positions is one reduction.
"""

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_monitor.modules import part_of
from ood_monitor.statistics.layers import GROUPS, Layer, first_tensor_of

__all__ = ["Sums", "Taken", "grouped"]

#: Pieces of an input that are looked at one after the other, for the sake of memory, and numbers
#: that are so few that a piece may have them.
_PIECES, _FEW = 8, 1 << 15


@dataclass(frozen=True)
class Taken:
    """What was taken of one layer in one pass.

    Attributes:
        sums: (B, G), of each sample's rows if these lie together and are as many for each; or, if
            the rows are no multiple of the samples, (1, G), of all.
        rows: How many rows a sample has, or None if they are no multiple; of each call.
        positions: How many positions each of the B or 1 sums is over, of all calls.
    """

    sums: Tensor
    rows: tuple[int | None, ...]
    positions: int = 0

    def and_then(self, other: "Taken") -> "Taken":
        """With those of a later call of the same layer."""
        rows = self.rows + other.rows
        if len(self.sums) == len(other.sums):
            return Taken(self.sums + other.sums, rows, self.positions + other.positions)
        positions = sum(each.positions * len(each.sums) for each in (self, other))
        sums = self.sums.sum(0, keepdim=True) + other.sums.sum(0, keepdim=True)
        return Taken(sums, rows, positions)


class Sums:
    """Takes the sums of a pass.

    Args:
        module: The scoring view.
        layers: Its layers; None for one of which nothing is known yet.
        size: B.
        counted: (B, T) bool, which positions of a sequence count; None if all, or of no sequence.
        by_group: Whether channels are told apart by their group; else G is 1.

    Attributes:
        taken: By layer, of those that were called in this thread.
        unknown: Whether one was called of which nothing is known.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer | None],
        size: int,
        counted: Tensor | None = None,
        *,
        by_group: bool = True,
    ) -> None:
        self.taken: dict[str, Taken] = {}
        self.unknown = False
        self._module, self._layers, self._size = module, layers, size
        self._by_group = by_group
        self._length = None if counted is None else counted.shape[1]
        self._counted = None if counted is None or bool(counted.all()) else counted
        self._thread, self._is_on = threading.get_ident(), False

    @contextmanager
    def hooked(self) -> Iterator["Sums"]:
        """Put the hooks on, and take them off at the end."""
        handles = []
        try:
            for name, layer in self._layers.items():
                hook = functools.partial(self._take, name, layer)
                part = part_of(self._module, name)
                handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take what layers are given in the block."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def _take(
        self, name: str, layer: Layer | None, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if not self._is_on or threading.get_ident() != self._thread:
            return
        h = first_tensor_of(args, kwargs)
        self.unknown |= layer is None
        if h is None or layer is None:
            return
        if h.shape[layer.axis] != layer.channels:
            raise ValueError(
                f"Expected the input of {name!r} to have {layer.channels} channels in dimension "
                f"{layer.axis}, as when it was found, got shape {tuple(h.shape)}."
            )
        found = self._of(h.detach() if h.requires_grad else h, layer.axis)
        found = replace(found, positions=h.numel() // (layer.channels * len(found.sums)))
        known = self.taken.get(name)
        self.taken[name] = found if known is None else known.and_then(found)

    def _of(self, h: Tensor, axis: int) -> Taken:
        h = h.dequantize() if h.is_quantized else h
        if axis == -1 and self._length is not None and self._is_sequence(h):
            h = h.reshape(self._size, self._length, h.shape[-1])
            squares = _squares(h, 1) if self._counted is None else _of_counted(h, self._counted)
            return Taken(grouped(squares), (self._length,))
        if self._length is not None and self._size > 1:
            return Taken(grouped(_totals(h, axis)), (None,))
        k, rest = divmod(len(h), self._size)
        if rest or not k:
            totals = grouped(_totals(h, axis))
            return Taken(totals if self._by_group else totals.sum(1, keepdim=True), (None,))
        if k > 1:
            h, axis = h.view(self._size, k, *h.shape[1:]), 2 if axis == 1 else -1
        if not self._by_group:
            return Taken(_squares(h, *range(1, h.ndim))[:, None], (k,))
        positions = [d for d in range(1, h.ndim) if d != axis % h.ndim]
        return Taken(grouped(_squares(h, *positions)), (k,))

    def _is_sequence(self, h: Tensor) -> bool:
        """Whether h has a row of channels for each position: (B, T, C) or (B * T, C).

        Of a single sample whatever has so many rows is meant: (T, 1, C) too.
        """
        rows = self._size * (self._length or 0)
        if self._size == 1:
            return h.numel() == rows * h.shape[-1]
        return h.shape[:-1] in ((rows,), (self._size, self._length))


def _totals(h: Tensor, axis: int) -> Tensor:
    """Of all rows, (1, C)."""
    return _squares(h, *(d for d in range(h.ndim) if d != axis % h.ndim))[None]


def _squares(h: Tensor, *dimensions: int) -> Tensor:
    """Sums of squares over some dimensions, in single precision at least."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    if not dimensions:
        return h.to(dtype).square_() if h.dtype != dtype else h.square()
    if h.device.type == "cpu" and h.stride(dimensions[-1]) != 1:
        return _in_pieces(h, dimensions, dtype)
    norm: Tensor = torch.linalg.vector_norm(h, dim=dimensions, dtype=dtype)
    return norm.square_()


def _in_pieces(h: Tensor, dimensions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same where channels are neighbours: there the CPU's norm is six times as slow."""
    if h.numel() <= _FEW:
        return h.to(dtype).square().sum(dimensions)
    longest = max(dimensions, key=h.size)
    total = None
    for piece in h.chunk(min(_PIECES, h.numel() // _FEW), longest):
        found = piece.to(dtype).square().sum(dimensions)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def _of_counted(h: Tensor, counted: Tensor) -> Tensor:
    """Sums of squares over the positions that count, (B, C), of (B, T, C)."""
    zero, total = h.new_zeros(()), None
    pieces = min(_PIECES, h.shape[1])
    for piece, mask in zip(h.chunk(pieces, 1), counted.chunk(pieces, 1), strict=True):
        found = _squares(torch.where(mask.unsqueeze(-1), piece, zero), 1)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def grouped(squares: Tensor) -> Tensor:
    """Sums over the channels of a group, (B, C) to (B, min(32, C))."""
    channels = squares.shape[1]
    if channels <= GROUPS:
        return squares
    rest = -channels % GROUPS
    padded = F.pad(squares, (0, rest)) if rest else squares
    return padded.view(len(squares), -1, GROUPS).sum(1)
