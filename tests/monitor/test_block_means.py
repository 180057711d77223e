"""Means of the latest rows in little memory, against the rows themselves."""

import json

import numpy as np
import pytest

from ood_monitor.drift.change import KEPT
from ood_monitor.monitor.block_means import BlockMeans

ROWS = np.random.default_rng(0).normal(size=(2 * KEPT + 500, 2, 3))


def means(rows: np.ndarray) -> BlockMeans:
    found = BlockMeans()
    for row in rows:
        found.add(row)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seen", [1, 2, 7, 100, 4999, len(ROWS)])
@pytest.mark.parametrize("latest", [1, 2, 3, 10, 33, 700, KEPT])
def test_the_mean_is_of_most_of_the_latest_rows_and_of_no_other(seen: int, latest: int) -> None:
    rows = ROWS[:seen]
    found = means(rows).mean(latest)
    covered = [m for m in range(1, seen + 1) if np.allclose(found, rows[-m:].mean(0))]
    assert len(covered) == 1
    assert 2 / 3 * min(latest, seen) <= covered[0] <= latest


def test_memory_is_bounded() -> None:
    found = means(ROWS)
    assert KEPT <= found.count < 2 * KEPT
    assert len(found.dump()["counts"]) < 40


def test_a_copy_goes_its_own_way_and_a_dump_to_the_bit() -> None:
    found = means(ROWS[:100])
    copy = found.copy()
    copy.add(ROWS[100])
    assert (found.count, copy.count) == (100, 101)
    again = BlockMeans.parse(json.loads(json.dumps(found.dump())), (2, 3))
    again.add(ROWS[100])
    assert again.dump() == copy.dump()


def test_no_row_has_no_mean() -> None:
    with pytest.raises(ValueError, match="Expected rows to take the mean of, got none"):
        BlockMeans().mean(3)
