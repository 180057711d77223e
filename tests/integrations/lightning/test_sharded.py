"""Two real processes under ModelParallelStrategy (FSDP2) see what one would, and never hang."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import sharded_processes
from support.lightning_cases import QUIET, Flow, trainer, watcher
from support.lightning_processes import found, stream
from support.sharded_processes import BATCHES, HELD_OUT
from support.two_processes import ended, reports

pytestmark = [*QUIET, pytest.mark.slow]

PROGRAM = Path(sharded_processes.__file__)

SAMPLES = 16 * sum(BATCHES)


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


def test_both_end_with_one_detector_without_explanation_by_layer(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[0]["detector"] == ranks[1]["detector"]
    assert ranks[0]["detector"]["samples"] == HELD_OUT
    for rank in ranks:
        told = "Fitted without explanation by layer: ValueError: Expected whole parameters"
        assert any(line.startswith(told) for line in rank["told"])


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_two_processes_see_what_one_sees_of_the_whole(
    ranks: list[dict[str, Any]], folder: Path, stage: str
) -> None:
    """And the detector of shards goes with the consolidated checkpoint: a warning is an error."""
    run = trainer(callback := watcher())
    options = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(Flow(), stream(), ckpt_path=folder / "last.ckpt", **options)
    alone = found(callback, stage)
    alone["alerts"] = [alert for alert in alone["alerts"] if alert["kind"] != "explanation"]
    for rank in ranks:
        np.testing.assert_allclose(rank[stage]["score"], alone["score"], rtol=1e-4)
        for fact in ("p_value", "dataset_index", "status", "alerts"):
            assert rank[stage][fact] == alone[fact], fact


def test_a_detector_of_the_whole_model_watches_shards(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    run = trainer(callback := watcher(detector=folder / "whole0", calibrate="never"))
    run.predict(Flow(), stream(), ckpt_path=folder / "last.ckpt")
    alone = found(callback, "predict")
    for rank in ranks:
        assert rank["loaded"]["stale"] == []
        np.testing.assert_allclose(rank["loaded"]["score"], alone["score"], rtol=1e-4)
        assert rank["loaded"]["p_value"] == alone["p_value"]


def test_seven_batches_and_four_calibrate_and_are_watched(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["seven and four"] == ranks[1]["seven and four"]
    assert ranks[0]["seven and four"]["samples"] == SAMPLES
    for rank in ranks:
        assert len(rank["uneven"]["score"]) == SAMPLES


def test_a_process_may_take_fewer_passes(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["one sample"] == ranks[1]["one sample"]
    assert ranks[0]["one sample"]["samples"] == 100


@pytest.mark.parametrize(("failure", "cause"), [("no disk", "disk"), ("no layer", "layer")])
def test_a_failure_in_one_process_is_heard_in_both(
    ranks: list[dict[str, Any]], failure: str, cause: str
) -> None:
    """In reading data, and in the midst of a pass, between the gatherings of two parts."""
    told = "RuntimeError: Expected all processes to succeed, got a failure in [1]."
    assert ranks[0][failure] == told
    assert ranks[1][failure] == f"OSError: no such {cause}"


def test_batches_that_fail_in_one_process_are_scored_in_the_other(
    ranks: list[dict[str, Any]],
) -> None:
    assert [rank["broken"]["failures"] for rank in ranks] == [0, BATCHES[1]]
    for rank in ranks:
        scores = rank["broken"]["score"]
        assert len(scores) == SAMPLES
        assert sum(math.isnan(score) for score in scores) == 16 * BATCHES[1]  # invalid, not lost
        assert rank["mended"] == rank["uneven"]


def test_gradient_norms_are_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["gradients"].startswith("ValueError: Expected a detector of method 'forward'")


@pytest.mark.parametrize("where", ["loader", "pass", "step"])
def test_an_error_in_one_process_ends_both(tmp_path: Path, where: str) -> None:
    """A process that hangs is one that does not end in time."""
    first, second = ended(PROGRAM, tmp_path, where, timeout=60)
    assert first[0] != 0
    assert second[0] != 0
    assert ("no such layer" if where == "pass" else "no such disk") in second[1]
    assert where == "step" or "got a failure in [1]" in first[1]
