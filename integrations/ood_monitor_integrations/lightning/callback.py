"""The callback: its options, and what it has found."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ood_monitor import Alert, Detector, Monitor, Scores, TrainingStream
from ood_monitor.adapters.base import Batch
from ood_monitor.alerts import Sink
from ood_monitor.checks import (
    batches,
    flag,
    text,
    whole,
)
from ood_monitor.densities.parts import Method
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor_integrations.lightning.handover import Handover
from ood_monitor_integrations.lightning.hooks import Hooks
from ood_monitor_integrations.lightning.namespaces import callback_class
from ood_monitor_integrations.lightning.predictions import Predictions
from ood_monitor_integrations.lightning.runs import LightningRun
from ood_monitor_integrations.lightning.saving import Checkpoints
from ood_monitor_integrations.lightning.trainer_monitor import (
    FAILED,
    Settings,
    TrainerMonitor,
)
from ood_monitor_integrations.lightning.worlds import begun
from ood_monitor_integrations.metrics import prefix_of, word_of
from ood_monitor_integrations.training.adapters import AdapterLike, WatchedModel
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.detectors import Detectors, check_method
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.gradients import FlaggedBatch, TrainingWatch
from ood_monitor_integrations.training.options import (
    Policy,
    checked_every,
    checked_held_out,
    checked_policy,
    checked_stages,
    checked_stream,
)
from ood_monitor_integrations.training.stage_scores import StageScores

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    Callback = callback_class()

__all__ = ["OODMonitor"]

Stage = Literal["train", "val", "validate", "test", "predict"]

_STAGES = ("train", "val", "test", "predict")
_OTHER_NAMES = {"validate": "val", "validation": "val"}

_NAME = "OODMonitor"

_REMEDY = (
    "Give the checkpoint that they are from as `ckpt_path=` or `detector=`, or make one by "
    "`OODMonitor.calibrate`."
)

_HANDED_OVER = (
    "was fitted in a process that the Trainer's strategy has launched, and has its state from "
    "there: the next stage watches with it, and checkpoints hold it. Here it becomes an object by "
    "`Detector.from_state_dict(callback.state_dict(), adapter)`."
)


class OODMonitor(Hooks):
    """Fits a detector for the weights of checkpoints, and watches what the model is fed.

    The training is not changed: weights, optimiser, random state and logged metrics are those of a
    run without it. If watching fails, this is counted and warned of once, and never raised into the
    loop.

    Validation, test and predict are each a stream with a :class:`~ood_monitor.Monitor` of its own,
    whatever the number of dataloaders. At the end of a stage metrics of all its samples are logged:
    ``ood/test/status`` (0 OK, 1 WARN, 2 ALERT), ``score_mean``, ``score_p95``, ``flagged_rate``,
    ``log_e_value`` (the strongest evidence of a drift) and ``invalid``. If there are several
    dataloaders, each also has its own, such as ``ood/test/1/score_mean``, except status and
    evidence, which belong to the stream. With a name they are ``ood/<name>/test/...``. While
    predicting, the loggers get running figures every ``Trainer(log_every_n_steps=)`` batches, and
    an MLflow run gets them as from any monitor.

    In several processes each scores its own batches. At the end of the stage all decide together on
    the whole, in the order of the dataset, so alerts come once, at the end, and are those of one
    process. The same holds for a model that `fully_shard` (FSDP2) has sharded under
    `ModelParallelStrategy`. Its detectors take no gradients, and ``"train"`` is not watched.

    The training stream looks at the gradients that the optimiser is about to use. It is a heuristic
    without a promise: see :class:`~ood_monitor.TrainingStream`. Its metrics of an epoch are
    ``ood/train/score_mean`` and ``ood/train/flagged_rate``; ``ood/train/score``, of one step, goes
    to the loggers every ``Trainer(log_every_n_steps=)``.

    Args:
        adapter: The model: an :class:`~ood_monitor.Adapter`; a function ``(module, x) -> (B,)``
            giving log-likelihoods in nats; or None for the LightningModule's own ``adapter()``,
            ``log_prob_terms`` or ``log_prob``.
        inputs: A function that takes the sample x, shape (B, ...), from a batch; by default the
            batch itself, or the first item of a list or tuple. Use it if ``adapter`` is a function
            or None.
        condition: A function that takes the model's further keywords from a batch, such as
            ``lambda batch: {"y": batch[1]}``.
        batch: A function that makes a batch of what a loader yields, before anything else sees it.
        detector: A detector to use, the folder of a saved one, or a checkpoint that holds one of
            this ``name`` or has its folder beside it (read as by
            :meth:`~ood_monitor.Detector.from_checkpoint`). A detector that is not fitted yet gives
            the settings for the one to fit.
        held_out: Held-out batches, gone through once for each calibration. The model is not trained
            on them, and no checkpoint is chosen by them. None takes the validation data.
        calibrate: Which checkpoints get a detector of their weights, while they are saved:
            ``"best"``, whenever a `ModelCheckpoint`'s monitored value has improved, and the last;
            ``"every checkpoint"``; ``"last"``; or ``"never"``. By default ``"best"`` if a value is
            monitored, else ``"last"``, and ``"never"`` if ``detector`` is a fitted one. The weights
            at the end of training get one, too. A warning at the end of training names the
            checkpoints that are kept without one.
        calibrate_samples: The most held-out samples of one calibration. If there are more, batches
            are left out evenly.
        calibrate_every_n_epochs: Calibrate before validation, too, in every n-th epoch, so that the
            validation of that epoch is watched by a detector of the weights that it runs with. It
            needs ``held_out``, since data that calibrated tell nothing new.
        watch: Which of ``"train"``, ``"val"``, ``"test"``, ``"predict"``. Validation within `fit`
            is watched only with ``detector`` or ``calibrate_every_n_epochs``.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        every_n_batches: Score every n-th batch of a stage only.
        method: Of the detector that is fitted: ``"gradient_norms"``, ``"forward"`` or ``"both"``;
            see :class:`~ood_monitor.Detector`.
        layers: Which parameters are features, by name pattern; all by default.
        training: Settings of the training stream, as a :class:`~ood_monitor.TrainingStream` that
            has seen nothing yet.
        sinks: Told of every alert, from rank 0; they are left open.
        scores_dir: Where to write ``scores-<stage>.npz`` at the end of a stage, from rank 0: a row
            per sample, with its index in the dataset.
        log_alerts: Also tell the Trainer's loggers of alerts: MLflow, TensorBoard and Weights &
            Biases by text and figures, a ``CSVLogger`` by files in ``ood/alerts/`` beside it.
        console: Print a line per alert, from rank 0.
        with_scores: Put ``ood/score`` and ``ood/p_value`` (``ood/<name>/score`` with a name), each
            (B,), beside what `predict_step` returns: prediction writers and `trainer.predict` get a
            dict of its items, or of the output as ``prediction`` if it is no mapping. They are nan
            where a batch was not scored.
        name: The stream's name, and what tells several monitors in one Trainer apart.
        progress: Show a progress bar where calibration takes a pass of its own.
        strict: Whether a model or a strategy that cannot be monitored is an error. If not, you get
            a warning, and the model is left alone.

    Raises:
        ValueError: ``watch`` names an unknown stage, an option is out of its range, or a method is
            none, or stands beside a detector that has its own.
        TypeError: An option of another type.
    """

    def __init__(
        self,
        adapter: AdapterLike | None = None,
        *,
        # Of any functions, since YAML's reader takes those alone that are annotated as is asked.
        inputs: Callable[[Any], Any] | None = None,
        condition: Callable[[Any], Any] | None = None,
        batch: Callable[[Any], Any] | None = None,
        detector: str | Path | Detector | None = None,
        held_out: Iterable[Any] | None = None,
        calibrate: Policy | None = None,
        calibrate_samples: int = 1000,
        calibrate_every_n_epochs: int | None = None,
        watch: Sequence[Stage] = ("test", "predict"),
        ert: float = 10_000,
        fpr: float = 0.01,
        every_n_batches: int = 1,
        method: Method | None = None,
        layers: Layers = None,
        training: TrainingStream | None = None,
        sinks: Sequence[Sink] = (),
        scores_dir: str | Path | None = None,
        log_alerts: bool = True,
        console: bool = True,
        with_scores: bool = False,
        name: str = _NAME,
        progress: bool = True,
        strict: bool = True,
    ) -> None:
        self._stages = checked_stages(watch, _STAGES, _OTHER_NAMES)
        check_method(method, detector)
        self._name, self._strict = text("name", name), flag("strict", strict)
        self._words = words = () if name == _NAME else (word_of(name),)
        self._of_training = prefix_of(*words, "train")
        self._failures = Failures(name)
        layers = checked_layers(layers)
        model = WatchedModel(
            adapter,
            inputs=inputs,
            condition=condition,
            batch=batch,
            detector=detector if isinstance(detector, Detector) else None,
        )
        self._detectors = Detectors(model, detector, method, layers, name, _REMEDY)
        self._needs_detector = bool(self._stages - {"train"})
        self._every_n_epochs = checked_every(
            "calibrate_every_n_epochs", calibrate_every_n_epochs, held_out
        )
        self._calibrator = Calibrator(
            checked_held_out(held_out),
            self._detectors,
            whole("calibrate_samples", calibrate_samples, 1),
            progress=flag("progress", progress),
        )
        policy = checked_policy(
            calibrate, is_given=self._detectors.is_given, is_needed=self._needs_detector
        )
        self._checkpoints = Checkpoints(
            policy,
            self._calibrator,
            self._detectors,
            self._failures,
            self.state_key,
        )
        self._training = TrainingWatch(checked_stream(training), layers, name)
        settings = Settings.checked(
            ert=ert,
            fpr=fpr,
            every_n_batches=every_n_batches,
            sinks=sinks,
            scores_dir=scores_dir,
            log_alerts=log_alerts,
            console=console,
            name=name,
            stages=self._stages,
            words=words,
        )
        self._fpr = settings.fpr
        self._trainer_monitor = TrainerMonitor(settings, self._detectors, self._failures, self._log)
        self._with_scores = _checked_with_scores(with_scores, self._stages)
        self._predictions = Predictions(prefix_of(*words), self._failures)
        self._handover = Handover()

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the latest stage; None before one is watched."""
        return self._trainer_monitor.monitor

    @property
    def alerts(self) -> list[Alert]:
        """All alerts raised so far, the same in all processes."""
        return self._trainer_monitor.alerts

    @property
    def detector(self) -> Detector | None:
        """The detector; None before calibration."""
        self._take_over()
        if self._detectors.current is None and self._handover.has_taken:
            warnings.warn(f"{self._name}: {_HANDED_OVER} [OOD513]", stacklevel=2)
        return self._detectors.current

    @property
    def failures(self) -> int:
        """Batches that could not be scored."""
        return self._failures.counts[FAILED]

    @property
    def flagged_batches(self) -> tuple[FlaggedBatch, ...]:
        """Training batches that were flagged, the oldest first; the latest thousand."""
        return tuple(self._training.flagged)

    def scores(self, stage: Stage) -> Scores:
        """Scores of all samples of a stage, when it was last run; without layers.

        In one process in the order of the stream, in several in the order of the dataset.

        Raises:
            ValueError: The stage was not watched, or not to its end.
        """
        return self.recorded(stage).scores

    def recorded(self, stage: Stage) -> StageScores:
        """As :meth:`scores`, with the place of each sample in the dataset.

        Raises:
            ValueError: As there.
        """
        key = "val" if stage == "validate" else stage
        found = self._trainer_monitor.recorded
        if key not in found:
            raise ValueError(f"Expected a stage of {sorted(found)}, got {stage!r}.")
        return found[key]

    def calibrate(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        loader: Iterable[Batch] | None = None,
    ) -> Detector:
        """Fit on a finished model, without training; in several processes all must call it.

        Args:
            trainer: The Trainer, of which `trainer.save_checkpoint` then saves the detector too,
                unless it saves weights alone.
            pl_module: The model.
            loader: Held-out batches; by default those that were chosen for the callback.

        Returns:
            The detector, which the callback watches with from now on.

        Raises:
            ValueError: The model has no log-likelihood, or what
                :meth:`~ood_monitor.Detector.fit` refuses.
            TypeError: One batch in the place of a loader.
            RuntimeError: Another process failed.
        """
        self._take_over()  # what is older than this
        trainer.strategy.barrier("OODMonitor.calibrate")  # raises where a process has ended
        begun(trainer)
        source = None if loader is None else batches("loader", loader)
        return self._calibrator.fit(LightningRun(trainer, pl_module), source)

    @property
    def state_key(self) -> str:
        """Distinguishes several monitors in one checkpoint."""
        return self._generate_state_key(name=self._name)

    def state_dict(self) -> dict[str, Any]:
        """Detector and training stream as primitives: the checkpoint loads as weights only.

        In a checkpoint, :meth:`on_save_checkpoint` puts the detector of its weights in the place.
        """
        self._take_over()
        state: dict[str, Any] = {}
        with self._failures.contained("has a detector that no checkpoint can hold"):
            state |= self._detectors.state_in_use()
        if streams := self._training.state_dict():
            state["training"] = streams
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state; the detector is made when the model has its weights."""
        with self._failures.contained("could not read the detector of a checkpoint"):
            if "config" in state_dict:
                self._detectors.load_state_dict(state_dict)
        with self._failures.contained("could not resume its training stream"):
            self._training.load_state_dict(state_dict.get("training", {}))


def _checked_with_scores(with_scores: bool, stages: frozenset[str]) -> bool:
    wanted = flag("with_scores", with_scores)
    if wanted and "predict" not in stages:
        raise ValueError(f"Expected 'predict' in watch for with_scores, got {sorted(stages)}.")
    return wanted
