"""A call's arguments, taken apart: what belongs to each row, and what to the call.

Embeddings, labels and masks have a row a sample and go into a batch of tensors; position ids, flags
and scales are the call's. Containers are walked through: a list of the tokens of each row's prompt,
whose lengths differ, goes into the batch too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ood_monitor.adapters.base import map_tensors

__all__ = ["Rows", "alike", "filled", "same", "template"]

#: After the name of rows of different lengths: these.
_LENGTHS = ".lengths"


@dataclass(frozen=True)
class Rows:
    """Some rows of a call.

    Attributes:
        total: How many it has.
        first: The first that is meant.
        count: How many are.
        frames: Of samples that are videos, what they have; embeddings may have a row for each.
    """

    total: int
    first: int
    count: int
    frames: int = 1

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """These rows, copied."""
        return tensor.narrow(dim, self.first, self.count).detach().clone()

    def of_frames(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor that has one for each frame, copied: (count, frames, ...)."""
        return self.of(torch.unflatten(tensor, 0, (self.total, self.frames)))

    def among(self, values: Sequence[Any]) -> list[Any]:
        """Those of a list with one for each row."""
        return list(values[self.first : self.first + self.count])


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of the batch goes, with its rows along a dimension.

    Attributes:
        name: In the batch.
        dim: The dimension.
        by_frame: Whether the argument has a row for each frame of each sample.
    """

    name: str
    dim: int = 0
    by_frame: bool = False


@dataclass(frozen=True)
class _Ragged:
    """Where a tensor of the batch goes as a list with one for each row, of their own lengths."""

    name: str


@dataclass(frozen=True)
class _Numbers:
    """Where a tensor of the batch goes as a list of whole numbers."""

    name: str


@dataclass(frozen=True)
class _Repeated:
    """Where a list goes that has the same for each row."""

    value: Any


def template(value: Any, rows: Rows, name: str, found: dict[str, Tensor], like: Any = None) -> Any:
    """An argument with what belongs to rows put into ``found``, and slots in their places.

    Args:
        value: The argument.
        rows: Those that are taken.
        name: Of the argument.
        found: Takes tensors of so many rows, by name.
        like: The template of the same argument in another call, which tells what belongs to rows
            where lengths do not: a tensor of length one, or as long as there are rows by chance.
    """
    if isinstance(value, Tensor):
        return _of_tensor(value, rows, name, found, like)
    if isinstance(value, Mapping):
        of = like if isinstance(like, Mapping) else {}
        return {k: template(v, rows, f"{name}.{k}", found, of.get(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return _of_list(value, rows, name, found, like)
    return value


def _of_tensor(value: Tensor, rows: Rows, name: str, found: dict[str, Tensor], like: Any) -> Any:
    # Layers of embeddings may come before the rows, of three dimensions or more.
    dims = [dim for dim in range(min(2, value.ndim)) if dim == 0 or value.ndim > 2]
    if isinstance(like, Tensor):
        dims = []
    elif isinstance(like, _Slot) and like.dim < value.ndim:
        dims = [like.dim]
        if value.shape[like.dim] == 1:
            value = value.expand(*[rows.total if i == like.dim else -1 for i in range(value.ndim)])
    for dim in dims:
        if value.shape[dim] == rows.total:
            found[name] = rows.of(value, dim).movedim(dim, 0)
            return _Slot(name, dim)
    if not isinstance(like, Tensor) and _is_of_frames(value, rows):
        found[name] = rows.of_frames(value)
        return _Slot(name, by_frame=True)
    return value.detach().clone()


def _is_of_frames(value: Tensor, rows: Rows) -> bool:
    """Whether embeddings have a row for each frame; ids of positions have two dimensions."""
    return rows.frames > 1 and value.ndim > 2 and len(value) == rows.total * rows.frames


def _of_list(
    value: Sequence[Any], rows: Rows, name: str, found: dict[str, Tensor], like: Any
) -> Any:
    # A tuple's items are parts of one thing, such as cosines and sines.
    if isinstance(value, list) and len(value) == rows.total and not _are_parts(value, rows):
        return _of_rows(value, rows, name, found)
    of = like if isinstance(like, list | tuple) and len(like) == len(value) else [None] * len(value)
    items = enumerate(zip(value, of, strict=True))
    kind = list if isinstance(value, list) else tuple
    return kind(template(v, rows, f"{name}.{i}", found, own) for i, (v, own) in items)


def _of_rows(value: list[Any], rows: Rows, name: str, found: dict[str, Tensor]) -> Any:
    """Of a list with an item for each row."""
    own = rows.among(value)
    if all(isinstance(v, Tensor) and v.ndim for v in own):
        found[name] = pad_sequence([v.detach() for v in own], batch_first=True)
        found[name + _LENGTHS] = torch.tensor([len(v) for v in own], device=own[0].device)
        return _Ragged(name)
    if all(type(v) is int for v in own):
        found[name] = torch.tensor(own)
        return _Numbers(name)
    if all(same(v, own[0]) for v in own):
        return _Repeated(map_tensors(torch.clone, own[0]))
    raise ValueError(
        f"Expected {name!r} to be tensors, whole numbers or the same for each row, got a list "
        f"of {type(own[0]).__name__}."
    )


def _are_parts(values: Sequence[Any], rows: Rows) -> bool:
    """Whether items are not one for each row, but have rows each: as many adapters' features."""
    return all(isinstance(v, Tensor) and v.ndim > 2 and len(v) == rows.total for v in values)


