"""Calibration: a pass of its own over held-out data, of the weights that the module has."""

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing
from typing import Protocol

from torch import nn
from tqdm.auto import tqdm

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.training.collection import Collection
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.held_out import HeldOut
from ood_monitor_integrations.training.loading import first, kept_global_state, samples_in

__all__ = ["Calibrator", "Run"]

_log = logging.getLogger(__name__)


class Run(Protocol):
    """A training, as a calibration sees it."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def world(self) -> World:
        """The processes."""

    @property
    def is_short(self) -> bool:
        """Whether it only tries a few batches, of which no number means anything."""

    def held_out(self, source: Iterable[Batch] | None) -> HeldOut:
        """Batches of one's own, or, of None, those that the trainer evaluates on.

        Raises:
            ValueError: There are none.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """As the trainer evaluates; everything is as before afterwards, random states included."""

    def transferred(self, batch: Batch, at: int) -> Batch:
        """As the trainer brings a batch of its `at`-th dataloader to its step."""


class Calibrator:
    """Fits detectors of the weights that a module has, on held-out data.

    Args:
        source: Batches of one's own; None for what the trainer evaluates on.
        detectors: Takes what is fitted.
        most: Samples of one calibration, of all processes.
        progress: Whether each shows a bar.
    """

    def __init__(
        self, source: Iterable[Batch] | None, detectors: Detectors, most: int, *, progress: bool
    ) -> None:
        self._source, self._detectors, self._most = source, detectors, most
        self._progress = progress

    def fit(self, run: Run, source: Iterable[Batch] | None = None) -> Detector:
        """Fit on `source`, or on what was chosen; all processes must call it.

        Raises:
            RuntimeError: Another process failed.
            Exception: What made this one fail.
        """
        start = time.perf_counter()
        with kept_global_state():  # modules that are first needed now may draw while they load
            collection = self._collection(run)
            self._pass(collection, run, source)
            detector = collection.fitted()
        self._detectors.put(detector)
        spent = time.perf_counter() - start
        samples = detector.fitted.fit_count + len(detector.fitted.calibration.scores)
        _log.info("Calibrated on %d held-out samples in %.1f s.", samples, spent)
        return detector

    def rehearse(self, run: Run, batch: Batch | None, fpr: float) -> None:
        """Do to two samples what will be done to all; all processes must call it.

        Args:
            run: As of :meth:`fit`.
            batch: Of the evaluation data, as a step gets it; None to load one.
            fpr: The rate at which samples are to be flagged.

        Raises:
            RuntimeError: Another process failed.
            Exception: What will make :meth:`fit` fail, or why nothing could be flagged.
        """
        collection = self._collection(run)
        try:
            with run.evaluating():
                held_out = self._held_out(run, None)
                if batch is None or self._source is not None:
                    with closing(held_out.batches(run.transferred, self._most)) as batches:
                        batch = next(batches, (None,))[0]
                if batch is not None:
                    self._try(collection, run, held_out, batch, fpr)
        except Exception as error:  # all processes must come to the collective that follows
            collection.fail(error)
        collection.agree()

    def _try(
        self, collection: Collection, run: Run, held_out: HeldOut, batch: Batch, fpr: float
    ) -> None:
        model = self._detectors.model
        model.check_batch(run.module, own := model.prepared(batch))
        most = self._count(run, held_out, own)
        collection.rehearse(first(own, 2), most, fpr)

    def _count(self, run: Run, held_out: HeldOut, batch: Batch) -> int | None:
        """Samples that there will be, at least about; None where nobody knows."""
        if held_out.count is None or run.is_short:
            return None
        shares = 1 if held_out.world.size > 1 else run.world.size
        return min(self._most, held_out.count * shares * samples_in(batch))

    def _collection(self, run: Run) -> Collection:
        return Collection(
            lambda: self._detectors.new(run.module),
            run.world,
            lambda: self._detectors.adapter(run.module).module,
        )

    def _held_out(self, run: Run, source: Iterable[Batch] | None) -> HeldOut:
        return run.held_out(self._source if source is None else source)

    def _pass(self, collection: Collection, run: Run, source: Iterable[Batch] | None) -> None:
        world = run.world
        try:
            with run.evaluating():
                held_out = self._held_out(run, source)
                batches = held_out.batches(run.transferred, -(-self._most // world.size))
                hidden = not self._progress or world.rank > 0
                for batch, index, at in tqdm(batches, desc="calibration", disable=hidden):
                    own = self._detectors.model.prepared(batch)
                    collection.add(own, index, at, held_out.positions)
        except Exception as error:  # all processes must come to the collective that follows
            collection.fail(error)
