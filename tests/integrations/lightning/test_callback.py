"""Real Trainers: the callback watches what a restored model is fed, and tells where people look."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher
from torch import Tensor

import ood_monitor as om
from ood_monitor.alerts import Alert

pytestmark = QUIET

STATUS = "ood_monitor.status"
FIGURES = ("status", "score_mean", "score_p95", "flagged_rate", "log_e_value", "invalid")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[OODMonitor, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    callback = watcher()
    trained(callback, ModelCheckpoint(folder, save_last=True))
    return callback, str(folder / "last.ckpt")


def drifting() -> Tensor:
    return torch.cat([images(64, seed=2), images(64, seed=3) / 4])


def run_stage(run: pl.Trainer, stage: str, *args: Any, **options: Any) -> Any:
    quiet = {} if stage == "predict" else {"verbose": False}
    return getattr(run, stage)(*args, **options, **quiet)


def test_the_last_checkpoint_holds_the_detector_and_loads_as_weights_only(
    fitted: tuple[OODMonitor, str],
) -> None:
    states = torch.load(fitted[1], weights_only=True)["callbacks"]
    assert "tensors" in states[fitted[0].state_key]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_restored_detector_watches_in_any_grad_mode(
    fitted: tuple[OODMonitor, str], stage: Any, inference_mode: bool, workers: int
) -> None:
    callback = watcher(watch=[stage])
    run = trainer(callback, inference_mode=inference_mode)
    stream = loader(drifting(), num_workers=workers)
    run_stage(run, stage, Flow(), stream, ckpt_path=fitted[1])
    assert callback.failures == 0
    kinds = [alert.kind for alert in callback.alerts if alert.samples_seen > 64]
    assert kinds in (["drift", "explanation"], ["drift"])  # of gradient norms it needs none
    assert len(callback.scores(stage).score) == 128


def test_scores_are_those_of_the_detector(fitted: tuple[OODMonitor, str]) -> None:
    callback = watcher()
    trainer(callback).predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    assert callback.detector is not None
    exact, found = callback.detector.score(drifting()), callback.scores("predict")
    for figure in ("score", "p_value", "log_likelihood"):
        torch.testing.assert_close(
            getattr(found, figure), getattr(exact, figure), rtol=1e-4, atol=1e-4
        )
    found.score.add_(1)  # no inference tensor, which could not be worked with


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled:UserWarning")
def test_scores_know_where_their_samples_stand(fitted: tuple[OODMonitor, str]) -> None:
    callback = watcher()
    shuffled = loader(drifting(), shuffle=True)
    trainer(callback).predict(Flow(), shuffled, ckpt_path=fitted[1])
    recorded = callback.recorded("predict")
    assert sorted(recorded.dataset_index) == list(range(128))
    assert not (recorded.dataset_index == np.arange(128)).all()
    foreign = torch.from_numpy(recorded.dataset_index >= 64)
    score = recorded.scores.score
    assert score[foreign].median() > score[~foreign].quantile(0.9)


def test_several_loaders_are_one_stream_and_told_apart(fitted: tuple[OODMonitor, str]) -> None:
    callback = watcher(watch=["test"])
    loaders = [loader(images(40, seed=2)), loader(images(33, seed=3))]
    run_stage(trainer(callback), "test", Flow(), loaders, ckpt_path=fitted[1])
    recorded = callback.recorded("test")
    assert recorded.dataloader_index.tolist() == [0] * 40 + [1] * 33
    assert recorded.dataset_index.tolist() == [*range(40), *range(33)]


def test_scores_are_written_with_their_places(
    fitted: tuple[OODMonitor, str], tmp_path: Path
) -> None:
    callback = watcher(scores_dir=tmp_path / "scores")
    trainer(callback).predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    with np.load(tmp_path / "scores" / "scores-predict.npz", allow_pickle=False) as file:
        assert set(file) == {
            *("dataset_index", "dataloader_index"),
            *("score", "p_value", "log_likelihood", "valid"),
        }
        assert file["score"].tolist() == callback.scores("predict").score.tolist()


def test_every_nth_batch_is_scored(fitted: tuple[OODMonitor, str]) -> None:
    callback = watcher(every_n_batches=2)
    trainer(callback).predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    assert callback.recorded("predict").dataset_index.tolist() == [*range(32), *range(64, 96)]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_are_those_that_lightning_reports(
    fitted: tuple[OODMonitor, str], stage: Any
) -> None:
    callback = watcher(watch=[stage])
    (metrics,) = run_stage(
        trainer(callback), stage, Flow(), loader(images(64, seed=2)), ckpt_path=fitted[1]
    )
    scores, prefix = callback.scores(stage), "ood/val" if stage == "validate" else "ood/test"
    score = scores.score.double().numpy()
    found = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items()}
    assert callback.monitor is not None
    assert callback.monitor.status == "WARN"
    assert found.pop("status") == 1
    assert found.pop("log_e_value") >= 0
    assert found.pop(f"{'val' if stage == 'validate' else 'test'}/nll")
    assert found == {
        "score_mean": pytest.approx(score.mean()),
        "score_p95": pytest.approx(np.quantile(score, 0.95)),
        "flagged_rate": pytest.approx(float((scores.p_value <= 0.05).double().mean())),
        "invalid": 0,
    }


def test_several_loaders_have_figures_of_their_own(fitted: tuple[OODMonitor, str]) -> None:
    callback, spoiled = watcher(watch=["test"]), images(33, seed=3)
    spoiled[4] = torch.nan
    loaders, run = [loader(images(40, seed=2)), loader(spoiled)], trainer(callback)
    with pytest.warns(UserWarning, match="values that are not finite"):
        run_stage(run, "test", Flow(), loaders, ckpt_path=fitted[1])
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    scores = callback.scores("test")
    parts = {"": scores.valid, "0/": slice(0, 40), "1/": torch.arange(40, 73)[scores.valid[40:]]}
    for words, rows in parts.items():
        mean = float(scores.score[rows].mean())
        assert found[f"ood/test/{words}score_mean"] == pytest.approx(mean, rel=1e-5)
    invalid = [found[f"ood/test/{words}invalid"] for words in parts]
    assert invalid == [1, 0, 1]
    of_stream = {"ood/test/status", "ood/test/log_e_value"}
    assert {name for name in found if name.endswith(("status", "log_e_value"))} == of_stream


@pytest.mark.filterwarnings("ignore:.*stale calibration:UserWarning")
def test_a_metric_can_stop_training(fitted: tuple[OODMonitor, str]) -> None:
    assert fitted[0].detector is not None
    callback = watcher(watch=["val"], detector=fitted[0].detector, calibrate="never")
    stop = EarlyStopping("ood/val/flagged_rate", stopping_threshold=1.1)
    run = trainer(callback, stop, max_epochs=5)
    run.fit(Flow(), loader(images(64)), loader(images(64, seed=1)))
    assert run.current_epoch == 1


def test_the_progress_bar_shows_the_flagged_rate(fitted: tuple[OODMonitor, str]) -> None:
    run = trainer(watcher())
    run_stage(run, "test", Flow(), loader(images(64, seed=2)), ckpt_path=fitted[1])
    assert {name for name in run.progress_bar_metrics if "ood" in name} == {"ood/test/flagged_rate"}


def test_predict_writes_its_figures_to_the_loggers(
    fitted: tuple[OODMonitor, str], tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(watcher(), logger=logger, log_every_n_steps=2)
    run.predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header, *values = [row.split(",") for row in rows]
    assert set(header) == {"step", *(f"ood/predict/{name}" for name in FIGURES)}
    assert [row[header.index("step")] for row in values] == ["64", "128"]
    assert [float(row[header.index("ood/predict/status")]) for row in values] == [1, 2]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_other_stages_log_their_figures_once_at_their_end(
    stage: str, fitted: tuple[OODMonitor, str], tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(watcher(watch=["val", "test"]), logger=logger, log_every_n_steps=1)
    run_stage(run, stage, Flow(), loader(drifting()), ckpt_path=fitted[1])
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    assert f"ood/{stage[:3] if stage == 'validate' else stage}/score_mean" in rows[0]


def test_a_calibration_that_goes_stale_in_training_is_warned_of_once(
    fitted: tuple[OODMonitor, str], recwarn: pytest.WarningsRecorder
) -> None:
    module = Flow.load_from_checkpoint(fitted[1])
    assert fitted[0].detector is not None
    detector = om.Detector.from_state_dict(
        fitted[0].detector.state_dict(), om.LogLikelihood(module)
    )
    callback = watcher(watch=["val"], detector=detector, calibrate="never")
    trained(callback, module=module, max_epochs=3)
    told = [str(w.message) for w in recwarn if "stale" in str(w.message)]
    assert len(told) == 1
    assert len(callback.scores("val").score) == 128


def test_two_monitors_in_one_trainer_keep_their_own_state_and_metrics(tmp_path: Path) -> None:
    first, second = watcher(name="first"), watcher(name="second", layers="*coupling*")
    module = trained(first, second, ModelCheckpoint(tmp_path, save_last=True))
    restored = watcher(name="first"), watcher(name="second")
    run, last = trainer(*restored), tmp_path / "last.ckpt"
    run_stage(run, "test", module, loader(images(64, seed=2)), ckpt_path=last)
    sizes = [len(callback.detector.fitted.layers) for callback in restored if callback.detector]
    assert sizes[1] < sizes[0]
    names = {f"ood/{word}/test/score_mean" for word in ("first", "second")}
    assert names <= run.callback_metrics.keys()


def test_a_detector_is_read_from_a_checkpoint_without_its_trainer(
    fitted: tuple[OODMonitor, str],
) -> None:
    expected, found = watcher(), watcher(detector=fitted[1], calibrate="never")
    trainer(expected).predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    trainer(found).predict(Flow.load_from_checkpoint(fitted[1]), loader(drifting()))
    assert torch.equal(found.scores("predict").p_value, expected.scores("predict").p_value)
    other = watcher(name="other", detector=fitted[1], calibrate="never")
    with pytest.warns(
        UserWarning, match=r"will not watch: Expected a detector of the name 'other'"
    ):
        trainer(other).predict(Flow.load_from_checkpoint(fitted[1]), loader(drifting()))


@pytest.fixture
def logger(tmp_path: Path) -> MLFlowLogger:
    return MLFlowLogger(
        "test",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        artifact_location=(tmp_path / "artifacts").as_uri(),
    )


def history(logger: MLFlowLogger, name: str) -> list[tuple[int, float]]:
    metrics = logger.experiment.get_metric_history(logger.run_id, name)
    return [(metric.step, metric.value) for metric in metrics]


def test_alerts_stand_on_the_run_of_the_mlflow_logger(
    fitted: tuple[OODMonitor, str], logger: MLFlowLogger
) -> None:
    run = trainer(watcher(), logger=logger)
    run.predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    data = logger.experiment.get_run(logger.run_id).data
    assert data.tags["ood_monitor.status"] == "ALERT"
    # As figures are due, at the end, and with each change of the status.
    steps = dict(history(logger, "ood/predict/status"))
    assert {100, 128} <= steps.keys()
    changed = [status for step, status in sorted(steps.items()) if step not in (100, 128)]
    assert changed[-1] == 2
    assert all(one != next_ for one, next_ in pairwise([0, *changed]))
    assert data.metrics["ood/predict/status"] == 2


@pytest.mark.filterwarnings("ignore:.*stale calibration:UserWarning")
def test_a_stage_writes_each_metric_once_a_step(
    fitted: tuple[OODMonitor, str], logger: MLFlowLogger
) -> None:
    """By the loggers at its end, not by the sink too: its steps are others."""
    assert fitted[0].detector is not None
    callback = watcher(watch=["val"], detector=fitted[0].detector, calibrate="never")
    run = trainer(callback, logger=logger, max_epochs=3)
    run.fit(Flow(), loader(images(64)), loader(images(128, seed=1)))
    for name in FIGURES:
        steps = [step for step, _ in history(logger, f"ood/val/{name}")]
        assert steps == [1, 3, 5], name


def test_the_run_shows_where_its_streams_stand(
    fitted: tuple[OODMonitor, str], logger: MLFlowLogger
) -> None:
    """Of two callbacks and two stages, one after the other: the worst of the latest of each."""

    def shown(*callbacks: OODMonitor, stage: str, data: Tensor) -> dict[str, str]:
        run = trainer(*callbacks, logger=logger)
        run_stage(run, stage, Flow.load_from_checkpoint(fitted[1]), loader(data))
        found = logger.experiment.get_run(logger.run_id).data.tags
        return {k: v for k, v in found.items() if k.startswith(STATUS)}

    assert fitted[0].detector is not None
    usual = images(64, seed=2)
    usual = usual[fitted[0].detector.score(usual).p_value > 0.3][:5]
    one, two = (
        watcher(name=name, detector=fitted[0].detector, calibrate="never", every_n_batches=every)
        for name, every in (("a b", 1), ("a/c", 4))
    )
    found = shown(one, two, stage="test", data=drifting())
    assert found[STATUS] == found[f"{STATUS}.a b.test"] == "ALERT"
    assert found[f"{STATUS}.a_c.test"] in ("OK", "WARN")  # it has seen a fourth
    assert len(found) == 3
    assert shown(one, stage="predict", data=usual)["ood_monitor.status"] == "ALERT"
    assert shown(one, two, stage="test", data=usual) == {
        "ood_monitor.status": "OK",
        f"{STATUS}.a b.predict": "OK",
        f"{STATUS}.a b.test": "OK",
        f"{STATUS}.a_c.test": "OK",
    }


def test_autolog_beside_the_logger_takes_no_alert(tmp_path: Path) -> None:
    uri, before = f"sqlite:///{tmp_path}/mlflow.db", mlflow.get_tracking_uri()
    logger = MLFlowLogger("test", tracking_uri=uri, artifact_location=tmp_path.as_uri())
    run, module = trainer(watcher(), logger=logger, max_epochs=1), Flow()
    mlflow.set_tracking_uri(uri)
    mlflow.pytorch.autolog(log_models=False, checkpoint=False, silent=True)
    try:
        run.fit(module, loader(images(64)), loader(images(128, seed=1)))
        run.predict(module, loader(drifting()))
    finally:
        mlflow.pytorch.autolog(disable=True)
        mlflow.set_tracking_uri(before)
    runs = MlflowClient(uri).search_runs(["0", "1"])
    assert len(runs) == 2
    alerted = [each.info.run_id for each in runs if "ood_monitor.status" in each.data.tags]
    assert alerted == [logger.run_id]


class Unplugged(Logger):
    """A logger whose server is gone."""

    name, version = "unplugged", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def experiment(self) -> Any:
        return self


class NoRun(Unplugged):
    """One that loses its run once the Trainer is set up."""

    asked = 0

    @property
    def experiment(self) -> Any:
        self.asked += 1
        if self.asked > 2:
            raise ConnectionError("no route to host")
        return self


@pytest.mark.parametrize("logger", [Unplugged, NoRun])
def test_a_logger_that_fails_does_not_stop_the_loop(
    fitted: tuple[OODMonitor, str], logger: type[Logger]
) -> None:
    callback = watcher()
    run = trainer(callback, logger=logger(), log_every_n_steps=1)
    told = "could not (write its figures|reach a logger): no route to host"
    with pytest.warns(UserWarning, match=told):
        run.predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    assert len(callback.scores("predict").score) == 128


def test_sinks_hear_of_alerts_and_stay_open(fitted: tuple[OODMonitor, str]) -> None:
    sink = Closable()
    callback = watcher(sinks=[sink])
    run = trainer(callback)
    run_stage(run, "test", Flow(), loader(drifting()), ckpt_path=fitted[1])
    run.predict(Flow(), loader(drifting()), ckpt_path=fitted[1])
    assert sink.heard == callback.alerts != []
    assert {alert.stream for alert in sink.heard} == {"OODMonitor/test", "OODMonitor/predict"}
    assert not sink.closed


class Closable:
    def __init__(self) -> None:
        self.heard: list[Alert] = []
        self.closed = False

    def __call__(self, alert: Alert) -> None:
        self.heard.append(alert)

    def close(self) -> None:
        self.closed = True


def test_a_batch_that_cannot_be_scored_is_counted_and_not_raised(
    fitted: tuple[OODMonitor, str],
) -> None:
    callback = watcher()

    class Cropping(Flow):
        def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
            return x

    with pytest.warns(UserWarning, match="could not score a batch: Expected samples"):
        trainer(callback).predict(Cropping(), loader(images(64)[:, :, :2]), ckpt_path=fitted[1])
    assert callback.failures == 2
    # What nobody has looked at is not OK.
    assert callback.monitor is not None
    assert (callback.monitor.samples_seen, callback.monitor.invalid) == (64, 64)
    assert callback.monitor.status == "ALERT"
    assert "invalid_input" in {alert.kind for alert in callback.alerts}


def test_samples_that_are_not_finite_are_counted_and_spoil_no_other(
    fitted: tuple[OODMonitor, str],
) -> None:
    callback, stream = watcher(), images(64, seed=2)
    stream[3] = torch.nan
    stream[32:] = torch.inf  # a whole batch
    with pytest.warns(UserWarning, match="could not score samples: values that are not finite"):
        trainer(callback).predict(Flow(), loader(stream), ckpt_path=fitted[1])
    assert callback.monitor is not None
    assert callback.monitor.invalid == 33
    assert int(callback.scores("predict").valid.sum()) == 31


def test_too_few_held_out_samples_are_told_before_training_or_leave_it_alone() -> None:
    few, told = [images(8)], r"Expected at least \d+ samples to fit on"
    with pytest.raises(ValueError, match=told):
        trained(watcher(held_out=few))
    with pytest.warns(UserWarning, match=told):
        trained(callback := watcher(held_out=few, strict=False))
    assert callback.detector is None
    with pytest.warns(UserWarning, match=rf"was not calibrated.*{told}"):
        trained(callback := watcher(held_out=Unsized()))
    assert callback.detector is None


class Unsized:
    """Few samples that nobody can count beforehand."""

    def __iter__(self) -> Iterator[Tensor]:
        yield images(8)


def test_a_stage_without_a_detector_is_told_once() -> None:
    callback = watcher()
    run = trainer(callback)
    with pytest.warns(UserWarning, match="will not watch: it is not calibrated"):
        run.predict(Flow(), loader(images(64)))
    run.predict(Flow(), loader(images(64)))
    with pytest.raises(ValueError, match=r"Expected a stage of \[\], got 'predict'"):
        callback.scores("predict")


@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_fast_development_run_watches_in_silence(
    fitted: tuple[OODMonitor, str], stage: Any
) -> None:
    callback = watcher(watch=[stage])
    run_stage(
        trainer(callback, fast_dev_run=True, logger=True),
        stage,
        Flow(),
        loader(drifting()),
        ckpt_path=fitted[1],
    )
    assert len(callback.scores(stage).score) == 32


def test_what_was_found_before_an_exception_is_delivered(
    fitted: tuple[OODMonitor, str],
) -> None:
    heard: list[Alert] = []

    class Failing(Flow):
        def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
            if index == 3:
                raise KeyError("a user's own mistake")
            return x

    callback = watcher(sinks=[heard.append])
    with pytest.raises(KeyError, match="a user's own mistake"):
        trainer(callback).predict(Failing(), loader(drifting()), ckpt_path=fitted[1])
    assert heard == callback.alerts != []


@pytest.fixture
def detector(fitted: tuple[OODMonitor, str], tmp_path: Path) -> Path:
    assert fitted[0].detector is not None
    fitted[0].detector.save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_a_saved_detector_watches_without_training(
    fitted: tuple[OODMonitor, str], detector: Path
) -> None:
    callback = watcher(detector=str(detector))
    module = Flow.load_from_checkpoint(fitted[1])
    trainer(callback).predict(module, loader(drifting()))
    assert "drift" in [alert.kind for alert in callback.alerts][-2:]
