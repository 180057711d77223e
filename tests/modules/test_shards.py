"""Two real processes hold a model in shards: it is scored as if whole, and left as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import shard_processes
from support.shard_processes import CASES
from support.two_processes import reports

pytestmark = pytest.mark.slow

PROGRAM = Path(shard_processes.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return reports(PROGRAM, tmp_path_factory.mktemp("processes"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_scores_are_those_of_the_whole_model(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        whole, shards = rank[case]["scores"]
        np.testing.assert_allclose(shards, whole, rtol=1e-5)
        whole, shards = rank[case]["p_values"]
        assert shards == whole
    assert ranks[0][case]["scores"] != ranks[1][case]["scores"]  # each its own batch


def test_a_process_may_take_fewer_passes(ranks: list[dict[str, Any]], case: str) -> None:
    assert [rank[case]["fewer"] for rank in ranks] == [1, 6]


def test_weights_have_the_digest_of_the_whole_model(ranks: list[dict[str, Any]], case: str) -> None:
    (digest,) = {digest for rank in ranks for digest in rank[case]["weights"]}
    assert len(digest) == 12


def test_weights_that_were_trained_are_stale(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert rank[case]["stale"] == [[False, False], [True, True]]


def test_scores_change_nothing_of_a_training(ranks: list[dict[str, Any]], case: str) -> None:
    """Taken before a step, between its passes and after it, and after a pass that failed."""
    for rank in ranks:
        assert rank[case]["failed"] == "OSError: no such layer"
        assert rank[case]["again"] == rank[case]["scores"][1]
        assert rank[case]["are shards"]
        assert rank[case]["same training"]


def test_a_call_within_a_pass_is_refused_by_name(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert "between forward passes, since its weights are sharded" in rank[case]["within"]


def test_gradients_of_shards_are_refused_by_name(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        told = rank[case]["gradients"]
        assert told.startswith("ValueError: Expected whole parameters, got a model that FSDP has")


def test_the_wrapper_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "got a model in FSDP's wrapper" in rank["wrapper"]["refused"]
