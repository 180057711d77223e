"""Lightning's hooks, and what the callback does in each of them."""

from typing import TYPE_CHECKING, Any

from ood_monitor.modules import is_sharded
from ood_monitor_integrations.lightning.handover import Handover
from ood_monitor_integrations.lightning.loading import fetches_itself
from ood_monitor_integrations.lightning.loggers import write
from ood_monitor_integrations.lightning.monitored import refuse_unfed_monitors
from ood_monitor_integrations.lightning.namespaces import callback_class
from ood_monitor_integrations.lightning.optimizers import step_of_gradients
from ood_monitor_integrations.lightning.predictions import Predictions
from ood_monitor_integrations.lightning.runs import LightningRun
from ood_monitor_integrations.lightning.saving import Checkpoints
from ood_monitor_integrations.lightning.sharding import refuse_strategy
from ood_monitor_integrations.lightning.trainer_monitor import REFUSED, TrainerMonitor
from ood_monitor_integrations.lightning.worlds import begun
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.gradients import TrainingWatch

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    Callback = callback_class()

__all__ = ["Hooks"]

_NOT_WATCHED = (
    "a detector comes with the checkpoints, and the validation data may have calibrated it; give "
    "`held_out=` and `calibrate_every_n_epochs=`, or a fitted `detector=`."
)


