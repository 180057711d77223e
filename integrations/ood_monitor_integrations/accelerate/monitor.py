"""A detector in a loop of one's own, in one process or in several of accelerate's."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ood_monitor import Adapter, Alert, Detector, Monitor
from ood_monitor.adapters.base import Batch, batch_size
from ood_monitor.alerts import Sink
from ood_monitor.checks import batches, flag, function, items, number, text, whole
from ood_monitor.densities.parts import Method
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor_integrations.accelerate.forward import plain_forward
from ood_monitor_integrations.accelerate.positions import Asked, asked, positions_of
from ood_monitor_integrations.training.adapters import AdapterLike, WatchedModel
from ood_monitor_integrations.training.buffered import BufferedStage
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.detectors import Detectors, check_method
from ood_monitor_integrations.training.figures import LeftOpen
from ood_monitor_integrations.training.held_out import HeldOut, own_data
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.loading import kept_global_state, length_of
from ood_monitor_integrations.training.stage_scores import StageScores

__all__ = ["AcceleratorMonitor"]

_REMEDY = "Make one by `AcceleratorMonitor.calibrate`."


class AcceleratorMonitor:
    """Fits a detector of a model's weights, and watches loaders, in all processes of a loop.

    ::

        watch = AcceleratorMonitor(accelerator, model, adapter)
        watch.calibrate(held_out)
        alerts = watch.watch(shard)

    Each process scores its own batches, and all decide on the whole in the order of the dataset:
    scores and alerts are those of one process, whatever each has to do. A sample that accelerate
    gives twice, so that all processes have as many, counts once. The model, the random states and
    the trackers are left as they were.

    Args:
        accelerator: The loop's.
        model: The model, prepared or not.
        adapter: Of the model; a function ``(model, x) -> (B,)`` giving log-likelihoods in nats; or
            None for its own ``adapter()``, ``log_prob_terms`` or ``log_prob``.
        detector: A detector to use, the folder of a saved one, or a checkpoint that holds one. One
            that is not fitted yet has the settings for the one to fit.
        batch: Makes a batch of what a loader yields, before anything else sees it.
        calibrate_samples: Held-out samples of one calibration, at most; of more data, batches are
            left out evenly.
        method: Of the detector that is fitted; see :class:`~ood_monitor.Detector`.
        layers: Which parameters are features, by name pattern; all by default.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        sinks: Told of every alert, from the main process; they are left open.
        name: Of the streams.
        progress: Show a progress bar while calibrating.

    Attributes:
        alerts: All alerts so far, the same in all processes.
        recorded: Scores of the latest stage of each name, each with its index in the dataset: in
            the order of the loader, or of the dataset in several processes.

    Raises:
        ValueError: An option is out of its range, two speak of the same thing, or the adapter is
            of another model.
        TypeError: An option of another type.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        adapter: AdapterLike | None = None,
        *,
        detector: str | Detector | None = None,
        batch: Any = None,
        calibrate_samples: int = 1000,
        method: Method | None = None,
        layers: Layers = None,
        ert: float = 10_000,
        fpr: float = 0.01,
        sinks: Sequence[Sink] = (),
        name: str = "OODMonitor",
        progress: bool = True,
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"Expected an Accelerator, got {type(accelerator).__name__}.")
        check_method(method, detector)
        self.alerts: list[Alert] = []
        self.recorded: dict[str, StageScores] = {}
        self._accelerator, self._name = accelerator, text("name", name)
        self._module = accelerator.unwrap_model(model)
        own = detector if isinstance(detector, Detector) else None
        made = None if batch is None else function("batch", batch)
        _check_is_of(adapter if own is None else own.adapter, self._module)
        self._watched = WatchedModel(adapter, batch=made, detector=own)
        self._detectors = Detectors(
            self._watched, detector, method, checked_layers(layers), name, _REMEDY
        )
        most = whole("calibrate_samples", calibrate_samples, 1)
        self._calibrator = Calibrator(
            None, self._detectors, most, progress=flag("progress", progress)
        )
        self._ert, self._fpr = number("ert", ert, 2, ends="[)"), number("fpr", fpr, 0, 1, ends="()")
        self._sinks = [LeftOpen(function("a sink", sink)) for sink in items("sinks", sinks)]

    @property
    def detector(self) -> Detector | None:
        """The detector; None before calibration."""
        return self._detectors.current

    def calibrate(self, held_out: Iterable[Batch]) -> Detector:
        """Fit on held-out data, of the weights that the model has; all processes must call it.

        Args:
            held_out: Batches that can be gone through again. Of a loader that accelerate has
                prepared each process takes its own, else they take turns.

        Raises:
            RuntimeError: Another process failed.
            Exception: What made this one fail.
        """
        return self._calibrator.fit(self._run, batches("held_out", held_out))

    def watch(self, loader: Iterable[Batch], *, stage: str = "watch") -> list[Alert]:
        """Score all samples of a loader in a pass of its own, and decide; all must call it.

        Args:
            loader: As of :meth:`calibrate`.
            stage: Names the stream.

        Returns:
            The alerts, the same in all processes.

        Raises:
            RuntimeError: Another process failed.
            ValueError: There is no detector, no sample, a loader whose samples several processes
                cannot share out, or what :meth:`~ood_monitor.Detector.score` refuses.
            Exception: What made this one fail.
        """
        text("stage", stage)
        run, held_out = self._run, batches("loader", loader)
        with run.evaluating():
            with run.world.agreed():
                current, size = self._scored(run, held_out)
            found = current.gathered(run.world)
            if not len(found):
                raise ValueError(
                    f"Expected samples to watch, got none of {type(loader).__name__}: an iterator "
                    "gives its batches once."
                )
            with self._monitor(current, stage) as monitor:
                alerts = current.decide(monitor, found, size)
                if monitor.samples_seen:
                    monitor.summarise()
        self.recorded[stage] = current.recorded
        self.alerts += alerts
        return alerts

    def _scored(self, run: "_Run", source: Iterable[Batch]) -> tuple[BufferedStage, int | None]:
        """This process's share, and the samples of a batch."""
        ready = self._detectors.ready(self._module)
        if ready is None:
            raise ValueError(f"Expected a detector, got none. {_REMEDY}")
        stage = BufferedStage(ready.detector, run.world.lockstep(ready.detector.adapter.module))
        data = run.held_out(source)
        for batch, index, at in data.batches(run.transferred, _ALL):
            own = self._watched.prepared(batch)
            place = index, at, batch_size(own)
            rows = data.positions.counted(*place)
            stage.take(ready.detector.score(own), data.positions.of(*place), rows)
        return stage, data.positions.batch_size(0)

    def _monitor(self, current: BufferedStage, stage: str) -> Monitor:
        sinks = self._sinks if self._accelerator.is_main_process else []
        name = f"{self._name}/{stage}"
        return Monitor(current.detector, ert=self._ert, fpr=self._fpr, name=name, sinks=sinks)

    @property
    def _run(self) -> "_Run":
        return _Run(self._accelerator, self._module)


