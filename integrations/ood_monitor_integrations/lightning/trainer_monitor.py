"""The monitors of the stages of a Trainer one after the other: begin, score, decide, report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ood_monitor import Alert, Detector, Monitor
from ood_monitor.adapters.base import Batch
from ood_monitor.alerts import Sink
from ood_monitor.modules import is_sharded
from ood_monitor.saving.fitted import digest
from ood_monitor_integrations.lightning.collectives import World
from ood_monitor_integrations.lightning.detectors import Detectors
from ood_monitor_integrations.lightning.failures import Failures
from ood_monitor_integrations.lightning.indices import Positions
from ood_monitor_integrations.lightning.loggers import (
    LeftOpen,
    figures,
    is_mlflow,
    mlflow_sinks,
    write,
)
from ood_monitor_integrations.lightning.stage_monitor import StageMonitor
from ood_monitor_integrations.lightning.stage_scores import StageScores
from ood_monitor_integrations.metrics import STATUSES, metrics_of, prefix_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["FAILED", "REFUSED", "Settings", "TrainerMonitor"]

#: Kinds of failure.
FAILED, REFUSED = "could not score a batch", "will not watch"


@dataclass(frozen=True)
class Settings:
    """What the user chose; see :class:`~ood_monitor_integrations.lightning.OODMonitor`.

    Attributes:
        stages: Those to watch.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        every: Score every n-th batch.
        sinks: Told of alerts, and left open.
        scores_dir: Where to write scores, if anywhere.
        log_to_mlflow: Whether the run of an `MLFlowLogger` is told too.
        name: Of the streams.
        words: Of the names of its metrics, before that of the stage.
    """

    stages: frozenset[str]
    ert: float
    fpr: float
    every: int
    sinks: Sequence[LeftOpen]
    scores_dir: Path | None
    log_to_mlflow: bool
    name: str
    words: tuple[str, ...]


class TrainerMonitor:
    """The stages of a Trainer, of which one is watched at a time.

    Args:
        settings: What the user chose.
        detectors: Where the detector comes from.
        failures: Told of failures.
        log: Logs metrics by Lightning, with the options of `self.log_dict`.

    Attributes:
        monitor: That of the latest stage.
        current: The stage that is watched now, if one is.
        positions: Where the samples of the current stage stand.
        alerts: All alerts so far.
        recorded: What the latest run of each stage has given.
    """

    def __init__(
        self,
        settings: Settings,
        detectors: Detectors,
        failures: Failures,
        log: Callable[..., None],
    ) -> None:
        self.monitor: Monitor | None = None
        self.current: StageMonitor | None = None
        self.positions = Positions(None, World())
        self.alerts: list[Alert] = []
        self.recorded: dict[str, StageScores] = {}
        self._settings, self._detectors = settings, detectors
        self._failures, self._log = failures, log
        self._is_stale, self._stage, self._written = False, "", 0

    def abandon(self) -> None:
        """Deliver what was raised so far; the stage ends here."""
        watch, self.current = self.current, None
        if watch is not None:
            self.alerts += watch.monitor.explain()
            watch.monitor.close()

    def begin(
        self, trainer: "Trainer", pl_module: "LightningModule", stage: str, loaders: object
    ) -> None:
        """A stage begins; it is watched if it should be and there is a detector everywhere."""
        self.current, self._stage, self._written = None, stage, 0
        self.positions = Positions(loaders, World.of(trainer))
        if stage not in self._settings.stages:
            return
        world = World.of(trainer)
        same = self._is_same(world) if is_sharded(pl_module) else True
        monitor = self._made(trainer, pl_module, stage) if same else None
        everywhere = self._is_everywhere(monitor, world)
        if monitor is not None and everywhere:
            self.monitor = monitor
            lockstep = world.lockstep(monitor.detector.adapter.module)
            self.current = StageMonitor(monitor, self.positions, world, lockstep)

    def _is_same(self, world: World) -> bool:
        """Whether all processes have the same detector, or none: they read weights together."""
        is_same = False
        with self._failures.contained(REFUSED):
            with world.agreed():
                mark = self._detectors.mark()
            is_same = len(set(world.gathered(mark))) == 1
            if not is_same:
                self._failures.tell(REFUSED, "the processes have not the same detector.")
        return is_same

    def _is_everywhere(self, monitor: Monitor | None, world: World) -> bool:
        """Whether no process is without a monitor: they meet again at the end of the stage."""
        is_everywhere = False
        with self._failures.contained(REFUSED):
            is_everywhere = b"" not in world.gathered(b"" if monitor is None else b"1")
        return is_everywhere

    def _made(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> Monitor | None:
        with self._failures.contained(REFUSED):
            before, detector = self._detectors.current, self._detectors.ready(pl_module)
            if detector is not None:
                # Who loads a stale one is told by the detector itself.
                self._check_age(trainer, detector, is_told=detector is not before)
                name, sinks = f"{self._settings.name}/{stage}", self._sinks_of(trainer, stage)
                ert, fpr = self._settings.ert, self._settings.fpr
                return Monitor(detector, ert=ert, fpr=fpr, name=name, sinks=sinks, weights_every=0)
        if trainer.state.fn != "fit" and not self._failures.counts[REFUSED]:
            self._failures.tell(REFUSED, "it is not calibrated.")
        return None

    def _sinks_of(self, trainer: "Trainer", stage: str) -> list[Sink]:
        sinks: list[Sink] = []
        if trainer.is_global_zero:
            sinks += self._settings.sinks
            with self._failures.contained("could not reach MLflow"):
                sinks += self._mlflow_sinks(trainer, stage) if self._settings.log_to_mlflow else ()
        return sinks

    def _mlflow_sinks(self, trainer: "Trainer", stage: str) -> Iterator[Sink]:
        # The loggers have the metrics of other stages from Lightning itself.
        words = "/".join([*self._settings.words, stage])
        return mlflow_sinks(trainer.loggers, words, metrics=stage == "predict")

    def _check_age(self, trainer: "Trainer", detector: Detector, *, is_told: bool) -> None:
        """Warn once if a model in training is watched with what was learned of it before."""
        if trainer.state.fn != "fit" or self._is_stale:
            return
        self._is_stale = digest(detector.adapter.module) != detector.fitted.model
        if self._is_stale and not is_told:
            told = "the model in training is no longer the one that the detector was fitted on."
            self._failures.tell("watches with a stale calibration", told)

    def take(self, trainer: "Trainer", batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        """Score a batch of the stage; while predicting, the loggers get figures now and then."""
        watch = self.current
        if watch is None:
            return
        if batch_idx % self._settings.every == 0:
            invalid = watch.monitor.invalid
            with self._failures.contained(FAILED):
                self.alerts += watch.take(batch, batch_idx, dataloader_idx)
            self._tell_invalid(watch.monitor.invalid - invalid)
        if self._stage == "predict":
            self._write_now_and_then(trainer, watch, batch_idx)

    def finish(self, trainer: "Trainer", stage: str) -> None:
        """The stage is over: decide on what is left, log and write."""
        watch, self.current = self.current, None
        if watch is None:
            return
        with self._failures.contained("could not finish a stage"), torch.inference_mode(False):
            self.alerts += watch.finish()
            self.recorded[stage] = watch.recorded
            self._report(trainer, watch, stage)
            if watch.monitor.samples_seen:  # where the stream stands at the end of the stage
                watch.monitor.summarise()
            if self._settings.scores_dir is not None and trainer.is_global_zero:
                watch.recorded.write(self._settings.scores_dir, stage)
        watch.monitor.close()

    def _report(self, trainer: "Trainer", watch: StageMonitor, stage: str) -> None:
        if not watch.is_online:
            self._tell_invalid(watch.monitor.invalid)
        if stage == "predict":
            self._write(trainer, watch)
        elif watch.monitor.samples_seen and not trainer.barebones:
            self._log_stage(self._figures(watch), several=not watch.is_online)

    def _log_stage(self, metrics: dict[str, float], *, several: bool) -> None:
        """By Lightning, which then has them for other callbacks; the progress bar has one."""
        shown = f"{self._prefix}/flagged_rate"
        for name, value in metrics.items():
            self._log({name: value}, on_epoch=True, prog_bar=name == shown, sync_dist=several)

    def _write_now_and_then(self, trainer: "Trainer", watch: StageMonitor, batch_idx: int) -> None:
        """As often as Lightning logs steps: it takes no metrics of a prediction itself."""
        every = getattr(trainer, "log_every_n_steps", 0)
        if watch.is_online and every and (batch_idx + 1) % every == 0:
            self._write(trainer, watch)

    def _write(self, trainer: "Trainer", watch: StageMonitor) -> None:
        step = watch.monitor.samples_seen
        if step != self._written:
            self._written = step
            # An MLflow run has the figures from its sink.
            loggers = [logger for logger in trainer.loggers if not self._has_sink(logger)]
            write(loggers, metrics_of(watch.monitor.figures, self._prefix), step, self._failures)

    def _has_sink(self, logger: Any) -> bool:
        found = True  # one that cannot even be asked takes no figures
        with self._failures.contained("could not write its figures"):
            found = self._settings.log_to_mlflow and is_mlflow(logger)
        return found

    @property
    def _prefix(self) -> str:
        return prefix_of(*self._settings.words, self._stage)

    def _figures(self, watch: StageMonitor) -> dict[str, float]:
        """The metrics of a stage that has ended."""
        found = {"status": STATUSES[watch.monitor.status]}
        found |= figures(watch.recorded, self._settings.fpr) | {"log_e_value": watch.log_e_value}
        return {f"{self._prefix}/{name}": value for name, value in found.items()}

    def _tell_invalid(self, count: int) -> None:
        if count:
            self._failures.tell("could not score samples", "values that are not finite.")
