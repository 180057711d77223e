"""Batches that are loaded beside the Trainer's own loops, and leave no trace in them."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.lightning.collectives import World
from ood_monitor_integrations.lightning.indices import Positions, flattened

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["HeldOut", "kept_random_state", "shared_out", "validation_data"]


@dataclass(frozen=True)
class HeldOut:
    """Dataloaders, and how many batches of each one process takes.

    Attributes:
        loaders: The loaders, or other iterables of batches.
        limits: Batches to take of each; None for all.
        world: The processes that take turns, batch by batch; one if the loaders share out already.
        positions: Where the samples stand.
    """

    loaders: list[Iterable[Batch]]
    limits: list[int | None]
    world: World
    positions: Positions

    def batches(
        self, trainer: "Trainer", pl_module: "LightningModule"
    ) -> Iterator[tuple[Batch, int, int]]:
        """This process's batches on its device, each with its index and its dataloader's."""
        for at, (loader, limit) in enumerate(zip(self.loaders, self.limits, strict=True)):
            for index, batch in enumerate(islice(iter(loader), limit)):
                if index % self.world.size == self.world.rank:
                    yield _transferred(batch, at, trainer, pl_module), index, at


def validation_data(trainer: "Trainer", world: World) -> HeldOut:
    """The batches that the Trainer validates on.

    Raises:
        ValueError: There are none.
    """
    loaders = flattened(trainer.val_dataloaders)
    if not loaders:
        raise ValueError(
            "Expected validation dataloaders or `calibrate_on=` a loader, got neither."
        )
    limits = [None if n == float("inf") else int(n) for n in trainer.num_val_batches]
    return HeldOut(loaders, limits, World(), Positions(loaders, world))


def shared_out(source: Iterable[Batch], world: World) -> HeldOut:
    """Batches of one's own, of which each process takes its share."""
    # A sampler made for several processes has shared them out.
    is_shared = getattr(getattr(source, "sampler", None), "num_replicas", 1) > 1
    if is_shared:
        return HeldOut([source], [None], World(), Positions(source, world))
    return HeldOut([source], [None], world, Positions(source, World()))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's as before afterwards: making an iterator of a loader draws."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _transferred(
    batch: Any, dataloader_idx: int, trainer: "Trainer", pl_module: "LightningModule"
) -> Any:
    """As the loops do before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module.on_before_batch_transfer(batch, dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
