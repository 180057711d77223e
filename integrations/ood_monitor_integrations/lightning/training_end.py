"""When training is at its end, seen from a hook: state that comes later is in no checkpoint."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["ends_training", "is_last_validation"]


def ends_training(trainer: "Trainer") -> bool:
    """Whether no optimiser step follows."""
    out_of_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    out_of_batches = _is_last_epoch(trainer, 1) and trainer.is_last_batch
    return out_of_steps or out_of_batches or _stops_early(trainer)


def is_last_validation(trainer: "Trainer") -> bool:
    """Whether no other validation follows: its checkpoint may be the last, steps left or not."""
    if ends_training(trainer):
        return True
    every = trainer.check_val_every_n_epoch
    if every is None or not _is_last_epoch(trainer, every):
        return False
    next_batch = trainer.fit_loop.batch_idx + 1 + (trainer.val_check_batch or 1)
    return trainer.is_last_batch or next_batch > trainer.num_training_batches


def _is_last_epoch(trainer: "Trainer", every: int) -> bool:
    """Whether the epoch `every` epochs on is beyond the last."""
    last = trainer.max_epochs
    return last not in (None, -1) and trainer.current_epoch + every >= (last or 0)


def _stops_early(trainer: "Trainer") -> bool:
    # As the fit loop decides: it trains on until these are met.
    enough_epochs = trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
    enough_steps = trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and enough_epochs and enough_steps
