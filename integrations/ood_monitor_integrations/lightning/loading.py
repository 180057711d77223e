"""Batches that are loaded beside the Trainer's own loops, as its validation loads them."""

import inspect
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.generators import kept_generators
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.loading import Evenly, beside, kept_global_state, length_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "HeldOut",
    "as_in_validation",
    "fetches_itself",
    "own_data",
    "validation_data",
]

_STEPS = {
    "sanity_check": "validation_step",
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}


@dataclass(frozen=True)
class HeldOut:
    """A loader, and how many batches of it one process takes.

    Attributes:
        loader: Gives (batch, its index, its dataloader's index), as Lightning's `CombinedLoader`.
        count: Batches that it gives; None where that is not known.
        world: The processes that take turns, batch by batch; one if the loader shares out already.
        positions: Where the samples stand.
        sources: The loaders, whose generators are to stay where they are.
    """

    loader: Iterable[tuple[Batch, int, int]]
    count: int | None
    world: World
    positions: Positions
    sources: Sequence[Any]

    def batches(
        self, trainer: "Trainer", pl_module: "LightningModule", most: int
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """This process's batches on its device, each with its index and its dataloader's.

        Args:
            trainer: Whose hooks a batch goes through.
            pl_module: Likewise.
            most: Samples, of all batches together; of more, batches are left out evenly, since
                neighbours in a dataset are often alike.
        """
        with kept_generators(self.sources):
            yield from self._batches(trainer, pl_module, most)

    def _batches(
        self, trainer: "Trainer", pl_module: "LightningModule", most: int
    ) -> Iterator[tuple[Batch, int, int]]:
        size, rank = self.world.size, self.world.rank
        chosen = Evenly(None if self.count is None else -(-self.count // size), most)
        for number, (batch, index, at) in enumerate(self.loader):
            if number % size == rank and chosen.takes(number // size, batch):
                yield _transferred(chosen.cut(batch), at, trainer, pl_module), index, at
            if chosen.is_full:
                return


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


def own_data(source: Any, world: World) -> HeldOut:
    """Batches of one's own, of which each process takes its share."""
    if hasattr(source, "flattened"):  # Lightning's CombinedLoader
        again, positions = _combined_again(source), Positions(source.flattened, World())
        return HeldOut(again, _count(source, None), world, positions, source.flattened)
    batches = _Numbered(beside(source))
    # A sampler made for several processes has shared them out.
    is_shared = getattr(getattr(source, "sampler", None), "num_replicas", 1) > 1
    if is_shared:
        return HeldOut(batches, length_of(source), World(), Positions(source, world), [source])
    return HeldOut(batches, length_of(source), world, Positions(source, World()), [source])


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


@dataclass(frozen=True)
class _Numbered:
    """Batches of one loader, in the form of a combined one."""

    source: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[Batch, int, int]]:
        return ((batch, index, 0) for index, batch in enumerate(iter(self.source)))


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


def _transferred(
    batch: Any, dataloader_idx: int, trainer: "Trainer", pl_module: "LightningModule"
) -> Any:
    """As the loops do before a step, by the hooks of the module or of its DataModule."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
