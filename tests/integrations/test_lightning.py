"""Real Trainers: the callback fits in time, travels in the checkpoint, and changes nothing."""

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ood_monitor.alerts import Alert
from ood_monitor.models import Glow

pytestmark = [
    # Lightning's advice on workers and intervals, and its own use of a deprecated torch function.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # MLflow's own use of SQLAlchemy.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`:UserWarning"),
]


class Flow(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
        self.dropout = nn.Dropout(0.5)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return -self.flow.log_prob(self.dropout(x)).mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val/nll", -self.flow.log_prob(x).mean())

    def test_step(self, x: Tensor, index: int) -> None:
        self.log("test/nll", -self.flow.log_prob(x).mean())

    def predict_step(self, x: Tensor, index: int) -> Tensor:
        return self.flow.log_prob(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def loader(data: Tensor, *, shuffle: bool = False) -> DataLoader[Tensor]:
    return DataLoader(data, batch_size=32, shuffle=shuffle)  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **options: object) -> pl.Trainer:
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))  # type: ignore[arg-type]


def watcher(**options: object) -> OODMonitor:
    return OODMonitor(**({"progress": False, "fpr": 0.05} | options))  # type: ignore[arg-type]


def trained(*callbacks: pl.Callback, **options: object) -> Flow:
    pl.seed_everything(0, verbose=False)
    module = Flow()
    fit = trainer(*callbacks, **options)
    fit.fit(module, loader(images(64), shuffle=True), loader(images(128, seed=1)))
    return module


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flow, OODMonitor, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    callback = watcher()
    module = trained(callback, ModelCheckpoint(folder, save_last=True))
    return module, callback, str(folder / "last.ckpt")


def test_the_last_checkpoint_holds_the_detector_and_loads_as_weights_only(
    fitted: tuple[Flow, OODMonitor, str],
) -> None:
    states = torch.load(fitted[2], weights_only=True)["callbacks"]
    assert "tensors" in states[fitted[1].state_key]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_restored_detector_watches_under_inference_mode(
    fitted: tuple[Flow, OODMonitor, str], stage: str
) -> None:
    callback = watcher(watch=[stage], ert=1000)
    run = trainer(callback)
    stream = loader(torch.cat([images(64, seed=2), images(64, seed=3) / 4]))
    options = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(Flow(), stream, ckpt_path=fitted[2], **options)
    assert callback.failures == 0
    assert [alert.kind for alert in callback.alerts if alert.samples_seen > 64] == ["drift"]
    assert (run.num_test_batches or run.num_val_batches or run.num_predict_batches) == [4]


def test_metrics_of_test_are_those_that_lightning_reports(
    fitted: tuple[Flow, OODMonitor, str],
) -> None:
    run = trainer(watcher(), max_epochs=1)
    (metrics,) = run.test(Flow(), loader(images(64, seed=2)), ckpt_path=fitted[2], verbose=False)
    assert 0 <= metrics["ood/flagged_rate"] <= 0.2
    assert "ood/score" in metrics


def test_training_is_bit_identical_with_and_without_the_callback() -> None:
    plain, watched = trained(), trained(watcher(watch=["validate", "test"]))
    state = torch.get_rng_state()
    trained()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name


def test_two_monitors_in_one_trainer_keep_their_own_state(tmp_path: object) -> None:
    first, second = watcher(name="first"), watcher(name="second", layers="*coupling*")
    trained(first, second, ModelCheckpoint(tmp_path, save_last=True))  # type: ignore[arg-type]
    assert first.detector is not None
    assert second.detector is not None
    assert len(second.detector.fitted.layers) < len(first.detector.fitted.layers)


def test_alerts_stand_on_the_run_of_the_mlflow_logger(
    fitted: tuple[Flow, OODMonitor, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mlflow")
    logger = MLFlowLogger(
        "test",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_location=(folder / "artifacts").as_uri(),
    )
    run = trainer(watcher(ert=1000), logger=logger)
    stream = loader(torch.cat([images(64, seed=2), images(64, seed=3) / 4]))
    run.predict(Flow(), stream, ckpt_path=fitted[2])
    data = logger.experiment.get_run(logger.run_id).data
    assert data.tags["ood_monitor.status"] == "ALERT"
    assert {"ood/log_e_value", "ood/flagged_rate", "ood/alert"} <= data.metrics.keys()


def test_a_batch_that_cannot_be_scored_is_counted_and_not_raised(
    fitted: tuple[Flow, OODMonitor, str],
) -> None:
    callback = watcher()

    class Cropping(Flow):
        def predict_step(self, x: Tensor, index: int) -> Tensor:
            return x

    with pytest.warns(UserWarning, match="could not score a batch: Expected samples"):
        trainer(callback).predict(Cropping(), loader(images(64)[:, :, :2]), ckpt_path=fitted[2])
    assert callback.failures == 2


def test_too_few_held_out_samples_leave_the_training_alone() -> None:
    callback = watcher(calibrate_on=[images(8)])
    with pytest.warns(UserWarning, match="was not calibrated.*Expected at least"):
        trained(callback)
    assert callback.detector is None


def test_sinks_hear_of_alerts(fitted: tuple[Flow, OODMonitor, str]) -> None:
    heard: list[Alert] = []
    callback = watcher(sinks=[heard.append], ert=1000)
    trainer(callback).predict(Flow(), loader(images(128) / 4), ckpt_path=fitted[2])
    assert heard == callback.alerts != []


def test_a_module_without_likelihood_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="Expected a module with `log_prob`"):
        trainer(watcher()).fit(BoringModel())


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="got \\['train'\\]"):
        OODMonitor(watch=["train"])  # type: ignore[list-item]
