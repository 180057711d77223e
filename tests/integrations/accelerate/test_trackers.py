"""Alerts in accelerate's trackers: written from a sink's thread, and read where they belong."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import mlflow
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker
from mlflow import MlflowClient
from ood_monitor_integrations.accelerate import AcceleratorSink, FileTracker
from support.alert_cases import ALERT, summary


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps one state for a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def with_trackers(*trackers: Any) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with=[*trackers])
    accelerator.init_trackers("test", config={"lr": 0.1})
    return accelerator


def in_a_thread(act: Callable[[], object]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class Own(GeneralTracker):
    """A user's."""

    name = "own"
    requires_logging_directory = False

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], int | None]] = []
        super().__init__()

    @property
    def tracker(self) -> Any:
        return self.seen

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """None is kept."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((values, step))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(uri)
    yield MlflowClient(uri)
    mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_an_alert_is_on_the_run_of_the_tracker_and_on_no_other(store: MlflowClient) -> None:
    accelerator = with_trackers("mlflow")
    run = mlflow.active_run()
    sink = AcceleratorSink(accelerator)
    in_a_thread(lambda: sink(ALERT))
    assert store.get_run(run.info.run_id).data.tags["ood_monitor.status"] == "ALERT"
    in_a_thread(lambda: sink.summarise(summary(64)))
    found = store.get_run(run.info.run_id)
    assert "ood/score_mean" in found.data.metrics
    runs = store.search_runs([found.info.experiment_id])
    assert [each.info.run_id for each in runs] == [run.info.run_id]


def test_a_folder_has_alerts_and_figures(tmp_path: Path) -> None:
    accelerator = with_trackers(FileTracker(tmp_path))
    sink = AcceleratorSink(accelerator, stage="shard-2")
    accelerator.log({"loss": torch.tensor(0.5), "bad": float("nan")}, step=3)
    in_a_thread(lambda: sink(ALERT))
    in_a_thread(lambda: sink.summarise(summary(64)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 3, "loss": 0.5, "bad": None}
    assert (lines[1]["step"], lines[1]["ood/shard-2/status"]) == (64, 0.0)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}
    saved = (tmp_path / "ood" / "alerts" / f"{ALERT.id}.json").read_text()
    assert type(ALERT).from_json(saved) == ALERT


def test_lines_of_several_threads_are_whole(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    with_trackers(tracker)
    threads = [
        threading.Thread(target=lambda n=n: [tracker.log({"n": n}, step=i) for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted((line["n"], line["step"]) for line in lines) == [
        (n, step) for n in range(4) for step in range(50)
    ]


def test_a_tracker_of_ones_own_has_figures() -> None:
    own = Own()
    sink = AcceleratorSink(with_trackers(own))
    in_a_thread(lambda: sink(ALERT))
    in_a_thread(lambda: sink.summarise(summary(64)))
    assert own.seen[0] == ({"ood/alert": 1.0}, ALERT.samples_seen)
    assert own.seen[1][0]["ood/status"] == 0.0


class Elsewhere(Own):
    """By its module one of accelerate's, which finds its run by the thread."""

    name = "trackio"


Elsewhere.__module__ = GeneralTracker.__module__

#: What a sink cannot be made of, and what is said.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tracker": (lambda: Accelerator(cpu=True), ValueError, "with trackers, got none"),
    "another tracker": (lambda: with_trackers(Elsewhere()), ValueError, "got 'trackio'"),
    "no accelerator": (lambda: accelerate, TypeError, "Expected an Accelerator, got module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_arrive_is_refused(name: str) -> None:
    make, kind, told = REFUSED[name]
    with pytest.raises(kind, match=told):
        AcceleratorSink(make())


def test_a_process_that_is_not_the_main_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, files = Own(), FileTracker(tmp_path / "files")
    accelerator = with_trackers(own, files)
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    sink = AcceleratorSink(accelerator)
    sink(ALERT)
    sink.summarise(summary(64))
    files.log({"loss": 1.0}, step=1)
    assert own.seen == []
    assert not (tmp_path / "files" / "metrics.jsonl").exists()
