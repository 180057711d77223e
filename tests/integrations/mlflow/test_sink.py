import json
import logging
from dataclasses import replace
from pathlib import Path
from threading import Thread

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ood_monitor_integrations.mlflow import MLflowSink
from support.mlflow_cases import (
    DRIFT,
    HOUR,
    NOTE,
    RECOVERED,
    SAMPLE,
    SUMMARY,
    artifact,
    history,
    tags,
)

from ood_monitor.alerts import Alert, Dispatcher, Refused, SummarySink
from ood_monitor.escaping import markdown_text

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

BEGIN, END = "<!-- ood-monitor:begin -->", "<!-- ood-monitor:end -->"


FIGURES = ("status", "score_mean", "score_p95", "flagged_rate", "log_e_value", "invalid")

# What a run shows


def test_an_alert_is_an_event_and_no_metric(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    sink(DRIFT)
    sink(RECOVERED)
    assert client.get_run(run_id).data.metrics == {}


def test_an_alert_sets_tags(client: MlflowClient, run_id: str) -> None:
    MLflowSink(run_id)(DRIFT)
    shown = tags(client, run_id)
    assert shown["ood_monitor.status"] == "ALERT"
    assert shown["ood_monitor.since"] == DRIFT.time.isoformat()
    assert shown["ood_monitor.detector"] == "d5"
    assert "ood_monitor.method" not in shown  # of an alert of before there was a choice
    MLflowSink(run_id)(replace(DRIFT, method="forward"))
    assert tags(client, run_id)["ood_monitor.method"] == "forward"


def test_runs_in_alert_can_be_found(store: tuple[MlflowClient, str]) -> None:
    client, experiment = store
    run_ids = [client.create_run(experiment).info.run_id for _ in "ab"]
    for run_id in run_ids:
        MLflowSink(run_id)(DRIFT)
    MLflowSink(run_ids[1])(RECOVERED)
    found = client.search_runs([experiment], "tags.`ood_monitor.status` = 'ALERT'")
    assert [run.info.run_id for run in found if run.info.run_id in run_ids] == run_ids[:1]


def test_an_alert_leaves_its_json_and_figure(client: MlflowClient, run_id: str) -> None:
    MLflowSink(run_id)(DRIFT)
    files = [file.path for file in client.list_artifacts(run_id, "ood/alerts")]
    assert sorted(files) == [f"ood/alerts/{DRIFT.id}.json", f"ood/alerts/{DRIFT.id}.png"]
    text = artifact(client, run_id, files[0]).decode()
    assert Alert.from_json(text) == DRIFT
    assert json.loads(text)["message"] == DRIFT.message
    assert artifact(client, run_id, files[1]).startswith(b"\x89PNG\r\n\x1a\n")


def test_a_repeated_alert_changes_nothing(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    sink(DRIFT)
    before = client.get_run(run_id).to_dictionary()
    sink(DRIFT)
    assert client.get_run(run_id).to_dictionary() == before
    assert len(client.list_artifacts(run_id, "ood/alerts")) == 2


def test_summaries_become_metrics(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    assert isinstance(sink, SummarySink)
    later = replace(SUMMARY, samples_seen=600, status="ALERT", log_e_value=float("-inf"), number=6)
    sink.summarise(SUMMARY)
    sink.summarise(later)
    sink.summarise(replace(SUMMARY, samples_seen=700, status="WARN", number=7))
    assert {name: history(client, run_id, f"ood/{name}") for name in FIGURES} == {
        "status": [(500, 0.0), (600, 2.0), (700, 1.0)],
        "score_mean": [(500, 0.5), (600, 0.5), (700, 0.5)],
        "score_p95": [(500, 1.5), (600, 1.5), (700, 1.5)],
        "flagged_rate": [(500, 0.01), (600, 0.01), (700, 0.01)],
        "log_e_value": [(500, -0.25), (700, -0.25)],  # what is not finite is no metric
        "invalid": [(500, 3.0), (600, 3.0), (700, 3.0)],
    }
    assert client.get_run(run_id).data.metrics.keys() == {f"ood/{name}" for name in FIGURES}
    (first, *_) = client.get_metric_history(run_id, "ood/score_mean")
    assert first.timestamp == int(SUMMARY.time.timestamp() * 1000)
    assert client.list_artifacts(run_id) == []
    assert NOTE not in tags(client, run_id)


def test_each_metric_is_written_once_a_step(client: MlflowClient, run_id: str) -> None:
    """Running figures that come with an alert, and again as they are due."""
    sink = MLflowSink(run_id)
    sink(replace(DRIFT, samples_seen=500, number=4))
    alerting = replace(SUMMARY, status="ALERT")
    for number in (5, 6):
        sink.summarise(replace(alerting, number=number, time=DRIFT.time + number * HOUR))
    assert [len(history(client, run_id, f"ood/{name}")) for name in FIGURES] == [1] * len(FIGURES)


def test_a_sink_may_leave_metrics_to_others(client: MlflowClient, run_id: str) -> None:
    MLflowSink(run_id, metrics=False).summarise(SUMMARY)
    assert client.get_run(run_id).data.metrics == {}
    assert tags(client, run_id)["ood_monitor.status"] == "OK"


# The status and its time


def test_status_is_the_alerts(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    for status in ("WARN", "ALERT", "OK"):
        sink(replace(DRIFT, status=status))
        assert tags(client, run_id)["ood_monitor.status"] == status


def test_since_is_when_the_status_began(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    sink(DRIFT)
    sink(replace(RECOVERED, kind="drift", status="ALERT", number=11))
    assert tags(client, run_id)["ood_monitor.since"] == DRIFT.time.isoformat()
    sink(RECOVERED)
    assert tags(client, run_id)["ood_monitor.since"] == RECOVERED.time.isoformat()


def test_a_foreign_status_is_replaced(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, "ood_monitor.status", "who knows")
    MLflowSink(run_id)(SAMPLE)
    assert tags(client, run_id)["ood_monitor.status"] == "WARN"


# The note


def test_the_note_says_what_happened(client: MlflowClient, run_id: str) -> None:
    MLflowSink(run_id)(DRIFT)
    note = tags(client, run_id)[NOTE]
    assert note.startswith(BEGIN)
    assert note.endswith(END)
    message = markdown_text(DRIFT.message)
    for part in ("ALERT", "drift", "production", "1,234", message, "`up.0.weight`", DRIFT.id):
        assert part in note, part


BEFORE = "# Mine \\g<0>\r\n\ttext with $ and ü  "
AFTER = "\r\n\r\n<!-- my comment -->\n\\1 the end \n"


def test_a_report_is_kept_and_linked_by_the_notes_of_all_alerts(
    client: MlflowClient, run_id: str
) -> None:
    sink, page = MLflowSink(run_id), "<!DOCTYPE html>\n<p>ü</p>"
    sink.show_report(page)
    assert NOTE not in tags(client, run_id)
    sink(DRIFT)
    link = f"/runs/{run_id}/artifacts/ood/report.html)"
    for told in (RECOVERED, None):
        assert tags(client, run_id)[NOTE].count(link) == 1
        if told is not None:
            sink(told)
    assert artifact(client, run_id, "ood/report.html").decode() == page


def test_a_report_is_linked_by_the_note_that_is_there(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, NOTE, BEFORE)
    MLflowSink(run_id)(DRIFT)
    MLflowSink(run_id).show_report("<p>a</p>")
    note = tags(client, run_id)[NOTE]
    assert note.startswith(BEFORE + "\n\n" + BEGIN)
    first = note.partition(BEGIN)[2].partition("\n\n")[0]
    assert f"/runs/{run_id}/artifacts/ood/report.html)" in first
    assert DRIFT.id in note


def test_the_note_says_since_when_what_is_graver_stands(client: MlflowClient, run_id: str) -> None:
    sink, both = MLflowSink(run_id), ("stale_calibration", "drift")
    stale = replace(SAMPLE, kind="stale_calibration", standing=("stale_calibration",))
    drift = replace(DRIFT, standing=both)
    words = "**stale calibration stands since sample 700 or before, when the weights were looked at"
    for alert in (stale, drift):
        sink(alert)
    assert words in tags(client, run_id)[NOTE]
    again = replace(drift, samples_seen=1500, number=15, id="b" * 32)
    sink(again)
    assert words in tags(client, run_id)[NOTE]
    # A new sink was not told, nor was another stream's.
    for told, stream in ((MLflowSink(run_id), "production"), (sink, "another")):
        told(replace(again, stream=stream, number=again.number + 1, id=stream[:1] * 32))
        assert "**stale calibration stands:**" in tags(client, run_id)[NOTE]


def test_the_users_note_stays_byte_for_byte(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    client.set_tag(run_id, NOTE, BEFORE)
    sink(DRIFT)
    first = tags(client, run_id)[NOTE]
    assert first.startswith(BEFORE + "\n\n" + BEGIN)
    client.set_tag(run_id, NOTE, first + AFTER)
    sink(RECOVERED)
    second = tags(client, run_id)[NOTE]
    head, rest = second.split("\n\n" + BEGIN)
    block, tail = rest.split(END)
    assert (head, tail) == (BEFORE, AFTER)
    assert "OK" in block
    assert DRIFT.id not in block


def test_a_broken_block_is_the_users_text(client: MlflowClient, run_id: str) -> None:
    """A user deleted the end mark: nothing between the old begin and the new block may go."""
    kept = f"before {BEGIN} an old block, and then the user's own words"
    client.set_tag(run_id, NOTE, kept)
    sink = MLflowSink(run_id)
    sink(DRIFT)
    sink(RECOVERED)
    note = tags(client, run_id)[NOTE]
    assert note.startswith(kept + "\n\n" + BEGIN)
    assert note.count(END) == 1
    assert DRIFT.id not in note


def test_a_name_cannot_end_the_block(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    for sample in (1, 2):
        sink(replace(DRIFT, stream=f"a{END}b{BEGIN}", samples_seen=sample, number=sample))
    note = tags(client, run_id)[NOTE]
    assert (note.count(BEGIN), note.count(END)) == (1, 1)
    assert "2 samples seen" in note


def test_a_full_note_is_left_alone(
    client: MlflowClient, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow would cut the value, and with it the user's text."""
    text = "x" * 7900
    client.set_tag(run_id, NOTE, text)
    with caplog.at_level(logging.WARNING):
        MLflowSink(run_id)(DRIFT)
    assert tags(client, run_id)[NOTE] == text
    assert tags(client, run_id)["ood_monitor.status"] == "ALERT"
    assert "no room" in caplog.text


# Threads


def test_another_thread_writes_to_the_run(store: tuple[MlflowClient, str]) -> None:
    client, experiment = store
    with mlflow.start_run(experiment_id=experiment) as run:
        sink = MLflowSink()
        assert sink.run_id == run.info.run_id
        with Dispatcher([sink]) as dispatcher:
            dispatcher.summarise(SUMMARY)
            dispatcher.send(DRIFT)
            dispatcher.send(RECOVERED)
            assert dispatcher.flush(60)
        assert dispatcher.failures == {f"mlflow:{sink.run_id}": 0}
        assert mlflow.active_run().info.run_id == run.info.run_id
    assert history(client, run.info.run_id, "ood/status") == [(500, 0.0)]
    assert "Recovered." in tags(client, run.info.run_id)[NOTE]


def test_a_finished_run_still_takes_alerts(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    client.set_terminated(run_id)
    sink(DRIFT)
    assert tags(client, run_id)["ood_monitor.status"] == "ALERT"
    assert client.get_run(run_id).info.status == "FINISHED"
    assert mlflow.active_run() is None


def test_failures_are_seen_by_the_dispatcher(
    client: MlflowClient, store: tuple[MlflowClient, str]
) -> None:
    """Also where the environment asks for asynchronous logging, which hides them."""
    doomed = client.create_run(store[1]).info.run_id
    sink = MLflowSink(doomed)
    client.delete_run(doomed)
    with pytest.MonkeyPatch.context() as patch, Dispatcher([sink], tries=3) as dispatcher:
        patch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
        with pytest.raises(Refused, match="must be in the 'active' state"):
            sink.summarise(SUMMARY)
        dispatcher.send(DRIFT)
        assert dispatcher.flush(60)
    assert [left.alert for left in dispatcher.undelivered] == [DRIFT]
    assert dispatcher.failures == {f"mlflow:{doomed}": 1}
    assert dispatcher.refused == {f"mlflow:{doomed}": 1}


# Which run


def test_an_explicit_run_wins_over_the_active_one(
    store: tuple[MlflowClient, str], run_id: str
) -> None:
    with mlflow.start_run(experiment_id=store[1]):
        assert MLflowSink(run_id).run_id == run_id


def test_without_a_run_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="start one or pass run_id"):
        MLflowSink()


def test_the_active_run_of_another_thread_is_not_found(store: tuple[MlflowClient, str]) -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            MLflowSink()
        except ValueError as error:
            errors.append(error)

    with mlflow.start_run(experiment_id=store[1]):
        thread = Thread(target=work)
        thread.start()
        thread.join()
    assert "in this thread" in str(errors[0])


@pytest.mark.usefixtures("store")
def test_a_missing_run_is_the_first_calls_failure() -> None:
    sink = MLflowSink("0" * 32)
    with pytest.raises(Refused, match=r"RESOURCE_DOES_NOT_EXIST.*not found"):
        sink(DRIFT)


def test_a_tracking_uri_or_a_client_may_be_given(
    client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = client.tracking_uri
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'unused.db'}")
    try:
        MLflowSink(run_id, tracking_uri=uri)(DRIFT)
        MLflowSink(run_id, client=client)(RECOVERED)
    finally:
        mlflow.set_tracking_uri(uri)
    assert tags(client, run_id)["ood_monitor.number"] == "20"
    assert not (tmp_path / "unused.db").exists()
    with pytest.raises(ValueError, match="Expected one of logger, tracking_uri and client"):
        MLflowSink(run_id, tracking_uri=uri, client=client)


def test_an_old_file_store_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    (tmp_path / "mlruns").mkdir()
    uri = (tmp_path / "mlruns").as_uri()
    with pytest.raises(ValueError, match="Pass tracking_uri=") as caught:
        MLflowSink("0" * 32, tracking_uri=uri)
    assert uri in str(caught.value)
    assert "mlflow migrate-filestore" in str(caught.value)


def test_other_errors_of_mlflow_pass() -> None:
    with pytest.raises(MlflowException, match="unsupported URI"):
        MLflowSink("0" * 32, tracking_uri="gopher://nowhere")


def test_lightnings_logger_gives_its_run(store: tuple[MlflowClient, str]) -> None:
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    client, experiment = store
    name = client.get_experiment(experiment).name
    logger = loggers.MLFlowLogger(name, tracking_uri=client.tracking_uri)
    sink = MLflowSink.from_logger(logger)
    sink(DRIFT)
    assert sink.run_id == logger.run_id
    assert tags(client, logger.run_id)["ood_monitor.status"] == "ALERT"
    logger.finalize("success")
    sink(RECOVERED)
    assert tags(client, logger.run_id)["ood_monitor.status"] == "OK"


def test_other_loggers_are_refused(tmp_path: Path) -> None:
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    with pytest.raises(TypeError, match="MLFlowLogger, got CSVLogger"):
        MLflowSink.from_logger(loggers.CSVLogger(tmp_path))
    with pytest.raises(TypeError, match="MLFlowLogger, got str"):
        MLflowSink.from_logger("a logger")

    class Foreign:
        run_id = "0" * 32
        experiment = object()

    with pytest.raises(TypeError, match=r"MLFlowLogger, got .*Foreign"):
        MLflowSink.from_logger(Foreign())


def test_a_logger_without_a_run_is_refused(client: MlflowClient) -> None:
    class Elsewhere:
        run_id = None
        experiment = client

    with pytest.raises(ValueError, match="rank 0"):
        MLflowSink.from_logger(Elsewhere())
