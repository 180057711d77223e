"""Batches beside those of a trainer: which are taken, and what of the process stays as it was."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ood_monitor.adapters.base import Batch, map_tensors, tensors_in

__all__ = ["Evenly", "beside", "first", "kept_global_state", "length_of", "samples_in"]


class Evenly:
    """Which of so many batches are taken, where all have about as many samples as the first."""

    def __init__(self, count: int | None, most: int) -> None:
        self._count, self._left, self._wanted = count, most, 0

    @property
    def is_full(self) -> bool:
        """Whether no more are wanted."""
        return self._left <= 0

    def takes(self, number: int, batch: Batch) -> bool:
        """Whether the batch of this number, from 0, is one of them."""
        size = samples_in(batch)
        if not self._wanted:
            self._wanted = max(1, self._left // max(size, 1))
        if self._count is None or self._count <= self._wanted:
            return True
        # Where a line of slope wanted / count reaches the next whole number.
        before, after = (-(-n * self._wanted // self._count) for n in (number, number + 1))
        return after > before

    def cut(self, batch: Batch) -> Batch:
        """What is still wanted of one that is taken, which counts from now on."""
        left, size = self._left, samples_in(batch)
        self._left -= max(size, 1)
        return batch if size <= left else first(batch, left)


def beside(loader: Any) -> Any:
    """A loader of the same batches, whose workers and draws are its own.

    The Trainer may stand in the middle of the other, and be about to go on.
    """
    if not isinstance(loader, DataLoader):
        return loader
    other = copy.copy(loader)
    # Past the check of `DataLoader`, which takes no such change of one that is in use.
    other.__dict__.update(_iterator=None, persistent_workers=False)
    if loader.generator is not None:
        other.__dict__["generator"] = loader.generator.clone_state()
    return other


@contextmanager
def kept_global_state() -> Iterator[None]:
    """Python's, numpy's and torch's as before afterwards: making an iterator of a loader draws."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def first(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    return map_tensors(lambda tensor: tensor[:count] if tensor.ndim else tensor, batch)


def samples_in(batch: Batch) -> int:
    """B, of which fields that all samples share tell nothing."""
    return max((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), default=0)


def length_of(loader: Any) -> int | None:
    """Batches of a loader; None where it does not say."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):  # a dataset without a length, an iterator
        return None
    return None if length == float("inf") else int(length)
