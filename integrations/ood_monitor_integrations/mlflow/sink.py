"""Alerts in MLflow: metrics, tags, artifacts and a paragraph in the run's note.

MLflow records and shows, it does not notify; ``tags.`ood_monitor.status` = 'ALERT'`` finds runs.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ood_monitor.alerts import Alert, AlertEvidence, Status, Summary
from ood_monitor.checks import items, text, whole
from ood_monitor.plots import alert_figure
from ood_monitor_integrations.mlflow.note import note_with
from ood_monitor_integrations.mlflow.tags import DETECTOR, METHOD, SINCE, STATUS

__all__ = ["MLflowSink"]

_RAISED = {"sample": 1.0, "drift": 1.0, "recovered": 0.0}  # other kinds leave `ood/alert` alone

_FILE_STORE = (
    "MLflow no longer writes to the file store {uri!r}; it chooses ./mlruns by itself where that "
    "folder holds old runs. Pass tracking_uri='sqlite:///mlflow.db' or a server's address, move "
    "the old runs with `mlflow migrate-filestore`, or set MLFLOW_ALLOW_FILE_STORE=true."
)

_log = logging.getLogger(__name__)


class _Logger(Protocol):
    @property
    def run_id(self) -> str | None: ...
    @property
    def experiment(self) -> Any: ...  # whatever the Lightning logger has


class MLflowSink:
    """Shows alerts and summaries on one MLflow run, with the number of samples seen as the step.

    It holds the run's id and a client, so any thread may call it, one at a time; it neither needs
    nor changes the active run. A repeated alert overwrites what the first try left. One run shows
    one stream: a second stream needs a run of its own.

    A server that is down costs the watched program nothing. MLflow's client itself tries again for
    minutes; `MLFLOW_HTTP_REQUEST_MAX_RETRIES` and `MLFLOW_HTTP_REQUEST_TIMEOUT` shorten that.

    Args:
        run_id: The run; by default the logger's, or else the run that is active in the thread that
            makes the sink.
        logger: A Lightning `MLFlowLogger`, for its client and its run.
        model_version: Name and version of a registered model that shows the status too, as the tag
            `ood_monitor.status`. It is set when the status changes and only then, so that MLflow's
            own webhook for `model_version_tag.set` tells a channel or a pager of each change once.
        tracking_uri: The store; by default MLflow's own.
        client: A client to use instead of one for `tracking_uri`.

    Raises:
        ValueError: If no run is given and none is active, two of `logger`, `tracking_uri` and
            `client` are given, or the store is a file store, which MLflow refuses.
        TypeError: If `logger` is another kind of logger, or an option of another type.
        mlflow.exceptions.MlflowException: If the run or the model version does not exist.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        logger: _Logger | None = None,
        model_version: tuple[str, str | int] | None = None,
        tracking_uri: str | None = None,
        client: MlflowClient | None = None,
    ) -> None:
        for name, value in (("run_id", run_id), ("tracking_uri", tracking_uri)):
            if value is not None:
                text(name, value)
        version = None if model_version is None else _checked_version(model_version)
        if sum(given is not None for given in (logger, tracking_uri, client)) > 1:
            raise ValueError("Expected one of logger, tracking_uri and client, got more.")
        if logger is not None:
            client, run_id = _of_logger(logger, run_id)
        self.run_id = run_id or _active_run_id()
        self._client = client or _client(tracking_uri)
        # Across restarts a run keeps its status until this sink is told otherwise.
        tags = self._client.get_run(self.run_id).data.tags
        self._status, self._latest = tags.get(STATUS), _time(tags.get(SINCE))
        self._version = version
        self._version_status = self._shown_by_version()

    @classmethod
    def from_logger(cls, logger: _Logger) -> Self:
        """A sink for the run that a Lightning `MLFlowLogger` writes to.

        Raises:
            TypeError: If it is another kind of logger.
            ValueError: If it has no run, as on every rank but 0.
        """
        return cls(logger=logger)

    def __call__(self, alert: Alert, /) -> None:
        """Record `alert`. It may take long and may raise: leave it to a `Dispatcher`."""
        values = _figures(alert.evidence) | {"ood/alert": _RAISED.get(alert.kind)}
        # One that comes late, after an outage, is recorded, and changes no later status.
        is_news = alert.time >= self._latest
        tags = self._transition(alert.status, alert.time) if is_news else {}
        tags |= {DETECTOR: alert.detector}
        if alert.method is not None:
            tags |= {METHOD: alert.method}
        self._log_batch(values, tags, alert.samples_seen, alert.time)
        folder = f"ood/alerts/{alert.id}"
        self._client.log_text(self.run_id, alert.to_json(indent=2), f"{folder}.json")
        self._client.log_figure(self.run_id, alert_figure(alert), f"{folder}.png")
        if is_news:
            self._note(alert)
            self._show(alert.status, alert.time)

    def summarise(self, summary: Summary, /) -> None:
        """Record the running figures; `ood/alert` is 1 while the status is ALERT."""
        values = _figures(summary) | {"ood/alert": float(summary.status == "ALERT")}
        is_news = summary.time >= self._latest
        tags = self._transition(summary.status, summary.time) if is_news else {}
        self._log_batch(values, tags, summary.samples_seen, summary.time)
        if is_news:
            self._show(summary.status, summary.time)

    def _show(self, status: Status, time: datetime) -> None:
        """The run shows it; the model version is to follow.

        MLflow's webhooks fire with every tag that is set, so none is set to what it is.
        """
        self._status, self._latest = status, time
        if self._version is not None and status != self._version_status:
            if self._shown_by_version() != status:
                self._client.set_model_version_tag(*self._version, STATUS, status)
            self._version_status = status

    def _shown_by_version(self) -> str | None:
        if self._version is None:
            return None
        status: str | None = self._client.get_model_version(*self._version).tags.get(STATUS)
        return status

    def _transition(self, status: str, time: datetime) -> dict[str, str]:
        return {} if status == self._status else {STATUS: status, SINCE: time.isoformat()}

    def _log_batch(
        self, values: Mapping[str, float | None], tags: Mapping[str, str], step: int, time: datetime
    ) -> None:
        milliseconds = int(time.timestamp() * 1000)
        metrics = [
            Metric(key, value, milliseconds, step)
            for key, value in values.items()
            if value is not None
        ]
        marks = [RunTag(key, value) for key, value in tags.items()]
        # Synchronous whatever the environment says: only then does a failure show, to be repeated.
        self._client.log_batch(self.run_id, metrics, tags=marks, synchronous=True)

    def _note(self, alert: Alert) -> None:
        note = self._client.get_run(self.run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
        changed = note_with(note, alert)
        if changed is None:
            _log.warning("The note of run %s has no room for the alert.", self.run_id)
            return
        self._client.set_tag(self.run_id, MLFLOW_RUN_NOTE, changed, synchronous=True)


def _of_logger(logger: _Logger, run_id: str | None) -> tuple[MlflowClient, str]:
    client = getattr(logger, "experiment", None)
    if not hasattr(logger, "run_id") or not hasattr(client, "log_batch"):
        raise TypeError(f"Expected Lightning's MLFlowLogger, got {type(logger).__qualname__}.")
    run_id = run_id or logger.run_id
    if run_id is None:
        raise ValueError("Expected a logger with a run; Lightning opens it on rank 0 only.")
    return logger.experiment, run_id


def _checked_version(version: tuple[str, str | int]) -> tuple[str, str]:
    if len(parts := items("model_version", version)) != 2:
        raise ValueError(f"Expected model_version as a name and a version, got {version!r}.")
    name, number = parts
    of = number if isinstance(number, str) else str(whole("a model's version", number, 1))
    return text("a model's name", name), text("a model's version", of)


def _time(since: str | None) -> datetime:
    """When a status that is found on a run began; long ago if it does not say."""
    try:
        return datetime.fromisoformat(since or "").astimezone(UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def _active_run_id() -> str:
    run = mlflow.active_run()
    if run is None:
        raise ValueError("Expected an active MLflow run in this thread: start one or pass run_id.")
    return str(run.info.run_id)


def _client(tracking_uri: str | None) -> MlflowClient:
    try:
        return MlflowClient(tracking_uri)
    except MlflowException as error:
        if "MLFLOW_ALLOW_FILE_STORE" not in str(error):
            raise
        uri = tracking_uri or mlflow.get_tracking_uri()
        raise ValueError(_FILE_STORE.format(uri=uri)) from error


def _figures(source: AlertEvidence | Summary) -> dict[str, float | None]:
    return {
        "ood/score_mean": source.score_mean,
        "ood/score_p95": source.score_p95,
        "ood/flagged_rate": source.flagged_rate,
        "ood/log_e_value": source.log_e_value,
    }
