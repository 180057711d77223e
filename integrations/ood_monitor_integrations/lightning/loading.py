"""Batches that are loaded beside the Trainer's own loops, as its validation loads them."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.held_out import HeldOut, own_data
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.loading import beside, kept_global_state, length_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "as_in_validation",
    "combined_or_own",
    "fetches_itself",
    "transferred",
    "validation_data",
]

_STEPS = {
    "sanity_check": "validation_step",
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}


def validation_data(trainer: "Trainer", world: World) -> HeldOut:
    """The batches that the Trainer validates on.

    Raises:
        ValueError: There are none.
    """
    loops = [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop]
    if trainer.state.fn == "validate":
        loops.reverse()
    elif trainer.enable_validation and trainer.state.fn == "fit" and not _loaded(loops[0]):
        loops[0].setup_data()  # no validation has run so far
    loop = next((loop for loop in loops if _loaded(loop)), None)
    if loop is None:
        raise ValueError("Expected validation dataloaders or `held_out=` a loader, got neither.")
    combined: Any = loop._combined_loader
    if any(isinstance(loader, Iterator) for loader in combined.flattened):
        raise ValueError(
            "Expected validation data that can be gone through again, got an iterator, of which "
            "each calibration would take batches: give others, `held_out=`."
        )
    again = _combined_again(combined)
    again.limits = limits = list(loop._max_batches)
    flat = combined.flattened
    return HeldOut(again, _count(combined, limits), World(), Positions(flat, world), flat)


def _loaded(loop: Any) -> bool:
    return loop._combined_loader is not None


def combined_or_own(source: Any, world: World) -> HeldOut:
    """Batches of one's own, of which each process takes its share."""
    if hasattr(source, "flattened"):  # Lightning's CombinedLoader
        again, positions = _combined_again(source), Positions(source.flattened, World())
        return HeldOut(again, _count(source, None), world, positions, source.flattened)
    return own_data(source, world)


def _combined_again(combined: Any) -> Any:
    again = type(combined)(combined.iterables, combined._mode)
    again.flattened = [beside(loader) for loader in combined.flattened]
    return again


def _count(combined: Any, limits: list[float] | None) -> int | None:
    """Batches of a combined loader, which is not asked since it tells only while it is iterated."""
    lengths = [length_of(loader) for loader in combined.flattened]
    known = [math.inf if length is None else length for length in lengths]
    counts = known if limits is None else list(map(min, known, limits))
    of_all: dict[str, Callable[[list[float]], float]] = {"sequential": sum, "min_size": min}
    found = of_all.get(combined._mode, max)(counts)
    return None if math.isinf(found) else int(found)


def fetches_itself(pl_module: "LightningModule", trainer: "Trainer") -> bool:
    """Whether the step of a stage is given an iterator, so that hooks before it know no batch."""
    name = _STEPS.get(str(trainer.state.stage and trainer.state.stage.value))
    step = getattr(pl_module, name or "", None)
    return step is not None and "dataloader_iter" in inspect.signature(step).parameters


@contextmanager
def as_in_validation(trainer: "Trainer", pl_module: "LightningModule") -> Iterator[None]:
    """Hooks of modules and data see a validation: `trainer.validating`, and modules in eval mode.

    Everything is as before afterwards, the global random state included.
    """
    wrapped = trainer.strategy.model or pl_module  # which a strategy may have wrapped
    stage, modes = trainer.state.stage, [(m, m.training) for m in wrapped.modules()]
    trainer.validating = True
    try:
        with kept_global_state(), torch.no_grad():
            if getattr(pl_module, "_trainer", None) is None:  # no Trainer has run it yet
                pl_module.eval()
            else:
                pl_module.on_validation_model_eval()
            yield
    finally:
        trainer.state.stage = stage
        for module, mode in modes:
            module.training = mode


def transferred(
    batch: Any, dataloader_idx: int, trainer: "Trainer", pl_module: "LightningModule"
) -> Any:
    """As the loops do before a step, by the hooks of the module or of its DataModule."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
