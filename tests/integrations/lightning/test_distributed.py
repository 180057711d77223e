"""Two real processes under DDP with gloo: they end with one detector, and see what one would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import failing_processes, lightning_processes
from support.failing_processes import BATCHES, LIMIT
from support.lightning_cases import QUIET, Flow, trainer, watcher
from support.lightning_processes import SIZES, STREAM, calibration, found, stream, turns
from support.two_processes import ended, reports

pytestmark = QUIET

PROGRAM = Path(lightning_processes.__file__)
FAILING = Path(failing_processes.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return reports(PROGRAM, folder)


@pytest.mark.slow
@pytest.mark.both_methods
def test_training_is_bit_identical_with_and_without_the_callback(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["watched"] == rank["plain"]


def test_both_end_with_one_detector_of_each_sample_once(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["detector"] == ranks[1]["detector"]
    assert ranks[0]["detector"]["samples"] == 129


def test_a_process_without_a_batch_ends_with_the_same_detector(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["one batch"] == ranks[1]["one batch"]
    assert ranks[0]["one batch"]["samples"] == 128


def test_a_failure_in_one_process_is_heard_in_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["failure"].startswith("RuntimeError: Expected all processes to succeed, got")
    assert ranks[1]["failure"] == "OSError: no such disk"


def test_replicas_that_have_come_apart_get_no_detector(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["apart"].startswith("Expected the same weights in all processes, got")


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_two_processes_see_what_one_sees(
    ranks: list[dict[str, Any]], folder: Path, stage: str
) -> None:
    callback = watcher()
    run = trainer(callback)
    options = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(Flow(), stream(), ckpt_path=folder / "last.ckpt", **options)
    alone = found(callback, stage)
    alone["alerts"] = [alert for alert in alone["alerts"] if alert["kind"] != "explanation"]
    assert {alert["kind"] for alert in alone["alerts"]} == {"sample", "drift"}
    for rank in ranks:
        for figure in ("score", "p_value"):
            np.testing.assert_allclose(rank[stage][figure], alone[figure], rtol=1e-4)
        for fact in ("dataset_index", "status", "alerts"):
            assert rank[stage][fact] == alone[fact], fact
    if stage == "test":
        figures = ("status", "score_mean", "score_p95", "flagged_rate", "log_e_value", "invalid")
        for name in (f"ood/test/{figure}" for figure in figures):
            one = float(run.callback_metrics[name])
            assert ranks[0]["test"]["metrics"][name] == pytest.approx(one, rel=1e-3)


def test_sinks_hear_once(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["heard"] == ranks[0]["predict"]["alerts"] != []
    assert ranks[1]["heard"] == []


def test_a_process_without_a_batch_to_predict_waits_for_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["uneven"]["score"]) == 20


def test_one_file_holds_the_samples_of_both(folder: Path) -> None:
    with np.load(folder / "scores-test.npz", allow_pickle=False) as file:
        assert file["dataset_index"].tolist() == list(range(STREAM))


def test_batches_of_several_sizes_are_all_seen(ranks: list[dict[str, Any]]) -> None:
    count = sum(map(sum, SIZES))
    for rank in ranks:
        assert rank["varying"]["dataset_index"] == list(range(count))


def test_batches_of_several_sizes_calibrate_as_in_one_process(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    module = Flow()
    module.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    run = trainer(callback := watcher(method="forward"))  # as the processes have by themselves
    callback.calibrate(run, module, turns())
    for rank in ranks:
        assert rank["turns"] == calibration(callback)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "shards"])
def test_a_process_that_fails_leaves_no_other_waiting(tmp_path: Path, strategy: str) -> None:
    """It lives on, so that no connection is closed by its end; the next run is one of both."""
    first, second = reported(tmp_path, strategy, "fails")
    assert second["heard"] == "OSError: no such disk"
    assert first["heard"] == "none"
    # Not by the end of the limit.
    lines = [line for line in first["told"] if f"within 0:00:{LIMIT}" in line]
    assert any(word in line for line in lines for word in ("closed", "reset by peer"))
    assert first["scored"] == 0
    for rank in (first, second):
        assert rank["again"]["heard"] == "none"
        assert rank["again"]["scored"] == 16 * sum(BATCHES)


@pytest.mark.slow
def test_a_process_that_is_late_is_not_waited_for_beyond_the_limit(tmp_path: Path) -> None:
    """It goes on when the first one has given it up, and ends."""
    for rank in reported(tmp_path, "ddp", "is late"):
        assert rank["heard"] == "none"
        assert any(f"within 0:00:{LIMIT}, as long as" in line for line in rank["told"])
        assert rank["scored"] == 0


def reported(folder: Path, *what: str) -> list[dict[str, Any]]:
    """What both processes have found, within a minute."""
    found = ended(FAILING, folder, *what, timeout=60)
    assert [code for code, _ in found] == [0, 0], "\n".join(told for _, told in found)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
