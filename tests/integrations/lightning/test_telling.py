"""What people see of an alert: a line on the console, and what each logger of the Trainer takes."""

import csv
import io
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.lightning.telling import logger_sinks
from ood_monitor_integrations.training.console import ConsoleSink
from ood_monitor_integrations.training.failures import Failures
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger
from support.alert_cases import ALERT
from support.lightning_cases import QUIET, Flow, images, loader, trainer, watcher
from torch import Tensor

import ood_monitor as om
from ood_monitor.alerts import Alert

pytestmark = QUIET

OF_STREAM = {"status", "log_e_value"}
OF_LOADER = {"score_mean", "score_p95", "flagged_rate", "invalid"}


@pytest.fixture(scope="module")
def module() -> Flow:
    return Flow()


@pytest.fixture(scope="module")
def detector(module: Flow) -> om.Detector:
    return fitted_on(module)


def fitted_on(module: Flow) -> om.Detector:
    held_out = [images(128, seed=1)]
    return om.Detector(om.LogLikelihood(module)).fit(held_out, progress=False)


def watching(detector: om.Detector, **options: Any) -> OODMonitor:
    return watcher(detector=detector, calibrate="never", **options)


def drifting() -> Tensor:
    return torch.cat([images(64, seed=2), images(64, seed=3) / 4])


# The console


