"""Alerts in MLflow: tags, artifacts and a paragraph in the run's note; running figures as metrics.

MLflow records and shows, it does not notify; ``tags.`ood_monitor.status` = 'ALERT'`` finds runs.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ood_monitor.alerts import Alert, AlertKind, Status, Summary, gravest_of
from ood_monitor.checks import flag, text, whole
from ood_monitor.plots import alert_figure
from ood_monitor_integrations.alert_files import place_of
from ood_monitor_integrations.metrics import STATUSES, metrics_of, prefix_of
from ood_monitor_integrations.mlflow.clients import (
    Logger,
    checked_stage,
    client_of,
    of_logger,
    run_of_this_thread,
)
from ood_monitor_integrations.mlflow.note import REPORT, note_with, with_report
from ood_monitor_integrations.mlflow.refusals import refusals
from ood_monitor_integrations.mlflow.shown import Shown, worst
from ood_monitor_integrations.mlflow.tags import SINCE, STATUS
from ood_monitor_integrations.mlflow.version import ShownVersion

__all__ = ["MLflowSink"]

#: Of a picture that the run's note shows: one that is wider makes its text as wide, out of sight.
_DPI = 100

_log = logging.getLogger(__name__)


class MLflowSink:
    """Shows alerts and running figures on one MLflow run, the number of samples seen as the step.

    Running figures are metrics, ``ood/status`` and the others of the table in the design; an alert
    is an event: its JSON and figure, tags, and a paragraph in the run's note. What was said later,
    by its number and not by the clock, is what status and note show; what comes late, after an
    outage, leaves its artifacts. The numbers stand in tags, by which a new sink goes on.

    It holds the run's id and a client, so any thread may call it, one at a time; it neither needs
    nor changes the active run. A repeated alert overwrites what the first try left. One run shows
    one stream: a second stream needs a run of its own, or a ``stage``.

    Making one needs no server, and goes to none: a run or a model version that does not exist is
    a failure of the first call. As all that MLflow refuses for good (no permission, a value that is
    none) it is a :class:`~ood_monitor.alerts.Refused`, which is not tried again. A server that is
    down costs the watched program nothing. MLflow's client itself tries again for minutes, so that
    one call may take as long, which no monitor waits for: `close` gives up by its own time, and the
    spool keeps what is owed. `MLFLOW_HTTP_REQUEST_MAX_RETRIES` and `MLFLOW_HTTP_REQUEST_TIMEOUT`
    shorten a call; MLflow takes them from the environment alone.

    Args:
        run_id: The run; by default the logger's, or else the run that is active in the thread that
            makes the sink.
        logger: A Lightning `MLFlowLogger`, for its client and its run. One that has not opened its
            run yet does so now, which takes its server.
        model_version: Name and version of a registered model that shows the status too, as the tag
            `ood_monitor.status`. It is set when the status changes and only then, so that MLflow's
            own webhook for `model_version_tag.set` tells a channel or a pager of each change once.
            The tag `ood_monitor.status_of` names the version: of a copy the source's status is
            none.
        tracking_uri: The store; by default MLflow's own.
        client: A client to use instead of one for `tracking_uri`.
        stage: Words, such as ``"test"`` or ``"second/test"``, that tell several streams of one run
            apart: the metrics are ``ood/test/status`` and so on, and the stream's tags end in
            ``.test``. The tag `ood_monitor.status` is then that of the worst of them, and the note
            tells of one that stands as bad.
        metrics: Whether running figures become metrics; if not, they set the status alone.
        first_step: What the steps count on from, where streams of one stage follow each other in a
            run: the samples of those before.

    Attributes:
        run_id: The run.
        name: By which a spool owes it alerts: the run, and the stage.

    Raises:
        ValueError: If no run is given and none is active, two of `logger`, `tracking_uri` and
            `client` are given, the store is a file store, which MLflow refuses, or `stage` has
            characters that MLflow refuses.
        TypeError: If `logger` is another kind of logger, or an option of another type.
        mlflow.exceptions.MlflowException: If `tracking_uri` is of no kind that MLflow knows.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        logger: Logger | None = None,
        model_version: tuple[str, str | int] | None = None,
        tracking_uri: str | None = None,
        client: MlflowClient | None = None,
        stage: str | None = None,
        metrics: bool = True,
        first_step: int = 0,
    ) -> None:
        for name, value in (("run_id", run_id), ("tracking_uri", tracking_uri), ("stage", stage)):
            if value is not None:
                text(name, value)
        self._version = None if model_version is None else ShownVersion.of(model_version)
        self._stage = None if stage is None else checked_stage(stage)
        self._has_metrics = flag("metrics", metrics)
        self._first_step = whole("first_step", first_step)
        if sum(given is not None for given in (logger, tracking_uri, client)) > 1:
            raise ValueError("Expected one of logger, tracking_uri and client, got more.")
        if logger is not None:
            client, run_id = of_logger(logger, run_id)
        self.run_id = run_id or run_of_this_thread()
        self.name = f"mlflow:{self.run_id}" + ("" if stage is None else f"/{stage}")
        self._uri = tracking_uri or mlflow.get_tracking_uri()
        self._made_client = client_of(self._uri) if client is None else client
        self._found: Shown | None = None
        self._told: Alert | None = None  # by the note
        self._stands: dict[AlertKind, Alert] = {}  # what began it, of those that this sink was told
        self._step: tuple[int, Status] | None = None

    @classmethod
    def from_logger(
        cls,
        logger: Logger,
        *,
        stage: str | None = None,
        metrics: bool = True,
        first_step: int = 0,
    ) -> Self:
        """A sink for the run that a Lightning `MLFlowLogger` writes to.

        Raises:
            TypeError: If it is another kind of logger.
            ValueError: If it has no run, as on every rank but 0.
        """
        return cls(logger=logger, stage=stage, metrics=metrics, first_step=first_step)

    @refusals()
    def __call__(self, alert: Alert, /) -> None:
        """Record `alert`. It may take long and may raise: leave it to a `Dispatcher`."""
        shown = self._shown()
        is_news = shown.said.is_news(alert)
        if is_news:
            self._log_batch({}, shown.tags_of(alert), alert)
            self._follow(alert)
        place = place_of(alert)
        self._client.log_text(self.run_id, alert.to_json(indent=2), f"{place}.json")
        figure, small = alert_figure(alert), {"dpi": _DPI}
        self._client.log_figure(self.run_id, figure, f"{place}.png", save_kwargs=small)
        status = self._overall(alert.status if is_news else shown.status, alert.time)
        if alert.kind == "explanation":
            self._explain(alert)
        elif shown.told.is_news(alert) and STATUSES[alert.status] >= STATUSES[status]:
            self._tell(alert)
        if is_news:
            self._show(alert, status)

    @refusals()
    def summarise(self, summary: Summary, /) -> None:
        """Record the running figures, once a step, and the status."""
        shown = self._shown()
        is_news = shown.said.is_news(summary)
        step = summary.samples_seen, summary.status
        is_due = self._has_metrics and step != self._step
        metrics = metrics_of(summary, prefix_of(*self._words)) if is_due else {}
        self._log_batch(metrics, shown.tags_of(summary) if is_news else {}, summary)
        self._step = step
        if is_news:
            self._show(summary, self._overall(summary.status, summary.time))

    @refusals()
    def show_report(self, page: str) -> None:
        """Keep a report with the run, as `ood/report.html`, and link it in the run's note.

        The note of an alert that comes later links it too. Another sink of the run may do so, when
        no monitor is telling this one.

        Args:
            page: HTML, as `html_report` or `ood-monitor report` makes it.
        """
        self._client.log_text(self.run_id, text("page", page), REPORT)
        note = self._note()
        linked = self._linked(note)
        if linked != note:
            self._client.set_tag(self.run_id, MLFLOW_RUN_NOTE, linked, synchronous=True)

    @property
    def _client(self) -> MlflowClient:
        if self._made_client is None:
            self._made_client = MlflowClient(self._uri)
        return self._made_client

    @property
    def _words(self) -> list[str]:
        return [] if self._stage is None else [self._stage]

    def _shown(self) -> Shown:
        """What the run shows: until this sink is told otherwise, what it did before a restart."""
        if self._found is None:
            self._found = Shown(self._client.get_run(self.run_id).data.tags, self._stage)
        return self._found

    def _show(self, said: Alert | Summary, status: Status) -> None:
        """The run shows it; the model version is to follow."""
        if self._version is not None:
            self._version.show(self._client, status)
        self._shown().took(said)

    def _overall(self, own: Status, time: datetime) -> Status:
        """The run's status: of several streams that share it, that of the worst."""
        if self._stage is None:
            return own
        tags = self._client.get_run(self.run_id).data.tags
        status = worst(tags, otherwise=own)
        if tags.get(STATUS) != status:
            for tag, value in {STATUS: status, SINCE: time.isoformat()}.items():
                self._client.set_tag(self.run_id, tag, value, synchronous=True)
        return status

    def _log_batch(
        self, metrics: Mapping[str, float], tags: Mapping[str, str], said: Alert | Summary
    ) -> None:
        milliseconds, step = int(said.time.timestamp() * 1000), self._first_step + said.samples_seen
        entries = [Metric(key, value, milliseconds, step) for key, value in metrics.items()]
        marks = [RunTag(key, value) for key, value in tags.items()]
        # Synchronous whatever the environment says: only then does a failure show, to be repeated.
        self._client.log_batch(self.run_id, entries, tags=marks, synchronous=True)

    def _follow(self, alert: Alert) -> None:
        """Keep, of what stands in the alert's stream, the alert that it began with."""
        before = {kind: it for kind, it in self._stands.items() if it.stream == alert.stream}
        known = {alert.kind: alert} | before
        self._stands = {kind: known[kind] for kind in alert.standing if kind in known}

    def _tell(self, alert: Alert) -> None:
        """In the note, in the place of the alert that it tells of."""
        if self._write_note(self._note(), alert):
            self._shown().told.took(alert)
        self._told = alert

    def _explain(self, alert: Alert) -> None:
        """Add the layers of an explanation to the note, if it tells of what is explained."""
        note = self._note()
        if alert.top_layers and f"ood/alerts/{alert.explains}.json" in note:
            self._write_note(note, replace(self._explained(alert), top_layers=alert.top_layers))

    def _explained(self, alert: Alert) -> Alert:
        if self._told is None or self._told.id != alert.explains:  # it was told before a restart
            with TemporaryDirectory() as folder:
                path = f"ood/alerts/{alert.explains}.json"
                file = self._client.download_artifacts(self.run_id, path, folder)
                self._told = Alert.from_json(Path(file).read_text(encoding="utf-8"))
        return self._told

    def _note(self) -> str:
        note: str = self._client.get_run(self.run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
        return note

    def _write_note(self, note: str, alert: Alert) -> bool:
        graver = self._stands.get(gravest_of(alert))
        changed = note_with(note, alert, self.run_id, graver)
        if changed is None:
            _log.warning("The note of run %s has no room for the alert. [OOD701]", self.run_id)
            return False
        if any(file.path == REPORT for file in self._client.list_artifacts(self.run_id, "ood")):
            changed = self._linked(changed)
        self._log_batch({}, {MLFLOW_RUN_NOTE: changed} | self._shown().tags_of_note(alert), alert)
        return True

    def _linked(self, note: str) -> str:
        return with_report(note, self._client.get_run(self.run_id).info.experiment_id, self.run_id)
