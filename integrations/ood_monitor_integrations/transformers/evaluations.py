"""Evaluations and predictions of a Trainer: scored batch by batch, decided on at their end."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, Final

import numpy as np
import torch

from ood_monitor import Alert, Detector, Monitor, Scores
from ood_monitor.adapters.base import batch_size
from ood_monitor.alerts import Sink
from ood_monitor.monitor.scoring import scored
from ood_monitor.statistics.live import LivePass
from ood_monitor_integrations.accelerate.forward import plain_forward
from ood_monitor_integrations.accelerate.positions import positions_of
from ood_monitor_integrations.metrics import STATUSES
from ood_monitor_integrations.training.buffered import BufferedStage
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.console import ConsoleSink
from ood_monitor_integrations.training.detectors import Detectors, Ready
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.figures import figures
from ood_monitor_integrations.training.indices import Indices, Places, Positions
from ood_monitor_integrations.training.loading import samples_in
from ood_monitor_integrations.training.options import Settings
from ood_monitor_integrations.training.stage_scores import StageScores, are_those_of
from ood_monitor_integrations.transformers.batches import Texts
from ood_monitor_integrations.transformers.mlflow_run import MLflowRun
from ood_monitor_integrations.transformers.runs import TransformersRun, is_indexed

__all__ = ["FAILED", "REFUSED", "Evaluations"]

#: Kinds of failure.
FAILED: Final = "could not score a batch"
REFUSED: Final = "will not watch"

#: Why the model may not have been given labels that the loader has.
_NO_LABELS = (
    "The model was given no labels: where they are in the data, `label_smoothing_factor=`, "
    "`compute_loss_func=` or a `compute_loss` of your own has taken them out before. Leave them "
    "there; of label smoothing, `trainer.label_smoother = None` before a prediction does."
)

_OTHER_ORDER = (
    "the loader of an evaluation does not tell their indices in the dataset, as by "
    "`train_sampling_strategy='group_by_length'` or `dataloader_in_order=False`. `dataset_index` "
    "is then the row of the Trainer's own predictions."
)

#: Samples between two looks at whether the weights are still the detector's.
_WEIGHTS_EVERY = 10_000


class Evaluations:
    """One evaluation after the other.

    Args:
        settings: What the user chose.
        detectors: Where the detector comes from.
        failures: Told of failures.
        mlflow_run: That the Trainer reports to.
        texts: Makes samples of batches.

    Attributes:
        monitor: That of the latest one that was decided on.
        alerts: All alerts so far.
        recorded: What the latest of each stage has given.
        mlflow_run: That the Trainer reports to.
    """

    def __init__(
        self,
        settings: Settings,
        detectors: Detectors,
        failures: Failures,
        mlflow_run: MLflowRun,
        texts: Texts,
    ) -> None:
        self.monitor: Monitor | None = None
        self.alerts: list[Alert] = []
        self.recorded: dict[str, StageScores] = {}
        self._settings, self._detectors, self._failures = settings, detectors, failures
        self.mlflow_run, self._texts = mlflow_run, texts
        self._seen: dict[str, int] = {}  # samples of a stage so far: a run's steps only grow
        self._told: set[str] = set()
        self._listening = ExitStack()
        self.drop()

    def drop(self, loader: Any = None) -> None:
        """Forget an evaluation that was not ended, as one that has failed.

        Args:
            loader: That of the next one.
        """
        self._stage: BufferedStage | None = None
        self._loader = loader
        self._positions: Places = Positions(None, World())
        self._batch_idx, self._is_busy = 0, False
        if loader is None:
            self._given: list[Mapping[str, Any]] = []
            self._live: tuple[LivePass, Any, Detector] | None = None
            self._listening.close()

    def give(self, batch: Mapping[str, Any]) -> None:
        """The model is given a batch, of which it is not known yet whether it is evaluated."""
        self._given = [*self._given[-1:], batch]
        self._live = None
        # Of the first batch nobody knows yet that it is one: it may be of another's Trainer.
        detector = None if self._stage is None else self._stage.detector
        is_scored = self._batch_idx % self._settings.every == 0
        if detector is not None and is_scored and not self._is_busy:
            with suppress(Exception):  # scoring makes a pass of its own then, and says why
                self._listen(detector, batch)

    def _listen(self, detector: Detector, batch: Mapping[str, Any]) -> None:
        """Listen to the pass that begins, if it is the one that scoring would make."""
        module, samples = detector.adapter.module, self._texts(batch)
        is_plain = not any("_original_forward" in vars(part) for part in module.modules())
        is_whole = self._texts.rows is None and samples.get("input_ids") is batch.get("input_ids")
        if not (is_plain and is_whole) or torch.is_grad_enabled():
            return
        live = detector.live(samples)
        if live is not None:
            self._listening.enter_context(live.listening())
            self._live = live, samples, detector

    def gave(self, output: Any) -> None:
        """The pass has ended."""
        if self._is_busy:
            return
        self._listening.close()
        logits = getattr(output, "logits", None)
        if self._live is not None and isinstance(logits, torch.Tensor):
            self._live[0].ended(logits)

    def given(self) -> list[Mapping[str, Any]]:
        """The latest batches, two at most, that the model was given since this was last asked."""
        given, self._given = self._given, []
        # Before the first the model may have run for anybody.
        return given if self._batch_idx else given[-1:]

    def is_of(self, loader: Any) -> bool:
        """Whether the evaluation that runs goes through this loader."""
        return self._loader is loader

    def begin(self, run: TransformersRun) -> None:
        """The first batch of an evaluation is through."""
        with self._failures.contained(REFUSED):
            self._positions = positions_of(self._loader, run.world)
            if self._positions.loaded(0, 0) is None and is_indexed(self._loader):
                self._failures.tell("numbers samples as they are loaded", _OTHER_ORDER)
            ready = self._ready(run)
            if ready is not None:
                lockstep = run.world.lockstep(ready.detector.adapter.module)
                self._stage = BufferedStage(ready.detector, lockstep)

    def _ready(self, run: TransformersRun) -> Ready | None:
        ready = self._detectors.ready(run.module)
        if ready is None:
            self._failures.tell(REFUSED, "it is not calibrated.")
        elif ready.is_stale and ready.detector.fitted.fingerprint not in self._told:
            self._told.add(ready.detector.fitted.fingerprint)
            if not ready.is_read:  # else the detector has told of it itself
                self._failures.tell("watches with a stale calibration", self._detectors.changed())
        return ready

    def take(self, run: TransformersRun, given: list[Mapping[str, Any]]) -> None:
        """A batch is through: score it.

        Args:
            run: The training.
            given: What :meth:`given` gave of it.
        """
        index, self._batch_idx = self._batch_idx, self._batch_idx + 1
        if self._stage is None or index % self._settings.every:
            return
        self._is_busy = True
        try:
            with plain_forward(run.model):
                self._score(self._stage, given, index)
        except Exception as error:  # whatever a foreign model raises
            self._failures.tell(FAILED, error)
            self._take_invalid(self._stage, given, index)
        finally:
            self._is_busy = False
        self._given = []  # a model that has no copy for scoring has run itself

    def _score(self, stage: BufferedStage, given: list[Mapping[str, Any]], index: int) -> None:
        if len(given) != 1:
            got = "none" if not given else "several"
            raise ValueError(
                "Expected one pass of the model by keywords for each batch of an evaluation, got "
                f"{got}: give the callback as `Trainer(callbacks=[...])`, leave `trainer.model` as "
                "it is, and let `compute_loss` run `model(**inputs)` once. None of generation is "
                "scored."
            )
        (batch,) = given
        samples = self._texts(batch)
        try:
            scores = self._heard(stage) or scored(stage.detector, samples)
        except ValueError as error:
            raise error if "labels" in batch else ValueError(f"{error} {_NO_LABELS}") from error
        if not scores.valid.all():
            self._failures.tell(
                "could not score samples",
                "values that are not finite, or what the log of ood_monitor says.",
            )
        dataset, rows = self._places(index, batch_size(samples))
        stage.take(scores, dataset, rows)

    def _take_invalid(
        self, stage: BufferedStage, given: list[Mapping[str, Any]], index: int
    ) -> None:
        """Keep samples that could not be scored as such: what nobody has looked at is not OK."""
        with self._failures.contained("could not number a batch"):
            count = self._positions.loaded(index, 0) or max(map(samples_in, given), default=1)
            dataset = self._positions.of(index, 0, count)
            rows = self._positions.counted(index, 0, count)
            stage.take(Scores.none().among(count, []), dataset, rows)

    def _heard(self, stage: BufferedStage) -> Scores | None:
        """By the evaluation's own pass; None where that is not what scoring needs."""
        live, self._live = self._live, None
        if live is None or not live[0].is_over or live[2] is not stage.detector:
            return None
        try:
            return stage.detector.score(live[1], live=live[0])
        except ValueError:  # of padding before a text: scoring makes a pass of its own, and says
            return None

    def _places(self, index: int, count: int) -> tuple[Indices, Indices]:
        """Where the samples of a batch stand, and which of them count.

        Of rows without a token to score there are none, and the others keep their places.
        """
        kept = np.arange(count) if self._texts.rows is None else np.array(self._texts.rows)
        total = count if self._texts.rows is None else self._texts.count
        dataset = self._positions.of(index, 0, total)
        counted = self._positions.counted(index, 0, total)
        return dataset[kept], np.flatnonzero(np.isin(kept, counted))

    def finish(self, run: TransformersRun, stage: str, *, is_fit: bool) -> dict[str, float]:
        """It is over, and known by its name: decide, tell, and give its figures."""
        current, self._stage = self._stage, None
        self.recorded.pop(stage, None)
        found: dict[str, float] = {}
        with self._failures.contained("could not finish a stage"), torch.inference_mode(False):
            if self._is_watched_everywhere(run.world, current) and current is not None:
                found = self._decided(run, current, stage, is_fit=is_fit)
        self.drop()
        return found

    def _is_watched_everywhere(self, world: World, current: BufferedStage | None) -> bool:
        """Whether all processes have scores; one that has none leaves the others without.

        Raises:
            RuntimeError: Some have.
        """
        told = world.numbers(0 if current is None else 1)
        if 0 < sum(told) < world.size:
            raise RuntimeError(
                f"Expected all {world.size} processes to watch an evaluation, got {sum(told)}."
            )
        return sum(told) > 0

    def _decided(
        self, run: TransformersRun, current: BufferedStage, stage: str, *, is_fit: bool
    ) -> dict[str, float]:
        whole = current.gathered(run.world)
        size = self._positions.batch_size(0)
        first = self._seen.get(stage, 0)
        with self._monitor(run, current, stage, first, is_fit=is_fit) as monitor:
            self.monitor = monitor
            self.alerts += current.decide(monitor, whole, size)
            self.recorded[stage] = current.recorded
            self._tell_of_calibration(current)
            if monitor.samples_seen:
                monitor.summarise()
            self._seen[stage] = first + monitor.samples_seen
            found = figures(current.recorded, self._settings.fpr)
            status = float(STATUSES[monitor.status])
        if self._settings.scores_dir is not None and _is_first(run):
            current.recorded.write(self._settings.scores_dir, stage.replace("/", "-"))
        return {"status": status, **found, "log_e_value": current.log_e_value}

    def _monitor(
        self, run: TransformersRun, current: BufferedStage, stage: str, first: int, *, is_fit: bool
    ) -> Monitor:
        settings = self._settings
        return Monitor(
            current.detector,
            ert=settings.ert,
            fpr=settings.fpr,
            name=f"{settings.name}/{stage}",
            sinks=self._sinks(run, stage, first),
            weights_every=0 if is_fit else _WEIGHTS_EVERY,
        )

    def _sinks(self, run: TransformersRun, stage: str, first: int) -> list[Sink]:
        if not _is_first(run):
            return []
        sinks: list[Sink] = [*self._settings.sinks]
        sinks += [ConsoleSink()] if self._settings.console else []
        if self._settings.log_alerts:
            with self._failures.contained("could not reach MLflow"):
                sinks += self.mlflow_run.sinks(stage, first)
        return sinks

    def _tell_of_calibration(self, current: BufferedStage) -> None:
        """Warn of samples that are no news, since they have calibrated the detector."""
        scores = current.recorded.scores
        calibration = current.detector.fitted.calibration.scores
        if are_those_of(calibration, scores.score[scores.valid].double().numpy()):
            self._failures.tell(
                "has scored the samples that calibrated its detector",
                "their p-values say nothing of new data. Give others, or `held_out=`.",
            )


def _is_first(run: TransformersRun) -> bool:
    return run.state is None or run.state.is_world_process_zero
