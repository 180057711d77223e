"""PyTorch Lightning: a callback that fits a detector and watches what the model is fed.

    trainer = Trainer(callbacks=[OODMonitor()])

The detector is fitted on held-out data in the last training epoch, in time for the last checkpoint,
and travels in it; `validate`, `test` and `predict` are then watched.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from ood_monitor import Adapter, Detector, LogLikelihood, Monitor
from ood_monitor.adapters.base import Batch
from ood_monitor.alerts import Alert, Sink
from ood_monitor.gradients.layers import Layers

__all__ = ["OODMonitor"]

_log = logging.getLogger(__name__)

Stage = Literal["validate", "test", "predict"]


class OODMonitor(Callback):
    """Fits a detector at the end of training and watches the stages that follow.

    The training is not changed: weights, optimiser, random state and logged metrics are those of a
    run without it. Whatever fails while watching is counted in :attr:`failures`, warned of once,
    and never raised into the loop.

    Args:
        adapter: The model: an :class:`~ood_monitor.Adapter`; a function ``(module, x) -> (B,)``
            giving log-likelihoods in nats; or None for the LightningModule's own ``adapter()``,
            ``log_prob_terms`` or ``log_prob``.
        calibrate_on: Held-out batches that the model is not trained on; ``"val"`` takes the
            validation dataloaders.
        watch: Which of ``"validate"``, ``"test"``, ``"predict"``.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        layers: Which parameters are features, by name pattern; all by default.
        sinks: Told of every alert.
        log_to_mlflow: Also tell the run of the Trainer's ``MLFlowLogger``, if it has one.
        name: The stream's name, and what tells several monitors in one Trainer apart.
        progress: Show a progress bar while fitting.

    Attributes:
        detector: The detector; None before calibration.
        monitor: The monitor of the current stage; None before one is watched.
        alerts: All alerts raised so far.
        failures: Batches that could not be scored.

    Raises:
        ValueError: ``watch`` names an unknown stage.
    """

    def __init__(
        self,
        adapter: Adapter | Callable[[nn.Module, Tensor], Tensor] | None = None,
        *,
        calibrate_on: Literal["val"] | Iterable[Batch] = "val",
        watch: Sequence[Stage] = ("test", "predict"),
        ert: float = 10_000,
        fpr: float = 0.01,
        layers: Layers = None,
        sinks: Sequence[Sink] = (),
        log_to_mlflow: bool = True,
        name: str = "OODMonitor",
        progress: bool = True,
    ) -> None:
        unknown = sorted(set(watch) - {"validate", "test", "predict"})
        if unknown:
            raise ValueError(f"Expected stages of validate, test, predict to watch, got {unknown}.")
        self.detector: Detector | None = None
        self.monitor: Monitor | None = None
        self.alerts: list[Alert] = []
        self.failures = 0
        self._adapter, self._calibrate_on, self._watch = adapter, calibrate_on, frozenset(watch)
        self._ert, self._fpr, self._layers = ert, fpr, layers
        self._sinks, self._log_to_mlflow = tuple(sinks), log_to_mlflow
        self._name, self._progress = name, progress
        self._restored: dict[str, Any] | None = None
        self._active: Monitor | None = None

    @property
    def state_key(self) -> str:
        """Distinguishes several monitors in one checkpoint."""
        return self._generate_state_key(name=self._name)

    def state_dict(self) -> dict[str, Any]:
        """The fitted detector as primitives: the checkpoint still loads as weights only."""
        fitted = self.detector is not None and self.detector.is_fitted
        return self.detector.state_dict() if fitted and self.detector is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state; the detector is made when the model is at hand."""
        self._restored = dict(state_dict) or None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the log-likelihood before anything is trained.

        Raises:
            ValueError: The module has none and none was given.
        """
        self._resolved(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit in the last epoch: checkpoints are written right after this hook."""
        steps_done = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or steps_done or trainer.should_stop:
            self._calibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit now if training ended in a way that no hook could foresee."""
        if self.detector is None:
            self._calibrate(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch `trainer.validate`; the validation inside `fit` is not a stream."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch `trainer.test`."""
        self._begin(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch `trainer.predict`."""
        self._begin(trainer, pl_module, "predict")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch and log what it says."""
        self._log(self._update(batch))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch and log what it says."""
        self._log(self._update(batch))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch; `self.log` is not allowed in predict, the sinks show its figures."""
        self._update(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching, delivering what is left."""
        self._end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching, delivering what is left."""
        self._end()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching, delivering what is left."""
        self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Deliver what was raised before the loop broke."""
        self._end()

    def _resolved(self, pl_module: LightningModule) -> Adapter:
        if isinstance(self._adapter, Adapter):
            return self._adapter
        if self._adapter is None and callable(getattr(pl_module, "adapter", None)):
            return pl_module.adapter()  # type: ignore[operator, no-any-return]
        return LogLikelihood(pl_module, self._adapter)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        detector = Detector(self._resolved(pl_module), layers=self._layers)
        try:
            # Iterating a shuffled loader draws from the global generator.
            with isolate_rng():
                batches = list(_held_out(trainer, self._calibrate_on))
                self.detector = detector.fit(batches, progress=self._progress)
        except Exception as error:  # a training of days must not end on its monitor's account
            rank_zero_warn(f"{self._name} was not calibrated and will not watch: {error}")

    def _begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        if stage not in self._watch or not self._restore(pl_module):
            return
        assert self.detector is not None
        sinks = [*self._sinks, *(_mlflow_sinks(trainer) if self._log_to_mlflow else ())]
        self.monitor = self._active = Monitor(
            self.detector, ert=self._ert, fpr=self._fpr, sinks=sinks, name=f"{self._name}/{stage}"
        )

    def _update(self, batch: Batch) -> Monitor | None:
        """The monitor, if it scored the batch."""
        if self._active is None:
            return None
        try:
            self.alerts += self._active.update(batch)
        except Exception as error:  # the loop goes on, whatever the batch was
            self.failures += 1
            if self.failures == 1:
                rank_zero_warn(f"{self._name} could not score a batch: {error}")
            return None
        return self._active

    def _log(self, monitor: Monitor | None) -> None:
        if monitor is None or monitor.last is None or not monitor.last.valid.any():
            return
        valid = monitor.last.valid
        figures = {
            "ood/score": monitor.last.score[valid].mean(),
            "ood/flagged_rate": (monitor.last.p_value[valid] <= self._fpr).double().mean(),
        }
        size = int(valid.sum())
        # The Trainer attaches `log_dict` to callbacks.
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=size)  # type: ignore[attr-defined]

    def _end(self) -> None:
        if self._active is not None:
            self._active.close()
            self._active = None

    def _restore(self, pl_module: LightningModule) -> bool:
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.detector = Detector.from_state_dict(state, self._resolved(pl_module))
        if self.detector is None:
            rank_zero_warn(f"{self._name} is not calibrated and will not watch.")
        return self.detector is not None


def _held_out(trainer: Trainer, source: Literal["val"] | Iterable[Batch]) -> Iterator[Batch]:
    loaders = trainer.val_dataloaders if isinstance(source, str) else source
    if loaders is None:
        raise ValueError(
            "Expected validation dataloaders or `calibrate_on=` a loader, got neither."
        )
    for loader in loaders if isinstance(source, str) and isinstance(loaders, list) else [loaders]:
        yield from loader


def _mlflow_sinks(trainer: Trainer) -> Iterator[Sink]:
    """A sink for each MLflow run that the Trainer logs to."""
    for logger in trainer.loggers:
        client = getattr(logger, "experiment", None)
        if hasattr(client, "log_batch") and getattr(logger, "run_id", None):
            # Here, so that Lightning without MLflow works: this logger has MLflow imported already.
            from ood_monitor_integrations.mlflow import MLflowSink

            yield MLflowSink.from_logger(logger)  # type: ignore[arg-type]