class Hooks(Callback):
    """What :class:`~ood_monitor_integrations.lightning.OODMonitor` does in each of its hooks.

    A subclass has the options, and sets what is only declared here.
    """

    _name: str
    _words: tuple[str, ...]
    _of_training: str
    _fpr: float
    _strict: bool
    _with_scores: bool
    _needs_detector: bool
    _every_n_epochs: int | None
    _stages: frozenset[str]
    _failures: Failures
    _detectors: Detectors
    _calibrator: Calibrator
    _checkpoints: Checkpoints
    _training: TrainingWatch
    _trainer_monitor: TrainerMonitor
    _predictions: Predictions
    _handover: Handover

    _batch_idx = 0
    _is_off = False
    _is_broken = False
    _is_rehearsed = False
    _cannot_calibrate = False
    _fetches = False  # whether the step of the stage fetches its batches itself
    _calibrated_in: int | None = None  # the epoch

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Refuse what cannot be monitored, before anything is trained.

        Raises:
            ValueError: A strategy that shards parameters in a way that is not supported, or a
                module without log-likelihood.
            FileNotFoundError: No saved detector in the folder named.
        """
        self._is_broken = False
        self._take_over()
        begun(trainer)
        _move_behind_others(trainer)
        try:
            refuse_strategy(trainer.strategy, watches_training="train" in self._stages)
            if self._needs_detector:
                self._detectors.check(pl_module)
        except Exception as error:  # whatever a foreign model raises
            if self._strict:
                raise
            self._is_off = True
            self._failures.tell(REFUSED, error)

    def on_save_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Put in a detector of the weights that are saved, calibrated now if it is to have one."""
        if self._needs_detector and not self._is_off:
            is_lost = self._is_broken and is_sharded(pl_module)  # nobody is to read it all now
            may = self._may_calibrate(trainer)
            weights_of = None if is_lost else pl_module
            self._checkpoints.save(trainer, weights_of, checkpoint, calibrate=may)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Refuse what would wait for a metric in vain; nothing is calibrated yet.

        Raises:
            ValueError: A callback or a scheduler monitors a metric that will not be logged.
        """
        self._is_rehearsed, self._cannot_calibrate, self._calibrated_in = False, False, None
        self._checkpoints.begin(trainer)
        refuse_unfed_monitors(
            trainer,
            self._words,
            self._failures,
            stages=self._stages,
            has_detector=self._detectors.is_given,
            recalibrates=self._every_n_epochs is not None,
            strict=self._strict,
        )
        self._training.begin()

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Refuse what could not be calibrated, if the sanity check has not done so."""
        self._rehearse(trainer, pl_module, None)
        if "val" in self._stages and not self._is_off and not self._watches_validation_of_fit:
            self._failures.tell("does not watch the validation of `fit`", _NOT_WATCHED)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Remember which batch comes; checkpoints of the step before are written by now."""
        self._batch_idx = batch_idx
        self._settle(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Any
    ) -> None:
        """Look at the gradients, which are unscaled here and not yet clipped."""
        if "train" not in self._stages or self._is_off:
            return
        with self._failures.contained("could not score a training batch"):
            score = self._training.take(
                pl_module, step_of_gradients(trainer, optimizer, self._batch_idx)
            )
            every = getattr(trainer, "log_every_n_steps", 0)
            # Not by `self.log`, which takes longer than the score does.
            if score is not None and every and self._training.scored % every == 0:
                metrics = {f"{self._of_training}/score": score.score}
                write(trainer.loggers, metrics, trainer.global_step, self._failures)

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Log of the training stream."""
        if "train" in self._stages and not (self._is_off or trainer.barebones):
            found = self._training.summary()
            metrics = {f"{self._of_training}/{name}": value for name, value in found.items()}
            self._log(metrics, on_epoch=True, sync_dist=trainer.world_size > 1)
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Calibrate for the weights that training ends with."""
        if self._may_calibrate(trainer):
            self._checkpoints.finish(trainer, pl_module)

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Name the checkpoints without a detector."""
        if self._may_calibrate(trainer):
            self._checkpoints.name_those_without(trainer, pl_module)

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Checkpoints of the step before are written by now."""
        self._fetches = fetches_itself(pl_module, trainer)
        self._settle(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to watch; the weights are those that are validated, averaged ones included."""
        if trainer.sanity_checking or self._is_off:
            return
        is_fit = trainer.state.fn == "fit" and "val" in self._stages
        if is_fit and not self._is_ready_for_validation(trainer, pl_module):
            return
        self._trainer_monitor.begin(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_validation_batch_start(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch, before the step writes to it; in the sanity check, see if it can be."""
        if trainer.sanity_checking:
            self._rehearse(trainer, pl_module, None if self._fetches else batch)
        else:
            self._take(trainer, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch, if the step has fetched it itself."""
        if self._fetches and not trainer.sanity_checking:
            self._trainer_monitor.take(trainer, batch, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Decide, and log."""
        self._trainer_monitor.finish(trainer, "val")

    def on_test_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to watch."""
        self._fetches = fetches_itself(pl_module, trainer)
        if not self._is_off:
            self._trainer_monitor.begin(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_test_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Decide, and log."""
        self._trainer_monitor.finish(trainer, "test")

    def on_predict_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to watch."""
        self._fetches = fetches_itself(pl_module, trainer)
        if not self._is_off:
            self._trainer_monitor.begin(trainer, pl_module, "predict", trainer.predict_dataloaders)
        if self._with_scores:
            with self._failures.contained("could not put scores beside predictions"):
                self._predictions.begin(pl_module)

    def on_predict_batch_start(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch, before the step writes to it; the step's output may tell of it."""
        self._take(trainer, batch, batch_idx, dataloader_idx)

    on_test_batch_start = on_predict_batch_start

    def on_predict_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Decide; `self.log` is not allowed here, the loggers are."""
        self._trainer_monitor.finish(trainer, "predict")

    def on_predict_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Leave the module its own step."""
        self._predictions.end()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """As there, however the stage has ended; hand over what ends with this process."""
        self._predictions.end()
        if stage == "fit":
            with self._failures.contained("could not hand over its detector"):
                self._handover.give(trainer, self.state_dict())

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Deliver what was raised before the loop broke."""
        self._is_broken = True  # no process may wait for another from here on
        World.leave()
        self._predictions.end()
        self._trainer_monitor.abandon()

    def _take_over(self) -> None:
        """What a launched process has handed over, if anything since the last time."""
        with self._failures.contained("could not take over its detector"):
            if (state := self._handover.take()) is not None:
                self.load_state_dict(state)

    @property
    def _watches_validation_of_fit(self) -> bool:
        """Whether there is a detector for it that has not learned from the same samples."""
        return self._detectors.is_given or self._every_n_epochs is not None

    def _is_ready_for_validation(self, trainer: "Trainer", pl_module: "LightningModule") -> bool:
        """Whether the validation of this epoch is watched, with a detector of its weights."""
        every, last, epoch = self._every_n_epochs, self._calibrated_in, trainer.current_epoch
        if every is None or self._cannot_calibrate:
            return self._detectors.is_given
        if last is not None and last < epoch < last + every:
            return False
        self._calibrated_in = epoch
        with self._failures.contained("was not calibrated before a validation"):
            self._calibrator.fit(LightningRun(trainer, pl_module))
        return True

    def _may_calibrate(self, trainer: "Trainer") -> bool:
        is_fit = trainer.state.fn == "fit" and not getattr(trainer, "fast_dev_run", False)
        is_out = self._is_off or self._is_broken or self._cannot_calibrate
        return is_fit and not (is_out or trainer.sanity_checking)

    def _take(self, trainer: "Trainer", batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Score a batch before its step; one that the step is to fetch is not known yet."""
        if not self._fetches:
            scores = self._trainer_monitor.take(trainer, batch, batch_idx, dataloader_idx)
            self._predictions.scored(scores)

    def _settle(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._needs_detector and self._may_calibrate(trainer):
            self._checkpoints.settle(trainer, pl_module, calibrate=True)

    def _rehearse(self, trainer: "Trainer", pl_module: "LightningModule", batch: Any) -> None:
        """Do to two samples, before the first step, what will be done to all."""
        if self._is_rehearsed or self._is_off or not self._checkpoints.calibrates:
            return
        self._is_rehearsed = True
        try:
            self._calibrator.rehearse(LightningRun(trainer, pl_module), batch, self._fpr)
        except Exception as error:  # whatever a foreign model raises
            self._cannot_calibrate = True
            self._failures.refuse("could not be calibrated", error, strict=self._strict)

    def _log(self, metrics: dict[str, float], **options: Any) -> None:
        # The Trainer attaches `log_dict` to callbacks.
        self.log_dict(metrics, batch_size=1, **options)  # type: ignore[attr-defined]


def _move_behind_others(trainer: Any) -> None:
    """Stand behind all callbacks but those that save: behind whoever averages weights or stops.

    A list of its own, since the Trainer goes through the old one now.
    """
    saving = [other for other in trainer.callbacks if other in trainer.checkpoint_callbacks]
    ours = [other for other in trainer.callbacks if isinstance(other, Hooks)]
    rest = [other for other in trainer.callbacks if other not in saving and other not in ours]
    trainer.callbacks = [*rest, *ours, *saving]
