"""The processes that a Trainer of Lightning runs in."""

from datetime import timedelta
from typing import TYPE_CHECKING

from ood_monitor_integrations.training.collectives import World

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["begun", "world_of"]


def world_of(trainer: "Trainer") -> World:
    """Them; a wait lasts at most the `timeout` of the Trainer's strategy."""
    return World.of(trainer.world_size, _limit(trainer))


def begun(trainer: "Trainer") -> World:
    """Them at the begin of a run, connected anew; all must call it."""
    return World.begin(trainer.world_size, _limit(trainer))


def _limit(trainer: "Trainer") -> timedelta | None:
    """How long its own processes wait for each other."""
    found = getattr(trainer.strategy, "_timeout", None)
    return found if isinstance(found, timedelta) else None
