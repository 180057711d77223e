"""Where in its dataset a sample of a batch stands, also among several processes."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from ood_monitor_integrations.lightning.collectives import World

__all__ = ["Indices", "Positions", "flattened"]

#: (N,), int64.
Indices: TypeAlias = NDArray[np.int64]


class Positions:
    """The dataset's indices of the batches of a stage.

    Known for what Lightning loads in order or shares out among processes, and for all that
    `predict` loads, where Lightning keeps them. For another sampler it is the position in the
    stream, with the processes taking turns.

    Args:
        loaders: The stage's dataloaders, as the Trainer has them.
        world: The processes.
    """

    def __init__(self, loaders: object, world: World) -> None:
        self._loaders = flattened(loaders)
        self._world = world
        self._orders: dict[int, Indices | None] = {}

    def of(self, batch_idx: int, dataloader_idx: int, count: int) -> Indices:
        """Indices (B,) of the samples of the `batch_idx`-th batch that this process loads."""
        loader = self._loader(dataloader_idx)
        # Lightning wraps the batch sampler of `predict` for its prediction writers.
        seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", [])
        if batch_idx < len(seen) and len(seen[batch_idx]) == count:
            return np.array(seen[batch_idx], dtype=np.int64)
        start = batch_idx * (self.batch_size(dataloader_idx) or count)
        if dataloader_idx not in self._orders:
            self._orders[dataloader_idx] = _order(loader)
        order = self._orders[dataloader_idx]
        if order is not None and start + count <= len(order):
            return order[start : start + count]
        return self._world.rank + self._world.size * np.arange(start, start + count)

    def batch_size(self, dataloader_idx: int) -> int | None:
        """B of a dataloader, None if it has none or batches of several sizes."""
        loader = self._loader(dataloader_idx)
        # Lightning gives the loader of `predict` a batch sampler, which leaves it no size.
        holders = loader, getattr(loader, "batch_sampler", None)
        sizes = (getattr(holder, "batch_size", None) for holder in holders)
        return next((size for size in sizes if isinstance(size, int)), None)

    def _loader(self, index: int) -> Any:
        return self._loaders[index] if index < len(self._loaders) else None


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


def _order(loader: object) -> Indices | None:
    """All indices that this process loads, None where asking would draw them anew."""
    batches = getattr(loader, "batch_sampler", None)
    # A batch sampler of one's own need not ask the sampler beside it.
    sampler = batches.sampler if type(batches) is BatchSampler else None
    if type(sampler) not in (SequentialSampler, DistributedSampler):
        return None
    return np.fromiter(iter(sampler), dtype=np.int64)  # type: ignore[arg-type]
