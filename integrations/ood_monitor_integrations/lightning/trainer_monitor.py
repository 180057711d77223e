"""The monitors of the stages of a Trainer one after the other: begin, score, decide, report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ood_monitor import Alert, Monitor, Scores
from ood_monitor.adapters.base import Batch
from ood_monitor.alerts import Sink
from ood_monitor.modules import is_sharded
from ood_monitor_integrations.lightning.loggers import (
    is_mlflow,
    mlflow_sinks,
    write,
)
from ood_monitor_integrations.lightning.telling import logger_sinks, step_of
from ood_monitor_integrations.lightning.worlds import world_of
from ood_monitor_integrations.metrics import STATUSES, metrics_of, prefix_of
from ood_monitor_integrations.training import options
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.console import ConsoleSink
from ood_monitor_integrations.training.detectors import Detectors, Ready
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.figures import figures
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.loading import samples_in
from ood_monitor_integrations.training.stage_monitor import StageMonitor
from ood_monitor_integrations.training.stage_scores import StageScores, are_those_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["FAILED", "REFUSED", "Settings", "TrainerMonitor"]

#: Kinds of failure.
FAILED: Final = "could not score a batch"
REFUSED: Final = "will not watch"

#: Samples between two looks at whether the weights are still the detector's.
_WEIGHTS_EVERY = 10_000

_NOT_AVERAGED = (
    " After `fit`, Lightning's weight averaging loads a checkpoint's weights of the last step, not "
    "the averaged ones: test these by a Trainer without that callback."
)


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """What the user chose; see :class:`~ood_monitor_integrations.lightning.OODMonitor`.

    Attributes:
        stages: Those to watch.
        words: Of the names of its metrics, before that of the stage.
    """

    stages: frozenset[str]
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
        self._stale: set[str] = set()
        self._stage, self._written = "", 0
        self._predicted = 0  # samples, by the stages before: a logger's steps only grow

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
        if self._stage == "predict" and self.monitor is not None:
            self._predicted += self.monitor.samples_seen
        self.current, self._stage, self._written = None, stage, 0
        self.recorded.pop(stage, None)  # those of the run before
        self.positions = Positions(loaders, world_of(trainer))
        if stage not in self._settings.stages:
            return
        world = world_of(trainer)
        same = self._is_same(world) if is_sharded(pl_module) else True
        monitor = self._made(trainer, pl_module, stage) if same else None
        everywhere = self._is_everywhere(monitor, world)
        if monitor is not None and everywhere:
            self.monitor = monitor
            self.current = StageMonitor(
                monitor,
                self.positions,
                world,
                world.lockstep(monitor.detector.adapter.module),
                # A callback that averages weights takes them out again before the stage is over.
                explains_at_once=trainer.state.fn == "fit",
            )

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
            self._detectors.look_beside(trainer.ckpt_path)
            ready = self._detectors.ready(pl_module)
            if ready is not None:
                self._check_age(trainer, ready)
                name, sinks = f"{self._settings.name}/{stage}", self._sinks_of(trainer, stage)
                ert, fpr = self._settings.ert, self._settings.fpr
                every = 0 if trainer.state.fn == "fit" or is_sharded(pl_module) else _WEIGHTS_EVERY
                options: dict[str, Any] = {"name": name, "sinks": sinks, "weights_every": every}
                return Monitor(ready.detector, ert=ert, fpr=fpr, **options)
        if trainer.state.fn != "fit" and not self._failures.counts[REFUSED]:
            self._failures.tell(REFUSED, "it is not calibrated.")
        return None

    def _sinks_of(self, trainer: "Trainer", stage: str) -> list[Sink]:
        if not trainer.is_global_zero:
            return []
        sinks: list[Sink] = [*self._settings.sinks]
        sinks += [ConsoleSink()] if self._settings.console else []
        if self._settings.log_alerts:
            with self._failures.contained("could not reach a logger"):
                sinks += self._mlflow_sinks(trainer, stage)
            at = self._steps(trainer, stage)
            sinks += logger_sinks(trainer.loggers, self._prefix, at, self._failures)
        return sinks

    def _mlflow_sinks(self, trainer: "Trainer", stage: str) -> Iterator[Sink]:
        # The loggers have the metrics of other stages from Lightning itself.
        words = "/".join([*self._settings.words, stage])
        is_predict, first = stage == "predict", self._predicted
        return mlflow_sinks(trainer.loggers, words, metrics=is_predict, first_step=first)

    def _steps(self, trainer: "Trainer", stage: str) -> Callable[[Alert], int]:
        """Those of alerts, which are those of the stage's metrics."""
        step, predicted = step_of(trainer), self._predicted
        return lambda alert: predicted + alert.samples_seen if stage == "predict" else step

    def _check_age(self, trainer: "Trainer", ready: Ready) -> None:
        """Warn once of each detector that is of other weights than the model has."""
        mark = ready.detector.fitted.fingerprint
        if mark in self._stale or not ready.is_stale:
            return
        self._stale.add(mark)
        if not ready.is_read:  # else the detector has told of it itself
            why = self._detectors.changed()
            if trainer.ckpt_path and any(_averages(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                why += _NOT_AVERAGED
            self._failures.tell("watches with a stale calibration", why)

    def take(
        self, trainer: "Trainer", batch: Batch, batch_idx: int, dataloader_idx: int
    ) -> Scores | None:
        """The scores of a batch of the stage; None if it is not scored, or could not be.

        While predicting, the loggers get figures now and then.
        """
        watch, scores = self.current, None
        if watch is None:
            return None
        if batch_idx % self._settings.every == 0:
            scores = self._scores(watch, batch, batch_idx, dataloader_idx)
        if self._stage == "predict":
            self._write_now_and_then(trainer, watch, batch_idx)
        return scores

    def _scores(
        self, watch: StageMonitor, batch: Batch, batch_idx: int, dataloader_idx: int
    ) -> Scores | None:
        invalid = watch.monitor.invalid
        try:
            own = self._detectors.model.prepared(batch)
            self.alerts += watch.take(own, batch_idx, dataloader_idx)
        except Exception as error:  # whatever a foreign model raises
            self._failures.tell(FAILED, error)
            with self._failures.contained("could not number a batch"):
                count = max(samples_in(batch), 1)
                self.alerts += watch.take_invalid(count, batch_idx, dataloader_idx)
            return None
        self._tell_invalid(watch.monitor.invalid - invalid)
        return watch.latest

    def finish(self, trainer: "Trainer", stage: str) -> None:
        """The stage is over: decide on what is left, log and write."""
        watch, self.current = self.current, None
        if watch is None:
            return
        with self._failures.contained("could not finish a stage"), torch.inference_mode(False):
            self.alerts += watch.finish()
            self.recorded[stage] = watch.recorded
            self._tell_of_calibration(watch)
            self._report(trainer, watch, stage)
            if watch.monitor.samples_seen:  # where the stream stands at the end of the stage
                watch.monitor.summarise()
            if self._settings.scores_dir is not None and trainer.is_global_zero:
                watch.recorded.write(self._settings.scores_dir, stage)
        watch.monitor.close()

    def _tell_of_calibration(self, watch: StageMonitor) -> None:
        """Warn of samples that are no news, since they have calibrated the detector."""
        scores = watch.recorded.scores
        calibration = watch.monitor.detector.fitted.calibration.scores
        if are_those_of(calibration, scores.score[scores.valid].double().numpy()):
            self._failures.tell(
                "has scored the samples that calibrated its detector",
                "their p-values say nothing of new data. Give others, or `held_out=` in `fit`.",
            )

    def _report(self, trainer: "Trainer", watch: StageMonitor, stage: str) -> None:
        if not watch.is_online:
            self._tell_invalid(watch.monitor.invalid)
        if stage == "predict":
            self._write(trainer, watch)
            self._write_loaders(trainer, watch)
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
        seen = watch.monitor.samples_seen
        if seen != self._written:
            self._written, step = seen, self._predicted + seen
            # An MLflow run has the figures from its sink.
            loggers = [logger for logger in trainer.loggers if not self._has_sink(logger)]
            write(loggers, metrics_of(watch.monitor.figures, self._prefix), step, self._failures)

    def _write_loaders(self, trainer: "Trainer", watch: StageMonitor) -> None:
        """Of each dataloader at the end of a prediction, if there are several."""
        found = figures(watch.recorded, self._settings.fpr)
        own = {f"{self._prefix}/{name}": value for name, value in found.items() if "/" in name}
        write(trainer.loggers, own, self._predicted + watch.monitor.samples_seen, self._failures)

    def _has_sink(self, logger: Any) -> bool:
        found = True  # one that cannot even be asked takes no figures
        with self._failures.contained("could not write its figures"):
            found = self._settings.log_alerts and is_mlflow(logger)
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
            self._failures.tell(
                "could not score samples",
                "values that are not finite, or what was told of their batch.",
            )


def _averages(callback: object) -> bool:
    """Whether it is a callback that holds averaged weights."""
    return getattr(callback, "_average_model", None) is not None
