"""The events of a Trainer, and what the callback does in each of them."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.gradients import Step, TrainingWatch
from ood_monitor_integrations.training.loading import kept_global_state
from ood_monitor_integrations.transformers.checkpoints import Checkpoints
from ood_monitor_integrations.transformers.clipping import Clipping
from ood_monitor_integrations.transformers.evaluations import REFUSED, Evaluations
from ood_monitor_integrations.transformers.models import check_causal
from ood_monitor_integrations.transformers.refusals import refuse_arguments
from ood_monitor_integrations.transformers.runs import (
    Loaders,
    TransformersRun,
    begun,
    training_runs,
    trial_batch,
)
from ood_monitor_integrations.transformers.taps import Tap

__all__ = ["Events"]

_NOT_WATCHED = (
    "a detector comes with the checkpoints, and the evaluation data may have calibrated it; give "
    "`held_out=` and `calibrate_every_n_evaluations=`, or a fitted `detector=`."
)

_WITHIN = (
    "it ran within a training, whose checkpoints have the detectors: predict after it, or watch "
    "evaluations, `watch=['eval']`."
)


class Events(TrainerCallback):
    """What :class:`~ood_monitor_integrations.transformers.OODCallback` does in each event.

    A subclass has the options, and sets what is only declared here.
    """

    _name: str
    _fpr: float
    _strict: bool
    _is_default: bool
    _needs_detector: bool
    _held_out: Any
    _every_n: int | None
    _stages: frozenset[str]
    _failures: Failures
    _detectors: Detectors
    _calibrator: Calibrator
    _checkpoints: Checkpoints
    _training: TrainingWatch
    _evaluations: Evaluations

    def __init__(self) -> None:
        self._loaders = Loaders()
        self._args: TrainingArguments | None = None
        self._tap = Tap(self._given, self._gave)
        self._clipping = Clipping()
        self._is_off = self._is_fit = self._cannot_calibrate = False
        self._batches, self._evaluated = 0, 0  # of this step, and in this training

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be monitored; listen to what the model is given.

        Raises:
            ValueError: A Trainer that shards parameters, or a model without log-likelihood.
            FileNotFoundError: No saved detector in the folder named.
        """
        self._set_up(args, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what could not be calibrated, before the first step.

        Raises:
            ValueError: As :meth:`on_init_end`; or two samples could not be scored, or samples will
                be too few.
        """
        self._set_up(args, kwargs["model"])
        self._loaders.train = kwargs["train_dataloader"]
        self._is_fit, self._cannot_calibrate, self._evaluated = True, False, 0
        begun(args)
        self._mlflow_run_of(args)
        self._training.begin()
        self._evaluations.drop()
        if self._is_off:
            return
        # One process has the gradients that will be clipped, and not in other units (fp16).
        is_known = args.world_size == 1 and getattr(kwargs["optimizer"], "scaler", None) is None
        if "train" in self._stages and args.max_grad_norm and is_known:
            self._clipping.attach(kwargs["model"])
        run = self._run(args, state, control, kwargs["model"])
        with self._failures.contained("could not resume its training stream"):
            self._training.load_state_dict(self._checkpoints.begin(run))
        self._rehearse(run)
        self._check_is_held_out(self._held_out)
        if "eval" in self._stages and not self._watches_evaluations_of_fit:
            self._failures.tell("does not watch evaluations of the training", _NOT_WATCHED)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the batches of a step."""
        self._batches = 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the batches of a step."""
        self._batches += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients, which are unscaled and clipped here, and take that back."""
        if "train" not in self._stages or self._is_off:
            return
        with self._failures.contained("could not score a training batch"):
            epoch, batch_idx = self._place(state)
            optimizer = kwargs["optimizer"]
            step = Step(
                optimizer,
                0,
                epoch,
                batch_idx,
                skips_infinite=getattr(optimizer, "scaler", None) is not None,
                is_told=state.is_world_process_zero,
                factor=self._clipping.factor(),
            )
            self._training.take(kwargs["model"], step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of an evaluation or a prediction is through: score it."""
        run, given = self._run(args, state, control, kwargs["model"]), self._evaluations.given()
        self._tap.attach(run.model)  # where the callback was added after the Trainer was made
        if not self._evaluations.is_of(loader := kwargs["eval_dataloader"]):
            self._args = args
            self._begin(run, loader)
            given = given[-1:]
        with kept_global_state():
            self._evaluations.take(run, given)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """An evaluation is over: decide on it; what it has gone through may calibrate."""
        metrics = {} if metrics is None else metrics
        prefix = _prefix(metrics, "eval")
        if self._is_fit or prefix == "eval":
            self._loaders.evaluation[prefix] = kwargs["eval_dataloader"]
            if self._is_fit and self._held_out is None:
                self._check_is_held_out(kwargs["eval_dataloader"])
        run = self._run(args, state, control, kwargs["model"])
        self._evaluated += self._is_fit
        self._finish(run, "eval", prefix, metrics)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """A prediction is over: decide on it."""
        if self._is_fit and not self._is_off and "predict" in self._stages:
            self._failures.tell("has not watched a prediction", _WITHIN)
        run = self._run(args, state, control, kwargs["model"])
        self._finish(run, "predict", _prefix(metrics, "test"), metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put a detector of its weights into the checkpoint that was saved."""
        if self._may_calibrate or "train" in self._stages:
            run = self._run(args, state, control, kwargs["model"])
            with self._failures.contained("could not look at a checkpoint"), kept_global_state():
                self._checkpoints.save(run, self._training.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a detector of the weights that training ends with, be it the best ones."""
        if self._may_calibrate:
            run = self._run(args, state, control, kwargs["model"])
            with self._failures.contained("could not look at a checkpoint"), kept_global_state():
                self._checkpoints.finish(run)
        self._clipping.detach()
        self._is_fit = False

    @property
    def _may_calibrate(self) -> bool:
        return self._needs_detector and not (self._is_off or self._cannot_calibrate)

    @property
    def _watches_evaluations_of_fit(self) -> bool:
        """Whether there is a detector for them that has not learned from the same samples."""
        return self._detectors.is_given or self._every_n is not None

    def _run(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        *,
        is_trial: bool = False,
    ) -> TransformersRun:
        return TransformersRun(args, state, control, model, self._loaders, is_trial)

    def _set_up(self, args: TrainingArguments, model: nn.Module | None) -> None:
        self._args = args
        try:
            refuse_arguments(args, watches_training="train" in self._stages)
            if self._needs_detector and model is not None:
                self._detectors.check(model)
        except Exception as error:  # whatever a foreign model raises
            if self._strict:
                raise
            self._is_off = True
            self._failures.tell(REFUSED, error)
        if self._needs_detector and model is not None and not self._is_off:
            self._tap.attach(model)

    def _given(self, batch: Mapping[str, Any]) -> None:
        """The model is given a batch in eval mode."""
        if not self._is_off:
            self._evaluations.give(batch)

    def _gave(self, output: Any) -> None:
        """It has given something, or None if it has failed."""
        if not self._is_off:
            self._evaluations.gave(output)

    def _begin(self, run: TransformersRun, loader: Any) -> None:
        """The first batch of an evaluation is through; it is watched if it should be."""
        self._evaluations.drop(loader)
        self._is_fit = self._is_fit and training_runs()  # one that failed has told of no end
        if self._is_off or not self._is_watched_now:
            return
        if self._is_fit and self._every_n is not None and self._evaluated % self._every_n == 0:
            with self._failures.contained("was not calibrated before an evaluation"):
                self._calibrator.fit(run)
        with kept_global_state():
            self._evaluations.begin(run)

    @property
    def _is_watched_now(self) -> bool:
        """Whether it could be: outside of a training nobody knows what it is before its end."""
        if self._is_fit:
            return "eval" in self._stages and self._watches_evaluations_of_fit
        return self._needs_detector

    def _finish(
        self, run: TransformersRun, stage: str, prefix: str, metrics: dict[str, Any]
    ) -> None:
        if self._is_off or stage not in self._stages or not self._is_watched_now:
            self._evaluations.drop()
            return
        name = stage if prefix in ("eval", "test") else prefix
        with kept_global_state():
            found = self._evaluations.finish(run, name, is_fit=self._is_fit)
        metrics |= {f"{prefix}_ood_{key}": value for key, value in found.items()}

    def _place(self, state: TrainerState) -> tuple[int, int]:
        """The epoch of the step's last batch, and its number in it, both from 0."""
        passed = float(state.epoch or 0.0)
        try:
            batches = len(self._loaders.train)
        except TypeError:  # a stream: there is one epoch of all steps
            return 0, state.global_step
        return int(passed), round(passed % 1 * batches) + self._batches

    def _rehearse(self, run: TransformersRun) -> None:
        """Do to two samples, before the first step, what will be done to all."""
        if not (self._needs_detector and self._checkpoints.calibrates):
            return
        try:
            self._refuse_without_data(run)
            trial = self._run(*_parts(run), is_trial=True)
            with trial.evaluating():
                batch = trial_batch(self._loaders)
                self._check_causal(trial, batch)
            # Two samples tell nothing of how many a batch of a loader that is there has.
            has_loader = bool(self._loaders.evaluation)
            self._calibrator.rehearse(trial, None if has_loader else batch, self._fpr)
        except Exception as error:  # whatever a foreign model raises
            self._cannot_calibrate = True
            self._failures.refuse("could not be calibrated", error, strict=self._strict)

    def _refuse_without_data(self, run: TransformersRun) -> None:
        """Refuse a training that would end without anything to calibrate on.

        Raises:
            ValueError: It would.
        """
        assert run.args is not None
        never = str(getattr(run.args.eval_strategy, "value", run.args.eval_strategy)) == "no"
        has_any = run.args.eval_on_start or self._held_out is not None or self._loaders.evaluation
        if never and not has_any:
            raise ValueError(
                "Expected `held_out=` where the Trainer never evaluates, got None: give a dataset "
                "or batches that the model is not trained on, or `eval_strategy=`."
            )

    def _check_is_held_out(self, data: Any) -> None:
        """Tell of data that calibrate although the model learns them: p-values are too small."""
        train = getattr(self._loaders.train, "dataset", None)
        is_trained_on = train is not None and getattr(data, "dataset", data) is train
        if is_trained_on and self._may_calibrate and self._checkpoints.calibrates:
            self._failures.tell(
                "calibrates on the data that the model is trained on",
                "new data will look unusual beside them. Give others as `held_out=`.",
            )

    def _check_causal(self, run: TransformersRun, batch: Any) -> None:
        adapter = self._detectors.adapter(run.module)
        if self._is_default and batch is not None and "labels" in batch:
            check_causal(adapter, self._detectors.model.prepared(batch))

    def _mlflow_run_of(self, args: TrainingArguments) -> None:
        with self._failures.contained("could not reach MLflow"):
            self._evaluations.mlflow_run.look(args)


def _parts(run: TransformersRun) -> tuple[Any, Any, Any, nn.Module]:
    return run.args, run.state, run.control, run.model


def _prefix(metrics: Mapping[str, Any], usual: str) -> str:
    """What stands before the metrics of an evaluation."""
    end = "_runtime"
    return next((name.removesuffix(end) for name in metrics if name.endswith(end)), usual)