def printed(text: str) -> list[str]:
    """Lines of a terminal, without colours and movements of the cursor."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_each_alert_is_a_line_above_the_progress_bar(
    bar: type[pl.Callback] | None,
    module: Flow,
    detector: om.Detector,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal: Rich draws on nothing else
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "1000")
    callback = watching(detector)
    bars = [bar()] if bar else []
    trainer(callback, *bars, enable_progress_bar=bool(bars)).predict(module, loader(drifting()))
    lines = [line for line in printed(capsys.readouterr().out) if "ood-monitor" in line]
    assert len(lines) == len(callback.alerts) > 1
    for line, alert in zip(lines, callback.alerts, strict=True):
        assert line.startswith(f"ood-monitor {alert.severity}: {alert.kind} (stream OODMonitor/pre")
        assert alert.id in line
    assert any("drift" in line for line in lines)


def test_the_console_can_be_left_alone(
    module: Flow, detector: om.Detector, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = watching(detector, console=False)
    trainer(callback).predict(module, loader(drifting()))
    assert callback.alerts
    assert "ood-monitor" not in "".join(capsys.readouterr())


def test_single_flagged_samples_fill_no_screen(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink()
    flagged = [replace(ALERT, kind="sample", severity="warning", id=f"{i:032x}") for i in range(25)]
    for alert in (*flagged, flagged[0], ALERT):
        sink(alert)
    lines = capsys.readouterr().out.splitlines()
    assert [("sample (" in line, "no more lines" in line) for line in lines] == [
        *[(True, False)] * 19,
        (True, True),
        (False, False),
    ]


def test_a_console_that_cannot_write_a_name_escapes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    ConsoleSink()(replace(ALERT, stream="größe\x1b[31m"))
    assert b"stream gr\\xf6\\xdfe\\x1b[31m, " in written.getvalue()


# The loggers


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def told_to(sinks: Any, *alerts: Alert) -> int:
    count = 0
    for sink in sinks:
        count += 1
        for alert in alerts:
            sink(alert)
    return count


def test_a_csv_logger_has_alerts_and_figures_beside_its_metrics(
    module: Flow, detector: om.Detector, tmp_path: Path
) -> None:
    logger, callback = CSVLogger(tmp_path), watching(detector, watch=["test"])
    trainer(callback, logger=logger).test(module, loader(drifting()), verbose=False)
    folder = Path(logger.log_dir) / "ood" / "alerts"
    found = [Alert.from_json(file.read_text()) for file in folder.glob("*.json")]
    assert sorted(found, key=lambda alert: alert.number) == callback.alerts
    (drift,) = (alert for alert in callback.alerts if alert.kind == "drift")
    assert (folder / f"{drift.id}.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(logger)
    assert not [name for name in rows[0] if "alert" in name]  # which are no metrics


def test_an_explanation_stands_beside_its_alert(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    explanation = replace(ALERT, kind="explanation", explains=ALERT.id, id="e" * 32)
    nothing = replace(ALERT, id="0" * 32, trace=(), top_layers=(), top_terms=())
    sinks = logger_sinks([logger], "ood/test", lambda alert: 0, Failures("x"))
    assert told_to(sinks, ALERT, explanation, nothing, ALERT) == 1
    folder = Path(logger.log_dir) / "ood" / "alerts"
    names = [ALERT.id, f"{ALERT.id}-explanation"]
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.{suffix}" for name in names for suffix in ("json", "png")),
        f"{nothing.id}.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("log_alerts", [True, False])
def test_every_logger_is_told_or_none(
    log_alerts: bool, module: Flow, detector: om.Detector, tmp_path: Path
) -> None:
    table, runs = CSVLogger(tmp_path), mlflow_logger(tmp_path)
    callback = watching(detector, log_alerts=log_alerts)
    trainer(callback, logger=[table, runs]).predict(module, loader(drifting()))
    places = [Path(table.log_dir) / "ood", tmp_path / "artifacts" / str(runs.run_id) / "artifacts"]
    files = [{file.name for file in place.rglob("*.json")} for place in places]
    expected = {alert.id for alert in callback.alerts if alert.kind != "explanation"}
    for found in files:
        assert bool(found) == log_alerts
        assert not log_alerts or {f"{name}.json" for name in expected} <= found


class Unreachable(Logger):
    """A logger whose experiment cannot be had."""

    name, version = "unreachable", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def experiment(self) -> Any:
        raise ConnectionError("no route to host")


def test_a_logger_that_fails_silences_no_other(tmp_path: Path) -> None:
    broken, sound = CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    (Path(broken.experiment.log_dir) / "ood").write_text("in the way")
    sinks, failures = [], Failures("OODMonitor")
    with pytest.warns(UserWarning, match="could not reach a logger: no route to host"):
        sinks += logger_sinks([Unreachable(), broken, sound], "ood/x", lambda alert: 0, failures)
    with pytest.warns(UserWarning, match="could not write an alert to a logger") as told:
        told_to(sinks, ALERT, replace(ALERT, id="1" * 32))
    assert len(told) == 1
    assert failures.counts["could not write an alert to a logger"] == 2
    assert len(list((Path(sound.log_dir) / "ood" / "alerts").glob("*.json"))) == 2


# One meaning at each step


def mlflow_logger(folder: Path) -> MLFlowLogger:
    return MLFlowLogger(
        "test",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_location=(folder / "artifacts").as_uri(),
    )


def steps_in(logger: CSVLogger | MLFlowLogger) -> dict[str, list[int]]:
    """The steps of each of our metrics, in the order they were logged."""
    if isinstance(logger, MLFlowLogger):
        client, run_id = logger.experiment, logger.run_id
        names = [name for name in client.get_run(run_id).data.metrics if name.startswith("ood/")]
        history = {name: client.get_metric_history(run_id, name) for name in names}
        return {name: sorted(metric.step for metric in found) for name, found in history.items()}
    rows = rows_of(logger)
    names = [name for name in rows[0] if name.startswith("ood/")]
    return {name: [int(row["step"]) for row in rows if row[name]] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("make", [CSVLogger, mlflow_logger])
def test_predictions_after_each_other_go_on_at_the_steps_after(
    make: Any, module: Flow, detector: om.Detector, tmp_path: Path
) -> None:
    logger, callback = make(tmp_path), watching(detector, watch=["test", "predict"])
    run = trainer(callback, logger=logger, log_every_n_steps=2)
    run.predict(module, loader(drifting()))
    run.test(module, loader(drifting()), verbose=False)
    run.predict(module, [loader(images(40, seed=2)), loader(images(33, seed=3))])
    steps = steps_in(logger)
    assert {name for name, found in steps.items() if max(Counter(found).values()) > 1} == set()
    for figure in ("status", "invalid"):  # others may not be defined at a step
        assert {128, 128 + 73} <= set(steps[f"ood/predict/{figure}"])
    for figure in OF_STREAM | OF_LOADER:
        assert steps[f"ood/test/{figure}"] == [0]
    for figure in OF_LOADER:
        assert steps[f"ood/predict/0/{figure}"] == steps[f"ood/predict/1/{figure}"] == [201]


@pytest.mark.slow
@pytest.mark.parametrize("make", [CSVLogger, mlflow_logger])
def test_validations_of_a_fit_are_logged_at_its_steps(make: Any, tmp_path: Path) -> None:
    """Also with several dataloaders, and none by the sanity check."""
    module = Flow()
    logger, callback = make(tmp_path), watching(fitted_on(module), watch=["val"])
    run = trainer(callback, logger=logger, num_sanity_val_steps=2)
    with pytest.warns(UserWarning, match="stale calibration"):
        run.fit(module, loader(images(64)), [loader(images(64, seed=s)) for s in (1, 2)])
    steps = steps_in(logger)
    of_loaders = {f"ood/val/{index}/{figure}" for index in "01" for figure in OF_LOADER}
    assert steps.keys() == of_loaders | {f"ood/val/{figure}" for figure in OF_STREAM | OF_LOADER}
    assert all(found == [1, 3] for found in steps.values())
