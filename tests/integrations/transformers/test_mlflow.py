"""Alerts on the MLflow run that a Trainer reports to, also after the Trainer has ended it."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from support.transformers_cases import Texts, callback, llama, trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_alerts_are_on_the_run_of_the_trainer_after_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        watch = callback()
        run = trainer(llama(), tmp_path, watch, num_train_epochs=1, report_to=["mlflow"])
        run.train()
        run_id = watch._mlflow_run.id
        mlflow.end_run()
        assert mlflow.active_run() is None
        run.predict(Texts(64, 8, foreign=True))
        client = MlflowClient(uri)
        assert run_id is not None
        found = client.get_run(run_id).data
        runs = client.search_runs(["0", "1"])
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(None)
    assert watch._failures.counts == {}
    assert found.tags["ood_monitor.status"] == "ALERT"
    assert found.metrics["ood/predict/flagged_rate"] > 0.3
    assert {each.info.run_id for each in runs} == {run_id}
