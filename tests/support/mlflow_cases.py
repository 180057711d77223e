"""What a monitor says, for MLflow to show, and what a run shows of it."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

# MLflow reads them once, when it is imported.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

from mlflow import MlflowClient

from ood_monitor.alerts import Alert, LayerShare, Summary
from support.alert_cases import EVIDENCE

NOTE = "mlflow.note.content"
HOUR = timedelta(hours=1)
DRIFT = Alert(
    kind="drift",
    severity="critical",
    stream="production",
    samples_seen=1234,
    message="Two of three samples are unlike the training data: ä, \\1.",
    evidence=EVIDENCE,
    top_layers=(LayerShare("up.0.weight", 0.62, 8.1), LayerShare("up.0.bias", 0.2, -3.0)),
    number=10,
    detector="d5",
    model="m7",
)
SAMPLE = replace(
    DRIFT,
    kind="sample",
    severity="warning",
    status="WARN",
    samples_seen=700,
    message="Anomalous sample.",
    number=7,
    time=DRIFT.time - HOUR,
    id="a" * 32,
)
RECOVERED = replace(
    DRIFT,
    kind="recovered",
    severity="info",
    status="OK",
    samples_seen=2000,
    message="Recovered.",
    number=20,
    time=DRIFT.time + HOUR,
    id="f" * 32,
)
SUMMARY = Summary(
    stream="production",
    samples_seen=500,
    status="OK",
    score_mean=0.5,
    score_p95=1.5,
    flagged_rate=0.01,
    log_e_value=-0.25,
    invalid={"not scored": 2, "too long": 1},
    number=5,
    time=DRIFT.time - 2 * HOUR,
)


def tags(client: MlflowClient, run_id: str) -> dict[str, str]:
    return client.get_run(run_id).data.tags


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    metrics = client.get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in metrics)


def artifact(client: MlflowClient, run_id: str, path: str) -> bytes:
    return Path(client.download_artifacts(run_id, path)).read_bytes()
