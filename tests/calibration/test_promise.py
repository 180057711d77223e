"""How often normal samples are flagged, by the law of their number."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import betabinom

from ood_monitor.calibration import ConformalPValue
from ood_monitor.testing import flagged_share


def draw(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([11, seed])
    return generator.normal(size=n), generator.normal(size=m)


def test_the_interval_is_the_laws() -> None:
    found = flagged_share(*draw(199, 500, 0), fpr=0.05, cells=10)
    law = betabinom(500, 10, 190)
    assert found.expected == 0.05
    assert law.cdf(found.low - 1) <= 0.5e-4 < law.cdf(found.low)
    assert law.sf(found.high) <= 0.5e-4 < law.sf(found.high - 1)
    p = ConformalPValue.fit(draw(199, 500, 0)[0]).p_value(draw(199, 500, 0)[1])
    assert found.flagged == (p <= 0.05).sum()
    assert found.samples == 500


@pytest.mark.parametrize(("n", "fpr", "k"), [(99, 0.01, 1), (299, 0.01, 3), (48, 1 / 49, 1)])
def test_rates_that_rounding_moves_are_whole(n: int, fpr: float, k: int) -> None:
    assert flagged_share(*draw(n, 50, 0), fpr=fpr).expected == k / (n + 1)


def test_counts_follow_the_law() -> None:
    # 400 counts within an interval of .001 / 400 each: one leaves it in one of 1 000 runs.
    found = [flagged_share(*draw(100, 200, s), fpr=0.05, cells=400, splits=2) for s in range(400)]
    assert all(each.holds for each in found)
    counts = [each.flagged for each in found]
    # Mean of 400 draws: beyond 4 standard errors once in 16 000.
    assert abs(np.mean(counts) / 200 - 5 / 101) < 4 * np.std(counts) / 200 / 20


def test_too_many_flags_are_seen_and_the_mean_says_how_many() -> None:
    calibration, normal = draw(500, 2000, 1)
    found = flagged_share(calibration, normal * 1.5, fpr=0.01)
    assert not found.holds
    assert found.flagged > found.high
    honest = flagged_share(calibration, normal, fpr=0.05)
    assert honest.holds
    assert abs(honest.mean - 0.05) < 5 * honest.standard_error
    assert 0 < honest.standard_error < 0.002


@pytest.mark.parametrize(
    "change",
    [
        {"fpr": 0.0},
        {"fpr": 0.001},
        {"cells": 0},
        {"cells": 1.0},
        {"splits": 1},
        {"seed": -1},
        {"normal": [np.nan]},
        {"normal": []},
        {"calibration": [1.0] * 5},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    calibration, normal = draw(100, 50, 0)
    given = {"calibration": calibration, "normal": normal, "fpr": 0.05} | change
    with pytest.raises((ValueError, TypeError), match=r"Expected|needs at least"):
        flagged_share(given.pop("calibration"), given.pop("normal"), **given)