def _check_is_of(adapter: object, model: nn.Module) -> None:
    """Refuse an adapter of another model than is trained.

    Raises:
        ValueError: It is one.
    """
    if not isinstance(adapter, Adapter):
        return
    own = set(map(id, model.modules()))
    if not any(id(part) in own for part in adapter.module.modules()):
        raise ValueError(
            f"Expected an adapter of the model that is given, {type(model).__name__}, got one of "
            f"another {type(adapter.module).__name__}, which has no part in common with it."
        )


#: Samples of a pass over all of a loader.
_ALL = 1 << 62


@dataclass(frozen=True)
class _Run:
    """See :class:`~ood_monitor_integrations.training.calibration.Run`."""

    accelerator: Accelerator
    module: nn.Module
    is_short: bool = False

    @property
    def world(self) -> World:
        return World.of(self.accelerator.num_processes)

    def held_out(self, source: Iterable[Batch] | None) -> HeldOut:
        assert source is not None
        if not isinstance(source, DataLoaderShard | DataLoaderDispatcher):
            return own_data(asked(source, self.world), self.world)
        is_stream = isinstance(source.dataset, IterableDataset)
        if is_stream or getattr(source, "batch_sampler", None) is None:
            raise ValueError(
                "Expected a prepared loader of a dataset with indices, got one of a stream: give "
                "the loader as it was before `accelerator.prepare`, of which processes take turns."
            )
        batches = Asked(source.batch_sampler)
        own = DataLoader(source.dataset, batch_sampler=batches, collate_fn=source.collate_fn)
        is_alone = self.world.size == 1
        positions = Positions(own, World()) if is_alone else positions_of(source, self.world)
        return HeldOut(_Plain(own), length_of(source), World(), positions, [source])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with kept_global_state(), torch.no_grad(), plain_forward(self.module):
            yield

    def transferred(self, batch: Batch, at: int) -> Batch:
        return batch


@dataclass(frozen=True)
class _Plain:
    """Each batch of a loader with its index: one that accelerate does not count its steps by."""

    loader: Any

    def __iter__(self) -> Iterator[tuple[Batch, int, int]]:
        return ((batch, index, 0) for index, batch in enumerate(self.loader))