def filled(given: Any, batch: Mapping[str, Tensor], like: Tensor) -> Any:
    """A template with its slots filled from a batch, on the device of ``like``, of its rows.

    What a pipeline computes in the denoiser's precision stays in it.
    """
    if isinstance(given, _Slot):
        own = batch[given.name]
        return own.flatten(0, 1) if given.by_frame else own.movedim(0, given.dim)
    if isinstance(given, _Ragged):
        lengths = batch[given.name + _LENGTHS].tolist()
        return [row[:length] for row, length in zip(batch[given.name], lengths, strict=True)]
    if isinstance(given, _Numbers):
        return batch[given.name].tolist()
    if isinstance(given, _Repeated):
        return [filled(given.value, batch, like) for _ in range(len(like))]
    if isinstance(given, Tensor):
        return given.to(like.device)
    if isinstance(given, Mapping):
        return {key: filled(value, batch, like) for key, value in given.items()}
    if isinstance(given, list | tuple):
        kind = list if isinstance(given, list) else tuple
        return kind(filled(value, batch, like) for value in given)
    return given


def alike(mine: Any, its: Any) -> bool:
    """Whether two templates are the same but for what goes with shapes: ids of positions, masks.

    A mask is left out where nothing is padded.
    """
    if mine is None or its is None:
        return mine is its or isinstance(its if mine is None else mine, _Slot)
    if isinstance(mine, Tensor) and isinstance(its, Tensor):
        return mine.shape != its.shape or same(mine, its)
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        return all(alike(mine.get(k), its.get(k)) for k in [*mine, *its])
    if isinstance(mine, list | tuple) and isinstance(its, list | tuple):
        return len(mine) == len(its) and all(map(alike, mine, its))
    return (isinstance(mine, _Repeated) and isinstance(its, _Repeated)) or same(mine, its)


def same(mine: Any, its: Any) -> bool:
    """Whether two templates are the same, tensors by their values."""
    if isinstance(mine, Tensor) and isinstance(its, Tensor):
        return mine.shape == its.shape and torch.equal(mine.cpu(), its.cpu())
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        # Some pipelines leave out what others give as None.
        return all(same(mine.get(k), its.get(k)) for k in [*mine, *its])
    if isinstance(mine, list | tuple) and isinstance(its, list | tuple):
        return len(mine) == len(its) and all(map(same, mine, its))
    if isinstance(mine, _Repeated) and isinstance(its, _Repeated):
        return same(mine.value, its.value)
    return type(mine) is type(its) and bool(mine == its)
