"""What a run shows last is what was said last, by its number: whatever the clock does, whatever
comes late, and through restarts of the sink.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from ood_monitor_integrations.mlflow import MLflowSink
from support.mlflow_cases import (
    DRIFT,
    HOUR,
    NOTE,
    RECOVERED,
    SAMPLE,
    SUMMARY,
    artifact,
    tags,
)
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.alerts import Alert, LayerShare, Summary
from ood_monitor.escaping import markdown_text

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

STATUS = "ood_monitor.status"
ALERTING = replace(SUMMARY, status="ALERT", samples_seen=1234, time=DRIFT.time)
BEFORE = replace(SUMMARY, status="WARN", samples_seen=1200, number=9, time=DRIFT.time)
EARLIER = DRIFT.time - 24 * HOUR
EXPLANATION = replace(
    DRIFT,
    kind="explanation",
    severity="info",
    status="ALERT",
    samples_seen=1240,
    message="Explanation of 8 samples.",
    top_layers=(LayerShare("down.3.weight", 0.9, 12.0),),
    number=12,
    explains=DRIFT.id,
    id="c" * 32,
)

#: By name: what is said, in the order in which it comes; the status, and what the note tells of.
STORIES: dict[str, tuple[Sequence[Alert | Summary], str, str]] = {
    "a summary at the same step follows": (
        [SAMPLE, DRIFT, replace(ALERTING, number=11)],
        "ALERT",
        DRIFT.message,
    ),
    "a summary of before and of a later moment follows": (
        [SAMPLE, DRIFT, replace(BEFORE, time=DRIFT.time + HOUR)],
        "ALERT",
        DRIFT.message,
    ),
    "a summary overtakes the alert": (
        [SAMPLE, replace(ALERTING, number=11), DRIFT],
        "ALERT",
        DRIFT.message,
    ),
    "the clock steps back": (
        [SAMPLE, replace(SUMMARY, number=9), replace(DRIFT, time=EARLIER)],
        "ALERT",
        DRIFT.message,
    ),
    "the clock steps back before a recovery": (
        [DRIFT, replace(RECOVERED, time=EARLIER)],
        "OK",
        RECOVERED.message,
    ),
    "an alert comes after the next": ([RECOVERED, DRIFT], "OK", RECOVERED.message),
    "an alert comes late, of a later moment": (
        [replace(RECOVERED, time=EARLIER), DRIFT],
        "OK",
        RECOVERED.message,
    ),
    "a sample alert comes after the drift": ([DRIFT, SAMPLE], "ALERT", DRIFT.message),
    "a sample alert comes late, and a summary has the drift": (
        [replace(ALERTING, number=11), SAMPLE],
        "ALERT",
        "",
    ),
    "nobody has given numbers": (
        [replace(each, number=0) for each in (RECOVERED, SAMPLE, DRIFT)],
        "ALERT",
        DRIFT.message,
    ),
    "another stream begins": ([RECOVERED, replace(DRIFT, stream="new")], "ALERT", DRIFT.message),
    "a stream of a strange name goes on": (
        [replace(each, stream="a\n\\bä") for each in (RECOVERED, DRIFT)],
        "OK",
        RECOVERED.message,
    ),
}


def say(sink: MLflowSink, said: Alert | Summary) -> None:
    if isinstance(said, Alert):
        sink(said)
    else:
        sink.summarise(said)


@pytest.mark.parametrize("restarts", [False, True], ids=["one sink", "restarts"])
@pytest.mark.parametrize("story", STORIES)
def test_the_latest_is_shown(client: MlflowClient, run_id: str, story: str, restarts: bool) -> None:
    said, status, told = STORIES[story]
    sink = MLflowSink(run_id)
    for each in said:
        sink = MLflowSink(run_id) if restarts else sink
        say(sink, each)
    shown = tags(client, run_id)
    assert shown["ood_monitor.status"] == status
    assert markdown_text(told) in shown.get(NOTE, "")
    assert bool(told) == (NOTE in shown)
    alerts = [each for each in said if isinstance(each, Alert)]
    for alert in alerts:  # the late ones, too
        path = f"ood/alerts/{alert.id}.json"
        assert Alert.from_json(artifact(client, run_id, path).decode()) == alert


def test_a_late_alert_changes_no_tag(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    sink(RECOVERED)
    before = tags(client, run_id)
    for late in (sink, MLflowSink(run_id)):
        late(replace(DRIFT, detector="of before"))
        assert tags(client, run_id) == before


def test_a_status_begins_once(client: MlflowClient, run_id: str) -> None:
    for number in (10, 11):
        MLflowSink(run_id)(replace(DRIFT, number=number, time=DRIFT.time + number * HOUR))
    assert tags(client, run_id)["ood_monitor.since"] == (DRIFT.time + 10 * HOUR).isoformat()


@pytest.mark.parametrize("restarts", [False, True], ids=["one sink", "restart"])
def test_what_failed_half_way_is_told_when_it_is_tried_again(
    client: MlflowClient, run_id: str, restarts: bool
) -> None:
    root = Path(urlsplit(client.get_run(run_id).info.artifact_uri).path)
    root.mkdir(parents=True)
    (root / "ood").write_text("a file where a folder should be")
    sink = MLflowSink(run_id)
    with pytest.raises(OSError, match="ood"):
        sink(DRIFT)
    (root / "ood").unlink()
    sink = MLflowSink(run_id) if restarts else sink
    sink(DRIFT)
    assert markdown_text(DRIFT.message) in tags(client, run_id)[NOTE]


# Explanations


@pytest.mark.parametrize("restarts", [False, True], ids=["one sink", "restart"])
def test_an_explanation_adds_its_layers(client: MlflowClient, run_id: str, restarts: bool) -> None:
    alert = replace(DRIFT, top_layers=())
    sink = MLflowSink(run_id)
    sink(alert)
    assert "Layers" not in tags(client, run_id)[NOTE]
    sink = MLflowSink(run_id) if restarts else sink
    sink(EXPLANATION)
    note = tags(client, run_id)[NOTE]
    assert "down.3.weight" in note
    assert markdown_text(alert.message) in note
    assert markdown_text(EXPLANATION.message) not in note
    files = {Path(file.path).name for file in client.list_artifacts(run_id, "ood/alerts")}
    names = (alert.id, f"{alert.id}-explanation")
    assert files == {f"{name}.{kind}" for name in names for kind in ("json", "png")}


def test_an_explanation_of_an_alert_before_leaves_the_note(
    client: MlflowClient, run_id: str
) -> None:
    sink = MLflowSink(run_id)
    for alert in (DRIFT, replace(RECOVERED, number=11), replace(EXPLANATION, status="OK")):
        sink(alert)
    note = tags(client, run_id)[NOTE]
    assert markdown_text(RECOVERED.message) in note
    assert "down.3.weight" not in note
    assert tags(client, run_id)["ood_monitor.status"] == "OK"


def test_an_explanation_without_layers_leaves_the_note(client: MlflowClient, run_id: str) -> None:
    sink = MLflowSink(run_id)
    sink(DRIFT)
    before = tags(client, run_id)[NOTE]
    sink(replace(EXPLANATION, top_layers=()))
    assert tags(client, run_id)[NOTE] == before


# Several streams of one run


def test_stages_share_a_run(client: MlflowClient, run_id: str) -> None:
    """Of each its own; of the run the worst, which the note tells of."""
    first, second = (MLflowSink(run_id, stage=stage) for stage in ("a/test", "b/test"))
    first(DRIFT)
    second.summarise(replace(SUMMARY, stream="b", number=1))
    second(replace(SAMPLE, stream="b", number=2))
    shown = tags(client, run_id)
    assert shown[STATUS] == shown[f"{STATUS}.a.test"] == "ALERT"
    assert shown[f"{STATUS}.b.test"] == "WARN"
    assert markdown_text(DRIFT.message) in shown[NOTE]
    assert client.get_run(run_id).data.metrics["ood/b/test/status"] == 0
    first(RECOVERED)
    assert tags(client, run_id)["ood_monitor.status"] == "WARN"
    second.summarise(replace(SUMMARY, stream="b", number=3))
    assert tags(client, run_id)["ood_monitor.status"] == "OK"


# A monitor


def test_the_note_tells_of_the_drift_that_stands(client: MlflowClient, run_id: str) -> None:
    """A sample alert, then a drift in the midst of running figures, some at its own step."""
    case = SMALL["branches"]
    detector = om.Detector(case()).fit([case.data(1000, seed=100)], progress=False)
    usual, shifted = case.data(100, seed=1), 2 + case.data(100, seed=2)
    usual[20] *= 30
    sinks = [MLflowSink(run_id)]
    with om.Monitor(detector, sinks=sinks, ert=1000, summary_every=5) as monitor:
        alerts = [alert for x in (usual, shifted) for alert in monitor.update(x)]
        assert monitor.flush(60)
        assert set(monitor.dispatcher.failures.values()) == {0}
    drift = next(alert for alert in alerts if alert.kind == "drift")
    assert [alert.kind for alert in alerts] == ["sample", "drift"]
    shown = tags(client, run_id)
    assert shown["ood_monitor.status"] == "ALERT"
    assert drift.id in shown[NOTE]
    steps = [metric.step for metric in client.get_metric_history(run_id, "ood/status")]
    assert len(set(steps)) == len(steps)
    assert set(steps) >= {*range(5, 201, 5), drift.samples_seen}
