"""Alerts in TensorBoard and Weights & Biases, read from what these have written offline."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from support.lightning_cases import Flow, images, loader, trainer, watcher
from torch import cat

import ood_monitor as om

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs are many


def predicted(logger: Any) -> OODMonitor:
    module = Flow()
    held_out = [images(128, seed=1)]
    detector = om.Detector(om.LogLikelihood(module)).fit(held_out, progress=False)
    callback = watcher(detector=detector, calibrate="never")
    stream = loader(cat([images(64, seed=2), images(64, seed=3) / 4]))
    trainer(callback, logger=logger).predict(module, stream)
    assert callback.failures == 0
    assert "drift" in [alert.kind for alert in callback.alerts]
    return callback


def test_tensorboard_has_a_text_and_a_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback = predicted(logger)
    found = EventAccumulator(logger.log_dir).Reload()
    texts = found.Tensors("ood/predict/alerts/text_summary")
    assert [text.step for text in texts] == [alert.samples_seen for alert in callback.alerts]
    for text, alert in zip(texts, callback.alerts, strict=True):
        told = text.tensor_proto.string_val[0].decode()
        assert told.startswith(f"{alert.severity}: {alert.kind} ")
        assert alert.id in told
    images_of = {image.step for image in found.Images("ood/predict/alerts")}
    assert {alert.samples_seen for alert in callback.alerts if alert.kind == "drift"} <= images_of
    assert [scalar.step for scalar in found.Scalars("ood/predict/status")][-1] == 128


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    import wandb

    wandb.finish()


def test_wandb_has_a_table_and_a_figure(offline: Path) -> None:
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    callback = predicted(logger)
    media = Path(logger.experiment.dir) / "media"
    tables = sorted(media.rglob("*.table.json"), key=lambda file: file.stat().st_mtime_ns)
    rows = [json.loads(table.read_text()) for table in tables]
    assert [row["data"][0][-1] for row in rows] == [alert.id for alert in callback.alerts]
    assert rows[0]["columns"] == ["kind", "severity", "samples_seen", "message", "id"]
    assert list(media.rglob("figure_*.png"))
