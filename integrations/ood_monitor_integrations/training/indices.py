"""Where in its dataset a sample of a batch stands, also among several processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from ood_monitor_integrations.training.collectives import World

__all__ = ["Indices", "Places", "Positions", "flattened", "numbered"]

#: (N,), int64.
Indices: TypeAlias = NDArray[np.int64]

#: A place from here on is no index: it is `_UNKNOWN + (turn << _ROWS) + row of the batch`, which no
#: two samples of a dataloader share.
_UNKNOWN, _ROWS = 1 << 62, 32


class Places(Protocol):
    """Where the samples of each batch that this process loads stand, and which of them count."""

    def of(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Places (B,)."""

    def counted(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Rows (B',) without those that only fill a batch up."""

    def loaded(self, batch_idx: int, dataloader_idx: int) -> int | None:
        """B of a batch that this process loads; None where its sampler does not tell it."""

    def batch_size(self, dataloader_idx: int) -> int | None:
        """B as one process would load it, None where batches have several sizes."""


class Positions:
    """The places of the samples of a stage, by which those of several processes are put in order.

    The place is the dataset's index where the sampler tells it: one that can be asked without
    drawing anew, and in `predict` any batch sampler, of which Lightning keeps what it gave. Of
    several processes a `DistributedSampler` alone tells it, since datasets without one may be other
    ones. All other places are distinct by construction, in the order of the batches, for which the
    processes take turns; :func:`numbered` makes positions of them.

    Args:
        loaders: The stage's dataloaders, as the Trainer has them.
        world: The processes.
    """

    def __init__(self, loaders: object, world: World) -> None:
        self._loaders = flattened(loaders)
        self._world = world
        self._loads: dict[int, _Load | None] = {}

    def of(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Places (B,) of the samples of the `batch_idx`-th batch that this process loads."""
        loader = self._loader(dataloader_idx)
        if self._is_told(loader):
            # Lightning wraps the batch sampler of `predict` for its prediction writers.
            seen = getattr(loader.batch_sampler, "seen_batch_indices", [])
            batch = _integers(seen[batch_idx]) if batch_idx < len(seen) else None
            if batch is None and (load := self._load(dataloader_idx)) is not None:
                batch = load.batch(batch_idx)
            if batch is not None and len(batch) == count:
                return batch
        turn = batch_idx * self._world.size + self._world.rank
        first = _UNKNOWN + (turn << _ROWS)
        return np.arange(first, first + count, dtype=np.int64)

    def counted(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Rows (B',) of that batch without those that only pad a `DistributedSampler`."""
        load = self._load(dataloader_idx) if self._is_told(self._loader(dataloader_idx)) else None
        rows = np.arange(count, dtype=np.int64)
        if load is None or len(load.batch(batch_idx)) != count:
            return rows
        counted: Indices = rows[load.starts[batch_idx] + rows < load.unpadded]
        return counted

    def loaded(self, batch_idx: int, dataloader_idx: int) -> int | None:
        """B of the `batch_idx`-th batch that this process loads; None where nobody knows."""
        load = self._load(dataloader_idx) if self._is_told(self._loader(dataloader_idx)) else None
        return None if load is None else len(load.batch(batch_idx))

    def batch_size(self, dataloader_idx: int) -> int | None:
        """B of a dataloader, None if it has none or batches of several sizes."""
        loader = self._loader(dataloader_idx)
        # Lightning gives the loader of `predict` a batch sampler, which leaves it no size.
        holders = loader, getattr(loader, "batch_sampler", None)
        sizes = (getattr(holder, "batch_size", None) for holder in holders)
        return next((size for size in sizes if isinstance(size, int)), None)

    def _is_told(self, loader: Any) -> bool:
        """Whether batches come as the sampler gives them, out of one dataset for all processes."""
        # Who iterates in a way of its own need not ask the sampler.
        if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
            return False
        if loader.num_workers and not getattr(loader, "in_order", True):
            return False
        sampler = _sampler(loader)
        return self._world.size == 1 or (
            isinstance(sampler, DistributedSampler)
            and (sampler.rank, sampler.num_replicas) == (self._world.rank, self._world.size)
        )

    def _load(self, index: int) -> "_Load | None":
        # Not earlier: Lightning's sampler has drawn once the first batch is there.
        if index not in self._loads:
            self._loads[index] = _load(self._loader(index))
        return self._loads[index]

    def _loader(self, index: int) -> Any:
        return self._loaders[index] if index < len(self._loaders) else None


def numbered(places: Indices, dataloader: Indices) -> Indices:
    """What to call places (N,): indices of the dataset; others get the numbers after the largest.

    Args:
        places: (N,), of :class:`Positions`, all that a stage has.
        dataloader: (N,), the dataloader of each, which are numbered apart.
    """
    found = places.copy()
    for at in np.unique(dataloader):
        is_known = places < _UNKNOWN
        known, rows = places[(dataloader == at) & is_known], (dataloader == at) & ~is_known
        order = np.flatnonzero(rows)[np.argsort(places[rows], kind="stable")]
        found[order] = known.max(initial=-1) + 1 + np.arange(len(order))
    return found


def flattened(loaders: object) -> list[Any]:
    """The dataloaders of a nested collection, in order."""
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return [loader for value in loaders.values() for loader in flattened(value)]
    if isinstance(loaders, list | tuple):
        return [loader for value in loaders for loader in flattened(value)]
    if hasattr(loaders, "flattened"):  # Lightning's CombinedLoader
        return list(loaders.flattened)
    return [loaders]


@dataclass(frozen=True)
class _Load:
    """All that a process loads of a dataset.

    Attributes:
        indices: (N,), in order.
        starts: (K + 1,), where each of K batches begins, and the last one ends.
        unpadded: The indices from here on repeat samples so that all processes have as many.
    """

    indices: Indices
    starts: Indices
    unpadded: int

    def batch(self, index: int) -> Indices:
        """Indices (B,) of a batch, none after the last."""
        start, end = self.starts[index : index + 2] if index + 1 < len(self.starts) else (0, 0)
        return self.indices[start:end]


def _load(loader: "DataLoader[Any]") -> _Load | None:
    """What a process loads, None where asking would draw it anew."""
    batches = _batches(loader)
    if isinstance(batches, list | tuple):
        parts = [_integers(batch) for batch in batches]
        return _of_parts([part for part in parts if part is not None], len(parts))
    # A batch sampler of one's own need not ask the sampler beside it.
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    order = _order(sampler)
    if order is None:
        return None
    size, end = 1, len(order)  # without automatic batching an index is a batch
    if type(batches) is BatchSampler:
        size = batches.batch_size
        end = end // size * size if batches.drop_last else end
    starts = np.append(np.arange(0, end, size, dtype=np.int64), end)
    return _Load(order, starts, _unpadded(sampler, len(order)))


def _of_parts(parts: list[Indices], count: int) -> _Load | None:
    """Of batches that are listed one by one; None if one of `count` is none of integers."""
    if len(parts) < count:
        return None
    indices = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return _Load(indices, starts, len(indices))


def _batches(loader: "DataLoader[Any]") -> Any:
    """What gives the indices of each batch."""
    batches: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    is_wrapped = hasattr(batches, "seen_batch_indices")
    return getattr(batches, "_batch_sampler", batches) if is_wrapped else batches


def _sampler(loader: "DataLoader[Any]") -> Any:
    batches = _batches(loader)
    return getattr(batches, "sampler", batches)


def _order(sampler: Any) -> Indices | None:
    """All indices that a sampler gives this process, None where asking would draw them anew."""
    if type(sampler) is SequentialSampler:
        return np.arange(len(sampler), dtype=np.int64)
    if type(sampler) is DistributedSampler:
        return np.fromiter(iter(sampler), dtype=np.int64)
    # Lightning's, around a sampler of the user's: it keeps what that has drawn.
    drawn = getattr(getattr(sampler, "dataset", None), "_sampler_list", None)
    if _is_wrapper(sampler) and drawn is not None:
        return _integers([drawn[index] for index in DistributedSampler.__iter__(sampler)])
    return _integers(sampler) if type(sampler) in (list, tuple, range) else None


def _unpadded(sampler: Any, count: int) -> int:
    """How many of `count` indices come before those that pad."""
    if type(sampler) is DistributedSampler or _is_wrapper(sampler):
        samples: Any = sampler.dataset
        return len(range(sampler.rank, len(samples), sampler.num_replicas))
    return count


def _is_wrapper(sampler: Any) -> bool:
    # By name: it is in two packages, `lightning.fabric` and `lightning_fabric`.
    is_named = type(sampler).__name__ == "DistributedSamplerWrapper"
    return is_named and isinstance(sampler, DistributedSampler)


def _integers(batch: Any) -> Indices | None:
    """(B,), None if they are keys of another kind."""
    try:
        found = np.atleast_1d(np.asarray(batch))
    except Exception:  # what a user's keys make of it
        return None
    return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iu" else None
