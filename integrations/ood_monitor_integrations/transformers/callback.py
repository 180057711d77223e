"""The callback of transformers' Trainer: its options, and what it has found."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ood_monitor import Adapter, Alert, Detector, Monitor, Scores, TrainingStream
from ood_monitor.adapters.base import Batch
from ood_monitor.alerts import Sink
from ood_monitor.checks import flag, function, text, whole
from ood_monitor.densities.parts import Method
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor_integrations.training.adapters import AdapterLike, WatchedModel
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.detectors import Detectors, check_method
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.gradients import FlaggedBatch, TrainingWatch
from ood_monitor_integrations.training.options import (
    Policy,
    Settings,
    checked_every,
    checked_held_out,
    checked_policy,
    checked_stages,
    checked_stream,
)
from ood_monitor_integrations.training.stage_scores import StageScores
from ood_monitor_integrations.transformers.batches import Texts
from ood_monitor_integrations.transformers.checkpoints import Checkpoints
from ood_monitor_integrations.transformers.evaluations import FAILED, Evaluations
from ood_monitor_integrations.transformers.events import Events
from ood_monitor_integrations.transformers.mlflow_run import MLflowRun
from ood_monitor_integrations.transformers.models import adapter_of_model
from ood_monitor_integrations.transformers.runs import TransformersRun, is_dataset

__all__ = ["OODCallback"]

Stage = Literal["train", "eval", "predict"]

_OTHER_NAMES = {"val": "eval", "validation": "eval", "evaluation": "eval"}

_NAME = "OODMonitor"

_REMEDY = "Give the checkpoint that they are from as `detector=`, or make one by `calibrate`."


class OODCallback(Events):
    """Fits a detector for the weights of checkpoints, and watches what the model is fed.

    ::

        trainer = Trainer(model, args, ..., callbacks=[OODCallback(watch=["train", "predict"])])

    The training is not changed: weights, optimiser, losses and random state are those of a run
    without it. Whatever fails while watching is counted, warned of once, and never raised into the
    loop.

    Each evaluation and each prediction is a stream with a :class:`~ood_monitor.Monitor` of its own,
    which decides at its end; in several processes on the whole, in the order of the dataset. Its
    figures stand beside the Trainer's in the metrics that `evaluate` and `predict` return, such as
    ``eval_ood_flagged_rate``: ``status`` (0 OK, 1 WARN, 2 ALERT), ``score_mean``, ``score_p95``,
    ``flagged_rate``, ``log_e_value`` and ``invalid``. `metric_for_best_model` may name one.

    The training stream looks at the gradients that the optimiser is about to use. It is a heuristic
    without a promise: see :class:`~ood_monitor.TrainingStream`. A Trainer shows them after it has
    clipped them (`max_grad_norm`, 1 by default). In one process the size before is known, from the
    norms of two gradients before and after. In several, and with `fp16`, only the layers' shares of
    a clipped gradient are known.

    Args:
        adapter: The model: an :class:`~ood_monitor.Adapter`; a function ``(model, x) -> (B,)``
            giving log-likelihoods in nats; or None for a causal language model of transformers,
            whose tokens are scored where labels are not -100, or for a module's own ``adapter()``,
            ``log_prob_terms`` or ``log_prob``.
        adapter_of: In its place a function that makes an adapter of the model that is trained.
        inputs: Takes the sample x, shape (B, ...), from a batch; it is for a function or the
            module's own method.
        condition: Likewise gives the further keywords, such as ``lambda batch: {"y": batch["y"]}``.
        batch: Makes a batch of what the Trainer gives the model, before anything else sees it.
        detector: A detector to use, the folder of a saved one, or a checkpoint that holds one. One
            that is not fitted yet has the settings for the one to fit.
        held_out: A dataset, which the Trainer's collator makes batches of, or batches, that the
            model is not trained on: to go through once for each calibration. None takes the data
            that the Trainer evaluates on.
        calibrate: Which checkpoints get a detector of their weights, while they are saved:
            ``"best"``, whenever `metric_for_best_model` has improved, and the last;
            ``"every checkpoint"``; ``"last"``; or ``"never"``. By default it is the best where a
            metric decides, else the last, and never where ``detector`` brings one that is fitted.
            The weights at the end of training, after `load_best_model_at_end`, have one, too.
        calibrate_samples: The most held-out samples of one calibration. If there are more, batches
            are left out evenly.
        calibrate_every_n_evaluations: Calibrate at the beginning of every n-th evaluation within
            the training, too, so that it is watched by a detector of the weights that it runs with.
            It needs ``held_out``, since data that calibrated tell nothing new.
        watch: Which of ``"train"``, ``"eval"``, ``"predict"``. An evaluation within the training is
            watched only with ``detector`` or ``calibrate_every_n_evaluations``.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        every_n_batches: Score every n-th batch of an evaluation only.
        method: Of the detector that is fitted: ``"gradient_norms"``, ``"forward"`` or ``"both"``;
            see :class:`~ood_monitor.Detector`.
        layers: Which parameters are features, by name pattern; all by default.
        training: Settings of the training stream, as a :class:`~ood_monitor.TrainingStream` that
            has seen nothing yet.
        sinks: Told of every alert, from the first process; they are left open.
        scores_dir: Where to write ``scores-<stage>.npz`` at the end of an evaluation, from the
            first process: a row per sample, with its index in the dataset.
        log_alerts: Also show alerts and figures on the MLflow run that the Trainer reports to.
        console: Print a line per alert, from the first process.
        name: The stream's name, and what tells several callbacks of one Trainer apart.
        progress: Show a progress bar where calibration takes a pass of its own.
        strict: Whether a model or a Trainer that cannot be monitored is an error. If not, you get a
            warning, and the model is left alone.

    Raises:
        ValueError: ``watch`` names an unknown stage, an option is out of its range, or two options
            speak of the same thing.
        TypeError: An option of another type.
    """

    def __init__(
        self,
        adapter: AdapterLike | None = None,
        *,
        adapter_of: Callable[[nn.Module], Adapter] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        condition: Callable[[Any], Any] | None = None,
        batch: Callable[[Any], Any] | None = None,
        detector: str | Path | Detector | None = None,
        held_out: Any = None,
        calibrate: Policy | None = None,
        calibrate_samples: int = 1000,
        calibrate_every_n_evaluations: int | None = None,
        watch: Sequence[Stage] = ("predict",),
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
        name: str = _NAME,
        progress: bool = True,
        strict: bool = True,
    ) -> None:
        self._stages = checked_stages(watch, get_args(Stage), _OTHER_NAMES)
        check_method(method, detector)
        self._name, self._strict = text("name", name), flag("strict", strict)
        self._failures = Failures(name)
        layers = checked_layers(layers)
        self._texts = Texts(self._tell_without_tokens)
        model = WatchedModel(
            adapter,
            inputs=inputs,
            condition=condition,
            batch=self._texts if batch is None else function("batch", batch),
            detector=detector if isinstance(detector, Detector) else None,
            make=_checked_maker(adapter_of, adapter, detector),
        )
        self._is_default = adapter is None and adapter_of is None and detector is None
        self._detectors = Detectors(model, detector, method, layers, name, _REMEDY)
        self._needs_detector = bool(self._stages - {"train"})
        self._every_n = checked_every(
            "calibrate_every_n_evaluations", calibrate_every_n_evaluations, held_out
        )
        self._calibrator = Calibrator(
            _checked_held_out(held_out),
            self._detectors,
            whole("calibrate_samples", calibrate_samples, 1),
            progress=flag("progress", progress),
        )
        self._held_out = held_out
        policy = checked_policy(
            calibrate, is_given=self._detectors.is_given, is_needed=self._needs_detector
        )
        self._checkpoints = Checkpoints(policy, self._calibrator, self._detectors, self._failures)
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
        )
        self._fpr = settings.fpr
        self._mlflow_run = MLflowRun()
        self._evaluations = Evaluations(
            settings, self._detectors, self._failures, self._mlflow_run, self._texts
        )
        super().__init__()

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the latest evaluation or prediction; None before one is watched."""
        return self._evaluations.monitor

    @property
    def alerts(self) -> list[Alert]:
        """All alerts raised so far, the same in all processes."""
        return self._evaluations.alerts

    @property
    def detector(self) -> Detector | None:
        """The detector; None before calibration."""
        return self._detectors.current

    @property
    def failures(self) -> int:
        """Batches that could not be scored."""
        return self._failures.counts[FAILED]

    @property
    def flagged_batches(self) -> tuple[FlaggedBatch, ...]:
        """Training batches that were flagged, the oldest first; the latest thousand."""
        return tuple(self._training.flagged)

    def scores(self, stage: str) -> Scores:
        """Scores of all samples of a stage, when it was last run; without layers.

        Args:
            stage: ``"eval"`` or ``"predict"``; of an evaluation with a `metric_key_prefix` of its
                own, or of one of several datasets, what stands before its metrics, ``"eval_text"``.

        Raises:
            ValueError: The stage was not watched, or not to its end.
        """
        return self.recorded(stage).scores

    def recorded(self, stage: str) -> StageScores:
        """As :meth:`scores`, with the place of each sample in the dataset.

        Raises:
            ValueError: As there.
        """
        found = self._evaluations.recorded
        if stage not in found:
            raise ValueError(f"Expected a stage of {sorted(found)}, got {stage!r}.")
        return found[stage]

    def calibrate(self, model: nn.Module, source: Iterable[Batch] | None = None) -> Detector:
        """Fit on a finished model, without training; in several processes all must call it.

        Args:
            model: The model, as the Trainer has it.
            source: Held-out batches, or a dataset where the Trainer has loaded any; by default
                those that were chosen for the callback.

        Returns:
            The detector, which the callback watches with from now on.

        Raises:
            ValueError: The model has no log-likelihood, or what
                :meth:`~ood_monitor.Detector.fit` refuses.
            RuntimeError: Another process failed.
        """
        run = TransformersRun(self._args, None, None, model, self._loaders)
        return self._calibrator.fit(run, _checked_held_out(source))

    def _tell_without_tokens(self, count: int) -> None:
        self._failures.tell(
            "leaves out samples of whose tokens none is trained on",
            f"{count} in a batch have no label but -100 after their first token.",
        )


def _checked_maker(
    adapter_of: Callable[[nn.Module], Adapter] | None,
    adapter: AdapterLike | None,
    detector: str | Path | Detector | None,
) -> Callable[[nn.Module], Adapter | None]:
    if adapter_of is None:
        return adapter_of_model
    if adapter is not None or isinstance(detector, Detector):
        raise ValueError(
            "Expected `adapter_of=` alone, got it beside an adapter or a detector, which has one."
        )
    return function("adapter_of", adapter_of)


def _checked_held_out(held_out: Any) -> Any:
    """Batches or a dataset that each calibration can go through anew, or None."""
    return held_out if is_dataset(held_out) else checked_held_out(held_out)
