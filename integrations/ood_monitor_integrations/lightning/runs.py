"""A Trainer and its module, as a calibration sees them."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.lightning.loading import (
    as_in_validation,
    combined_or_own,
    transferred,
    validation_data,
)
from ood_monitor_integrations.lightning.worlds import world_of
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.held_out import HeldOut

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["LightningRun"]


@dataclass(frozen=True)
class LightningRun:
    """See :class:`~ood_monitor_integrations.training.calibration.Run`.

    Attributes:
        trainer: The Trainer.
        pl_module: What it trains.
    """

    trainer: "Trainer"
    pl_module: "LightningModule"

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.pl_module

    @property
    def world(self) -> World:
        """The processes."""
        return world_of(self.trainer)

    @property
    def is_short(self) -> bool:
        """Whether it is a `fast_dev_run`."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def held_out(self, source: Iterable[Batch] | None) -> HeldOut:
        """Batches of one's own, or those of the validation.

        Raises:
            ValueError: There are none.
        """
        world = self.world
        return (
            validation_data(self.trainer, world)
            if source is None
            else combined_or_own(source, world)
        )

    def evaluating(self) -> AbstractContextManager[None]:
        """As in a validation."""
        return as_in_validation(self.trainer, self.pl_module)

    def transferred(self, batch: Batch, at: int) -> Batch:
        """By the hooks of the module and of its data."""
        return transferred(batch, at, self.trainer, self.pl_module)
