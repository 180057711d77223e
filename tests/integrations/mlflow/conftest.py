"""A store of runs on this disk, without a server."""

import os
from collections.abc import Iterator

import mlflow
import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowClient, str]]:
    """A client of a SQLite store that is made once, and an experiment in it."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        client = MlflowClient()
        yield client, client.create_experiment("ood", (folder / "artifacts").as_uri())
        mlflow.set_tracking_uri(None)


@pytest.fixture
def client(store: tuple[MlflowClient, str]) -> MlflowClient:
    return store[0]


@pytest.fixture
def run_id(store: tuple[MlflowClient, str]) -> str:
    client, experiment = store
    return client.create_run(experiment).info.run_id
