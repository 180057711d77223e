"""Which of a Trainer's optimisers is about to step, and where training stands."""

from typing import TYPE_CHECKING, Any

from ood_monitor_integrations.training.gradients import Step

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["step_of_gradients"]


def step_of_gradients(trainer: "Trainer", optimizer: Any, batch_idx: int) -> Step:
    """The step that an optimiser is about to make after a batch."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return Step(
        optimizer,
        _which(trainer.optimizers, optimizer),
        trainer.current_epoch,
        batch_idx,
        skips_infinite=scaler is not None,
        is_told=trainer.is_global_zero,
    )


def _which(optimizers: list[Any], optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it where steps are manual
    return next((i for i, other in enumerate(optimizers) if other is inner), 0)
