"""Calibration: each process measures its share, and all fit the same detector on the whole."""

from collections.abc import Callable

import numpy as np
from torch import nn

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch
from ood_monitor.densities.measurements import Measurements
from ood_monitor.modules import Lockstep
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Indices, Places
from ood_monitor_integrations.training.stage_scores import dataset_order

__all__ = ["Collection"]


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

    def add(self, batch: Batch, batch_idx: int, dataloader_idx: int, positions: Places) -> None:
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
        parts = self._together(self._dump())
        places = self._world.gathered(np.concatenate(self._places or [_NONE], 1).tobytes())
        dataset, dataloader = np.concatenate(
            [np.frombuffer(place, dtype=np.int64).reshape(2, -1) for place in places], 1
        )
        with self._world.agreed():
            whole = Measurements.together(Measurements.parse(part) for part in parts if part)
            rows = dataset_order(dataset, dataloader)
            detector = self._detector or self._make()
            detector.fit_measured(whole.take(rows) if self._world.size > 1 else whole)
        self._check_weights(detector)
        return detector

    def _check_weights(self, detector: Detector) -> None:
        """Refuse a detector of several models.

        Raises:
            ValueError: The processes have not the same weights.
        """
        found = [mark.decode() for mark in self._world.gathered(detector.fitted.model.encode())]
        if len(set(found)) > 1:
            raise ValueError(
                f"Expected the same weights in all processes, got {', '.join(found)} by rank: the "
                "replicas have come apart, as by parameters that each sets from its own first "
                "batch. Set them before training, or broadcast those of rank 0."
            )

    def rehearse(self, batch: Batch, most: int | None, fpr: float) -> None:
        """Measure a few samples, and see whether `most` like them will be enough.

        Raises:
            Exception: They cannot be measured, or are too few; kept for :meth:`agree` too.
        """
        with self._lockstep.passes():
            if self._failure is None:
                detector = self._make()
                detector.check_held_out(detector.measure(batch), most, fpr)

    def agree(self) -> None:
        """Hear whether a process has failed; all must call it.

        Raises:
            RuntimeError: Another has.
            Exception: What made this one fail.
        """
        self._together(b"" if self._failure is None else None)

    def _together(self, data: bytes | None) -> list[bytes]:
        """What each process gave, by rank, once none makes a pass any more."""
        try:
            self._lockstep.end()
            return self._world.gathered(data)
        except RuntimeError as error:
            raise self._failure or error from None

    def _dump(self) -> bytes | None:
        parts = b""
        try:
            parts = Measurements.together(self._parts).dump() if self._parts else b""
        except Exception as error:  # likewise
            self.fail(error)
        return parts if self._failure is None else None


_NONE: Indices = np.zeros((2, 0), dtype=np.int64)
