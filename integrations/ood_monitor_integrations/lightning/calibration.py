"""Calibration: each process measures its share, and all fit the same detector on the whole."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch
from ood_monitor.densities.measurements import Measurements
from ood_monitor.modules import Lockstep
from ood_monitor_integrations.lightning.collectives import World
from ood_monitor_integrations.lightning.detectors import Detectors
from ood_monitor_integrations.lightning.failures import Failures
from ood_monitor_integrations.lightning.indices import Indices, Positions
from ood_monitor_integrations.lightning.loading import (
    HeldOut,
    kept_random_state,
    shared_out,
    validation_data,
)
from ood_monitor_integrations.lightning.stage_scores import dataset_order
from ood_monitor_integrations.lightning.training_end import ends_training, is_last_validation

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Calibrator", "Collection"]

_KIND = "was not calibrated and will not watch"


class Collection:
    """Held-out samples that the processes measure, each its own.

    Args:
        make: Gives the detector to be fitted.
        world: The processes.
        module: Gives the model.
    """

    def __init__(
        self, make: Callable[[], Detector], world: World, module: Callable[[], nn.Module]
    ) -> None:
        self._make, self._world = make, world
        self._detector: Detector | None = None
        self._parts: list[Measurements] = []
        self._places: list[Indices] = []
        self._failure: Exception | None = None
        self._lockstep = Lockstep(nn.Module())
        try:
            self._lockstep = world.lockstep(module())
        except Exception as error:  # not here, in a hook: where all can hear of it
            self._failure = error

    def add(self, batch: Batch, batch_idx: int, dataloader_idx: int, positions: Positions) -> None:
        """Measure one batch. A failure is kept for :meth:`fitted`, where all can hear of it."""
        try:
            with self._lockstep.passes():
                if self._failure is not None:
                    return
                self._detector = self._detector or self._make()
                measured = self._detector.measure(batch, explain=self._unexplained(self._detector))
            at = batch_idx, dataloader_idx, len(measured)
            rows = positions.counted(*at)
            measured, dataset = measured.take(rows), positions.of(*at)[rows]
        except Exception as error:  # the other processes must hear of it, or they wait
            self._failure = error
            return
        self._parts.append(measured)
        self._places.append(np.stack([dataset, np.full_like(dataset, dataloader_idx)]))

    def _unexplained(self, detector: Detector) -> int:
        """How many samples of this process are still to explain by, of its share."""
        share = -(-detector.explained // self._world.size)
        return max(0, share - sum(map(len, self._parts)))

    def fail(self, error: Exception) -> None:
        """Say that there can be no more samples."""
        self._failure = self._failure or error

    def fitted(self) -> Detector:
        """The detector, fitted on the samples of all processes in the order of the dataset.

        All processes must call it, and all get it or none does; each sample counts once.

        Raises:
            RuntimeError: Another process failed, or is lost.
            Exception: What made this one fail.
        """
        try:
            self._lockstep.end()
            parts = self._world.gathered(self._dump())
            places = self._world.gathered(np.concatenate(self._places or [_NONE], 1).tobytes())
        except RuntimeError as error:
            raise self._failure or error from None
        dataset, dataloader = np.concatenate(
            [np.frombuffer(place, dtype=np.int64).reshape(2, -1) for place in places], 1
        )
        with self._world.agreed():
            whole = Measurements.together(Measurements.parse(part) for part in parts if part)
            rows = dataset_order(dataset, dataloader)
            detector = self._detector or self._make()
            return detector.fit_measured(whole.take(rows) if self._world.size > 1 else whole)

    def _dump(self) -> bytes | None:
        parts = b""
        try:
            parts = Measurements.together(self._parts).dump() if self._parts else b""
        except Exception as error:  # likewise
            self.fail(error)
        return parts if self._failure is None else None


_NONE: Indices = np.zeros((2, 0), dtype=np.int64)


class Calibrator:
    """Calibrates once training is at its end, in time for the checkpoint of that moment.

    In the last validation it measures the batches that are validated: under a callback that
    averages weights they are the averaged ones, which the checkpoint will hold. Where the end shows
    later (early stopping, a limit of steps) it takes a pass over the loaders of its own.

    Args:
        source: "val", batches of one's own, or None for no calibration.
        detectors: Takes the fitted detector.
        failures: Told of failures.
        progress: Show a bar for a pass of its own.
    """

    def __init__(
        self,
        source: Literal["val"] | Iterable[Batch] | None,
        detectors: Detectors,
        failures: Failures,
        *,
        progress: bool,
    ) -> None:
        self._source, self._detectors = source, detectors
        self._failures, self._progress = failures, progress
        self.reset()

    def reset(self) -> None:
        """Training begins."""
        self._step: int | None = None  # of the latest calibration, failed or not
        self._open: Collection | None = None
        self._held_out: HeldOut | None = None

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to measure what is validated, if it is for the last time."""
        if self._wanted(trainer) and is_last_validation(trainer):
            self._open = self._collection(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
        positions: Positions,
    ) -> None:
        """Measure; fit at the last batch, while weights are what they are."""
        if self._open is None:
            return
        if self._source == "val":
            self._open.add(batch, batch_idx, dataloader_idx, positions)
        counts = trainer.num_val_batches
        if dataloader_idx + 1 == len(counts) and batch_idx + 1 == counts[-1]:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Fit, at the latest."""
        collection, self._open = self._open, None
        if collection is None:
            return
        self._step = trainer.global_step
        with self._failures.contained(_KIND):
            if self._source != "val":
                self._pass(collection, trainer, pl_module)
            self._detectors.current = collection.fitted()

    def at_the_end(self, trainer: "Trainer", pl_module: "LightningModule") -> bool:
        """Calibrate if training is at its end and was not calibrated there; whether it was due."""
        if not self._wanted(trainer) or not ends_training(trainer):
            return False
        self._step = trainer.global_step
        with self._failures.contained(_KIND):
            self.now(trainer, pl_module, None)
        return True

    def now(
        self, trainer: "Trainer", pl_module: "LightningModule", source: Iterable[Batch] | None
    ) -> None:
        """Calibrate on `source`, or on what was chosen, in a pass over it."""
        collection = self._collection(trainer, pl_module)
        self._pass(collection, trainer, pl_module, source)
        self._detectors.current = collection.fitted()

    def _wanted(self, trainer: "Trainer") -> bool:
        is_new = self._step != trainer.global_step
        return self._source is not None and is_new and not getattr(trainer, "fast_dev_run", False)

    def _collection(self, trainer: "Trainer", pl_module: "LightningModule") -> Collection:
        return Collection(
            lambda: self._detectors.new(pl_module),
            World.of(trainer),
            lambda: self._detectors.adapter(pl_module).module,
        )

    def _pass(
        self,
        collection: Collection,
        trainer: "Trainer",
        pl_module: "LightningModule",
        source: Iterable[Batch] | None = None,
    ) -> None:
        world = World.of(trainer)
        source = self._source if source is None else source
        try:
            held_out = (
                validation_data(trainer, world)
                if source is None or isinstance(source, str)
                else shared_out(source, world)
            )
            with kept_random_state():
                batches = held_out.batches(trainer, pl_module)
                hidden = not self._progress or world.rank > 0
                for batch, index, at in tqdm(batches, desc="calibration", disable=hidden):
                    collection.add(batch, index, at, held_out.positions)
        except Exception as error:  # all processes must come to the collective that follows
            collection.fail(error)
