"""Scored calls as MLflow traces, which change nothing of what is watched."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import pytest
import torch
from mlflow.entities import SpanType
from ood_monitor_integrations.mlflow import traces
from ood_monitor_integrations.mlflow.traces import trace_scores, traced_update
from support.small_cases import SMALL

import ood_monitor as om

# MLflow gives up a span without a word where a warning of its own libraries is an error.
pytestmark = pytest.mark.filterwarnings("default")

BRANCHES = SMALL["branches"]
DETECTOR = om.Detector(BRANCHES()).fit([BRANCHES.data(1000, seed=100)], progress=False)
USUAL = BRANCHES.data(200, seed=1)
USUAL = USUAL[DETECTOR.score(USUAL).p_value > 0.05]


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        yield
        mlflow.flush_trace_async_logging(terminate=True)
        mlflow.set_tracking_uri(None)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # MLflow remembers it for the process, and for those that it starts: other tests are not its.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    found = mlflow.set_experiment(tmp_path.name)
    return str(found.experiment_id)


def monitor(**options: Any) -> om.Monitor:
    return om.Monitor(DETECTOR, **{"ert": 1e9, **options})


def search(experiment: str, filter_string: str = "") -> list[Any]:
    mlflow.flush_trace_async_logging()
    found: list[Any] = mlflow.search_traces(
        locations=[experiment], filter_string=filter_string, return_type="list"
    )
    return found


def test_a_call_that_is_flagged_can_be_found(experiment: str) -> None:
    watch = monitor()
    assert traced_update(watch, USUAL[:5]) == []
    [alert] = traced_update(watch, 30 * USUAL[:2])
    assert alert.kind == "sample"
    assert len(search(experiment)) == 2
    [trace] = search(experiment, "feedback.is_ood = 'true'")
    assert len(search(experiment, "feedback.ood_p_value < 0.01")) == 1
    [span] = trace.data.spans
    assert span.span_type == SpanType.GUARDRAIL
    assert span.inputs == {"samples": 2}
    assert span.outputs["flagged"] == 2
    assert span.attributes["stream"] == "stream"
    [feedback] = [a for a in trace.info.assessments if a.name == "is_ood"]
    assert feedback.source.source_type == "CODE"
    assert feedback.rationale.startswith("2 of 2 samples with a p-value of at most 0.01")


def test_scores_that_are_there_can_be_traced_within_a_span_of_yours(experiment: str) -> None:
    scores = DETECTOR.score(USUAL[:3])
    with mlflow.start_span("my service"):
        trace_scores(scores, fpr=0.01)
    [trace] = search(experiment)
    assert [span.name for span in trace.data.spans] == ["my service", "ood_monitor"]
    assert search(experiment, "feedback.is_ood = 'false'")


def test_a_trace_has_none_of_the_data(experiment: str) -> None:
    traced_update(monitor(), USUAL[:3])
    [trace] = search(experiment)
    text = trace.to_json()
    assert not any(repr(number) in text for number in USUAL[:3].flatten().tolist())


def test_samples_that_cannot_be_scored_are_counted(experiment: str) -> None:
    traced_update(monitor(), torch.full((2, 6), float("nan"), dtype=torch.float64))
    [trace] = search(experiment)
    assert trace.data.spans[0].outputs == {"flagged": 0, "invalid": 2, "p_values": []}


def test_a_traced_monitor_decides_the_same(experiment: str) -> None:
    traced, plain = monitor(identify="hash"), monitor(identify="hash")
    for batch in (USUAL[:5], 30 * USUAL[:2]):
        one, other = traced_update(traced, batch), plain.update(batch)
        assert [a.samples for a in one] == [a.samples for a in other]
    assert traced.state_dict() | {"said": None} == plain.state_dict() | {"said": None}


def test_what_the_monitor_raises_is_raised_and_marked(experiment: str) -> None:
    with pytest.raises(ValueError, match="Expected samples as the detector was fitted on"):
        traced_update(monitor(), USUAL[:2, :3])
    [trace] = search(experiment)
    assert trace.info.state == "ERROR"


def test_tracing_that_fails_is_not_felt(
    experiment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no tracing today")

    for name in ("log_feedback", "start_span"):
        with monkeypatch.context() as patch:
            patch.setattr(traces.mlflow, name, broken)
            watch = monitor()
            assert [a.kind for a in traced_update(watch, 30 * USUAL[:1])] == ["sample"]
            assert watch.samples_seen == 1
    told = [record for record in caplog.records if "was not traced" in record.message]
    assert len(told) <= 1  # the others are told at the level of debugging
