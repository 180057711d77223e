"""Alerts in MLflow: metrics, tags, artifacts and a paragraph in the run's note.

MLflow records and shows, it does not notify; ``tags.`ood_monitor.status` = 'ALERT'`` finds runs.
"""

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ood_monitor.alerts import Alert, AlertEvidence, LayerShare, Summary
from ood_monitor.plots import alert_figure

__all__ = ["MLflowSink"]

_STATUS, _SINCE, _DETECTOR = "ood_monitor.status", "ood_monitor.since", "ood_monitor.detector"
_RANKS = ("OK", "WARN", "ALERT")
_SEVERITY = {"info": "OK", "warning": "WARN", "critical": "ALERT"}
_RAISED = {"sample": 1.0, "drift": 1.0, "recovered": 0.0}  # other kinds leave `ood/alert` alone

_BEGIN, _END = "<!-- ood-monitor:begin -->", "<!-- ood-monitor:end -->"
# No begin mark inside: if a user deleted an end mark, the text after it is the user's.
_BLOCK = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)
_NOTE_LIMIT = 8000  # MLflow cuts longer tag values, which would cut the user's text
_NAMED_LAYERS = 5

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

    Args:
        run_id: The run; by default the run that is active in the thread that makes the sink.
        tracking_uri: The store; by default MLflow's own.
        client: A client to use instead of one for `tracking_uri`.

    Raises:
        ValueError: If no run is given and none is active, both `tracking_uri` and `client` are
            given, or the store is a file store, which MLflow refuses.
        mlflow.exceptions.MlflowException: If the run does not exist.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        tracking_uri: str | None = None,
        client: MlflowClient | None = None,
    ) -> None:
        if client and tracking_uri:
            raise ValueError("Expected a client or a tracking URI, got both.")
        self.run_id = run_id or _active_run_id()
        self._client = client or _client(tracking_uri)
        # Across restarts a run keeps its status until this sink is told otherwise.
        status = self._client.get_run(self.run_id).data.tags.get(_STATUS)
        self._status: str | None = status if status in _RANKS else None

    @classmethod
    def from_logger(cls, logger: _Logger) -> Self:
        """A sink for the run that a Lightning `MLFlowLogger` writes to.

        Raises:
            TypeError: If it is another kind of logger.
            ValueError: If it has no run, as on every rank but 0.
        """
        client = getattr(logger, "experiment", None)
        if not hasattr(logger, "run_id") or not hasattr(client, "log_batch"):
            raise TypeError(f"Expected Lightning's MLFlowLogger, got {type(logger).__qualname__}.")
        if logger.run_id is None:
            raise ValueError("Expected a logger with a run; Lightning opens it on rank 0 only.")
        return cls(logger.run_id, client=client)

    def __call__(self, alert: Alert, /) -> None:
        """Record `alert`. It may take long and may raise: leave it to a `Dispatcher`."""
        status = self._status_after(alert)
        values = _figures(alert.evidence) | {"ood/alert": _RAISED.get(alert.kind)}
        tags = {_DETECTOR: alert.detector} | self._transition(status, alert.time)
        self._log_batch(values, tags, alert.samples_seen, alert.time)
        self._status = status
        folder = f"ood/alerts/{alert.id}"
        self._client.log_text(self.run_id, alert.to_json(indent=2), f"{folder}.json")
        self._client.log_figure(self.run_id, alert_figure(alert), f"{folder}.png")
        self._note(_block(alert, status))

    def summarise(self, summary: Summary, /) -> None:
        """Record the running figures; `ood/alert` is 1 while the status is ALERT."""
        now = datetime.now(UTC)
        values = _figures(summary) | {"ood/alert": float(summary.status == "ALERT")}
        self._log_batch(values, self._transition(summary.status, now), summary.samples_seen, now)
        self._status = summary.status

    def _status_after(self, alert: Alert) -> str:
        """No alert but a recovery lowers the status: a flagged sample does not end a drift."""
        if alert.kind == "recovered":
            return "OK"
        new = "ALERT" if alert.kind == "drift" else _SEVERITY[alert.severity]
        return max(new, self._status or "OK", key=_RANKS.index)

    def _transition(self, status: str, time: datetime) -> dict[str, str]:
        return {} if status == self._status else {_STATUS: status, _SINCE: time.isoformat()}

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

    def _note(self, block: str) -> None:
        note = self._client.get_run(self.run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
        changed, found = _BLOCK.subn(lambda _: block, note, count=1)
        if not found:
            changed = f"{note}\n\n{block}" if note else block
        if len(changed) > _NOTE_LIMIT:
            _log.warning("The note of run %s has no room for the alert.", self.run_id)
            return
        self._client.set_tag(self.run_id, MLFLOW_RUN_NOTE, changed, synchronous=True)


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


def _block(alert: Alert, status: str) -> str:
    """What the note says of `alert`, in Markdown, between our marks."""
    time = alert.time.isoformat(" ", "seconds")
    text = (
        f"**ood-monitor: {status}** ({alert.kind}, stream {alert.stream}, "
        f"{alert.samples_seen:,} samples seen, {time})\n\n{alert.message}\n\n"
        f"{_layers(alert.top_layers)}Evidence: `ood/alerts/{alert.id}.json`"
    )
    # A name must not end the comment, or our block would no longer be found.
    return f"{_BEGIN}\n{text.replace('<!--', '').replace('-->', '')}\n{_END}"


def _layers(layers: tuple[LayerShare, ...]) -> str:
    named = [f"`{layer.layer}`" for layer in layers[:_NAMED_LAYERS]]
    return f"Layers: {', '.join(named)}\n\n" if named else ""
