"""Calibration: a pass of its own over held-out data, of the weights that the module has."""

import logging
import time
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.lightning.loading import (
    HeldOut,
    as_in_validation,
    own_data,
    validation_data,
)
from ood_monitor_integrations.lightning.worlds import world_of
from ood_monitor_integrations.training.collection import Collection
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.loading import first, samples_in

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Calibrator"]

_log = logging.getLogger(__name__)


class Calibrator:
    """Fits detectors of the weights that a module has, on held-out data.

    Args:
        source: Batches of one's own; None for the Trainer's validation data.
        detectors: Takes what is fitted.
        most: Samples of one calibration, of all processes.
        progress: Whether each shows a bar.
    """

    def __init__(
        self, source: Iterable[Batch] | None, detectors: Detectors, most: int, *, progress: bool
    ) -> None:
        self._source, self._detectors, self._most = source, detectors, most
        self._progress = progress

    def fit(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        source: Iterable[Batch] | None = None,
    ) -> Detector:
        """Fit on `source`, or on what was chosen; all processes must call it.

        Raises:
            RuntimeError: Another process failed.
            Exception: What made this one fail.
        """
        start = time.perf_counter()
        collection = self._collection(trainer, pl_module)
        self._pass(collection, trainer, pl_module, source)
        detector = collection.fitted()
        self._detectors.put(detector)
        spent = time.perf_counter() - start
        samples = detector.fitted.fit_count + len(detector.fitted.calibration.scores)
        _log.info("Calibrated on %d held-out samples in %.1f s.", samples, spent)
        return detector

    def rehearse(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Batch | None, fpr: float
    ) -> None:
        """Do to two samples what will be done to all; all processes must call it.

        Args:
            trainer: As of :meth:`fit`.
            pl_module: Likewise.
            batch: Of the validation data, as a step gets it; None to load one.
            fpr: The rate at which samples are to be flagged.

        Raises:
            RuntimeError: Another process failed.
            Exception: What will make :meth:`fit` fail, or why nothing could be flagged.
        """
        collection = self._collection(trainer, pl_module)
        try:
            with as_in_validation(trainer, pl_module):
                held_out = self._held_out(trainer, None)
                if batch is None or self._source is not None:
                    with closing(held_out.batches(trainer, pl_module, self._most)) as batches:
                        batch = next(batches, (None,))[0]
                if batch is not None:
                    self._try(collection, trainer, pl_module, held_out, batch, fpr)
        except Exception as error:  # all processes must come to the collective that follows
            collection.fail(error)
        collection.agree()

    def _try(
        self,
        collection: Collection,
        trainer: "Trainer",
        pl_module: "LightningModule",
        held_out: HeldOut,
        batch: Batch,
        fpr: float,
    ) -> None:
        model = self._detectors.model
        model.check_batch(pl_module, own := model.prepared(batch))
        most = self._count(trainer, held_out, own)
        collection.rehearse(first(own, 2), most, fpr)

    def _count(self, trainer: "Trainer", held_out: HeldOut, batch: Batch) -> int | None:
        """Samples that there will be, at least about; None where nobody knows."""
        if held_out.count is None or getattr(trainer, "fast_dev_run", False):
            return None
        shares = 1 if held_out.world.size > 1 else world_of(trainer).size
        return min(self._most, held_out.count * shares * samples_in(batch))

    def _collection(self, trainer: "Trainer", pl_module: "LightningModule") -> Collection:
        return Collection(
            lambda: self._detectors.new(pl_module),
            world_of(trainer),
            lambda: self._detectors.adapter(pl_module).module,
        )

    def _held_out(self, trainer: "Trainer", source: Iterable[Batch] | None) -> HeldOut:
        world, source = world_of(trainer), self._source if source is None else source
        return validation_data(trainer, world) if source is None else own_data(source, world)

    def _pass(
        self,
        collection: Collection,
        trainer: "Trainer",
        pl_module: "LightningModule",
        source: Iterable[Batch] | None,
    ) -> None:
        world = world_of(trainer)
        try:
            with as_in_validation(trainer, pl_module):
                held_out = self._held_out(trainer, source)
                batches = held_out.batches(trainer, pl_module, -(-self._most // world.size))
                hidden = not self._progress or world.rank > 0
                for batch, index, at in tqdm(batches, desc="calibration", disable=hidden):
                    own = self._detectors.model.prepared(batch)
                    collection.add(own, index, at, held_out.positions)
        except Exception as error:  # all processes must come to the collective that follows
            collection.fail(error)
