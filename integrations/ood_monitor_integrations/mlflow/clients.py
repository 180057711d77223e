"""Which run and which store a sink writes to; what can be refused without a server is, at once."""

import re
from typing import Any, Protocol
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES, SQLITE

__all__ = ["Logger", "checked_stage", "client_of", "of_logger", "run_of_this_thread"]

_FILE_STORE = (
    "MLflow no longer writes to the file store {uri!r}; it chooses ./mlruns by itself where that "
    "folder holds old runs. Pass tracking_uri='sqlite:///mlflow.db' or a server's address, move "
    "the old runs with `mlflow migrate-filestore`, or set MLFLOW_ALLOW_FILE_STORE=true."
)

#: Words of a stage: what MLflow takes in the names of metrics and tags, which have 250 characters.
_STAGE = re.compile(r"[A-Za-z0-9_. -]+(/[A-Za-z0-9_. -]+)*")
_LONGEST_STAGE = 200


class Logger(Protocol):
    """A Lightning `MLFlowLogger`."""

    @property
    def run_id(self) -> str | None:
        """Of its run; None on every rank but 0."""

    @property
    def experiment(self) -> Any:
        """Its client."""


def of_logger(logger: Logger, run_id: str | None) -> tuple[MlflowClient, str]:
    """A logger's client and its run, or the one given.

    Raises:
        TypeError: It is another kind of logger.
        ValueError: It has no run.
    """
    client = getattr(logger, "experiment", None)
    if not hasattr(logger, "run_id") or not hasattr(client, "log_batch"):
        raise TypeError(f"Expected Lightning's MLFlowLogger, got {type(logger).__qualname__}.")
    run_id = run_id or logger.run_id
    if run_id is None:
        raise ValueError("Expected a logger with a run; Lightning opens it on rank 0 only.")
    return logger.experiment, run_id


def client_of(tracking_uri: str) -> MlflowClient | None:
    """A client; None of a database that has a server, which MLflow would go to at once.

    Raises:
        ValueError: A file store, which MLflow refuses.
        mlflow.exceptions.MlflowException: A store of no kind that MLflow knows.
    """
    scheme = urlsplit(tracking_uri).scheme.partition("+")[0]
    if scheme in DATABASE_ENGINES and scheme != SQLITE:
        return None
    try:
        return MlflowClient(tracking_uri)
    except MlflowException as error:
        if "MLFLOW_ALLOW_FILE_STORE" not in str(error):
            raise
        raise ValueError(_FILE_STORE.format(uri=tracking_uri)) from error


def run_of_this_thread() -> str:
    """The id of the run that is active in this thread.

    Raises:
        ValueError: None is.
    """
    run = mlflow.active_run()
    if run is None:
        raise ValueError("Expected an active MLflow run in this thread: start one or pass run_id.")
    return str(run.info.run_id)


def checked_stage(stage: str) -> str:
    """Words that names of metrics and tags may hold.

    Raises:
        ValueError: Others.
    """
    words = stage.split("/")
    if not _STAGE.fullmatch(stage) or {".", ".."} & set(words) or len(stage) > _LONGEST_STAGE:
        raise ValueError(
            "Expected stage as words of letters, digits and _ . - with / between them, "
            f"{_LONGEST_STAGE} characters at most, got {stage!r}."
        )
    return stage
