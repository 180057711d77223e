"""Two real processes under DDP with gloo: they end with one detector, and see what one would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import lightning_processes
from support.lightning_cases import QUIET, Flow, trainer, watcher
from support.lightning_processes import STREAM, found, stream
from support.two_processes import reports

pytestmark = QUIET

PROGRAM = Path(lightning_processes.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return reports(PROGRAM, folder)


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
