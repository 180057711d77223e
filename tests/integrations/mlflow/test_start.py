"""A server that is down when a sink is made: making it goes to none, and nothing is lost."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ood_monitor_integrations.lightning.loggers import mlflow_sinks
from ood_monitor_integrations.mlflow import MLflowSink
from support.mlflow_cases import DRIFT, SUMMARY, tags
from support.mlflow_server import Server

from ood_monitor.alerts import Dispatcher

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

LONG = 300.0


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket that would hold a caller for ever, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def was_called(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql", "mssql+pyodbc"])
def test_making_a_sink_goes_to_no_server(scheme: str) -> None:
    """Of the databases the drivers are not installed: their absence would be told, too."""
    with listening() as (server, address):
        MLflowSink("0" * 32, model_version=("x", 1), tracking_uri=f"{scheme}://{address}/x")
        assert not was_called(server)


def test_the_first_call_goes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with listening() as (server, address):
        sink = MLflowSink("0" * 32, tracking_uri=f"http://{address}")
        with Dispatcher([sink], tries=1) as dispatcher:
            dispatcher.summarise(SUMMARY)
            dispatcher.flush(60)
        assert was_called(server)
        assert dispatcher.failures == {sink.name: 1}


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_the_sink_of_a_logger_with_a_run_goes_to_no_server(stage: str) -> None:
    """As at the beginning of a stage: the Trainer has opened the run before."""
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    with listening() as (server, address):
        logger = loggers.MLFlowLogger(run_id="0" * 32, tracking_uri=f"http://{address}")
        logger._initialized = True
        (sink,) = mlflow_sinks([logger], stage, metrics=True, first_step=0)
        assert sink.run_id == "0" * 32
        assert not was_called(server)


def test_a_server_that_does_not_answer_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No refusal for good, and no other failure of MLflow's that passes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with listening() as (_, address):
        pass  # nobody is there any more
    with pytest.raises(MlflowException, match="failed with"):
        MLflowSink("0" * 32, tracking_uri=f"http://{address}")(DRIFT)


@pytest.mark.slow
def test_a_server_that_starts_late_gets_the_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    server = Server(tmp_path, starts=False)
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")  # the server's own
    store.create_experiment("ood", (tmp_path / "runs").as_uri())
    run_id = store.create_run("1").info.run_id
    store.create_registered_model("flow")
    store.create_model_version("flow", f"runs:/{run_id}/model", run_id)
    sink = MLflowSink(run_id, model_version=("flow", 1), tracking_uri=server.url)
    with Dispatcher([sink], tries=1000) as dispatcher:
        dispatcher.send(DRIFT)
        deadline = time.monotonic() + LONG
        while not dispatcher.failures[sink.name] and time.monotonic() < deadline:
            time.sleep(0.1)
        server.start()
        try:
            assert dispatcher.flush(LONG)
            assert dispatcher.undelivered_count == 0
            assert dispatcher.failures[sink.name] > 0
            assert tags(MlflowClient(server.url), run_id)["ood_monitor.status"] == "ALERT"
            version = MlflowClient(server.url).get_model_version("flow", "1")
            assert version.tags["ood_monitor.status"] == "ALERT"
        finally:
            server.kill()
