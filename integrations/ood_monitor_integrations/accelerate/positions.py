"""Where in its dataset a sample stands that accelerate's loaders give to one of several processes.

They make all processes have as many samples, by some that they take again from the beginning.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Indices, Places, Positions
from ood_monitor_integrations.training.loading import beside

__all__ = ["Asked", "PreparedPositions", "asked", "positions_of"]


class PreparedPositions:
    """Places of the samples of a loader that was prepared for several processes.

    Args:
        loader: In the order of its dataset.
        world: The processes.

    Raises:
        ValueError: What it gives to which process cannot be told without drawing anew.
    """

    def __init__(self, loader: Any, world: World) -> None:
        inner = _inner(loader)
        self._size: int = inner.batch_size
        self._batches: list[Indices] = []
        self._counted: list[Indices] = []
        shard = loader.batch_sampler
        options = {"split_batches": shard.split_batches, "even_batches": shard.even_batches}
        everywhere = [
            list(BatchSamplerShard(inner, world.size, rank, **options))
            for rank in range(world.size)
        ]
        self._fill(everywhere, world.rank)

    def _fill(self, everywhere: list[list[list[int]]], rank: int) -> None:
        """Of a sample that comes again the first counts, in the order of the processes' turns."""
        seen = set[int]()
        for turn in range(max(map(len, everywhere))):
            for other, batches in enumerate(everywhere):
                batch = batches[turn] if turn < len(batches) else []
                rows = []
                for row, index in enumerate(batch):  # which may have an index twice itself
                    rows += [row] if index not in seen else []
                    seen.add(index)
                if other == rank:
                    self._batches.append(np.array(batch, dtype=np.int64))
                    self._counted.append(np.array(rows, dtype=np.int64))

    def of(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Places (B,) of the samples of the `batch_idx`-th batch of this process.

        Raises:
            ValueError: It has another number of samples than was loaded.
        """
        return self._checked(self._batches, batch_idx, count)

    def counted(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Rows (B',) of that batch without those that only fill it up.

        Raises:
            ValueError: As :meth:`of`.
        """
        self._checked(self._batches, batch_idx, count)
        return self._counted[batch_idx]

    def loaded(self, batch_idx: int, dataloader_idx: int) -> int | None:
        """B of the `batch_idx`-th batch of this process."""
        return len(self._batches[batch_idx]) if batch_idx < len(self._batches) else None

    def batch_size(self, dataloader_idx: int) -> int:
        """B of a batch as one process would load it."""
        return self._size

    def _checked(self, batches: list[Indices], batch_idx: int, count: int) -> Indices:
        found = batches[batch_idx] if batch_idx < len(batches) else np.zeros(0, dtype=np.int64)
        if len(found) != count:
            raise ValueError(
                f"Expected {len(found)} samples in batch {batch_idx} of this process, as its "
                f"sampler says, got {count}."
            )
        return found


class Asked:
    """A batch sampler that remembers what it gave, whatever draws it: see :class:`Positions`.

    Args:
        batches: Gives the indices of each batch.

    Attributes:
        seen_batch_indices: Of each batch of the latest pass.
        batch_size: B, where that has one.
    """

    def __init__(self, batches: Any) -> None:
        self.seen_batch_indices: list[list[Any]] = []
        self.batch_size = getattr(batches, "batch_size", None)
        self._batch_sampler = batches

    def __iter__(self) -> Iterator[list[Any]]:
        """Begin a pass."""
        self.seen_batch_indices.clear()
        for batch in self._batch_sampler:
            self.seen_batch_indices.append([*batch])
            yield batch

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self._batch_sampler)


def asked(loader: Any, world: World) -> Any:
    """A loader of one's own beside another, that remembers which samples it has loaded.

    Raises:
        ValueError: It shuffles, of several processes each in a way of its own.
    """
    other = beside(loader)
    is_plain = isinstance(other, DataLoader) and not isinstance(other.dataset, IterableDataset)
    if not is_plain or other.batch_sampler is None:
        return other
    if world.size > 1 and isinstance(other.sampler, RandomSampler):
        raise ValueError(
            "Expected in several processes a loader in the order of its dataset, got one that "
            "shuffles: each process would draw an order of its own, and take turns with samples "
            "that others have had. Give one with shuffle=False."
        )
    other.__dict__["batch_sampler"] = Asked(other.batch_sampler)
    return other


def positions_of(loader: Any, world: World) -> Places:
    """Places of the samples of a loader, in one process or in several.

    Raises:
        ValueError: As :class:`PreparedPositions`.
    """
    if world.size == 1:
        return Positions(_unprepared(loader), world)
    return PreparedPositions(loader, world)


def _unprepared(loader: Any) -> Any:
    """In one process, the loader whose batches a prepared one passes on as they come."""
    is_passed_on = type(loader) is DataLoaderShard and loader.skip_batches == 0
    return loader.base_dataloader if is_passed_on else loader


def _inner(loader: Any) -> Any:
    """The batch sampler that one process would have.

    Raises:
        ValueError: It is none in the order of the dataset, or none that accelerate has shared out.
    """
    shard = getattr(loader, "batch_sampler", None)
    inner = getattr(shard, "batch_sampler", None)
    is_known = isinstance(loader, DataLoaderShard) and type(shard) is BatchSamplerShard
    is_plain = type(inner) is BatchSampler and type(inner.sampler) is SequentialSampler
    if not (is_known and is_plain and getattr(loader, "skip_batches", 0) == 0):
        raise ValueError(
            "Expected in several processes a loader that accelerate has prepared, in the order of "
            f"its dataset, got {type(loader).__name__} with {type(inner or shard).__name__}: which "
            "samples are there twice could not be told. Do not shuffle, or watch in one process."
        )
    return inner
