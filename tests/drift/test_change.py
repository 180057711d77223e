"""Since when the evidence counts, and what run times neighbours that are alike leave."""

import math

import numpy as np
import pytest

from ood_monitor import EDetector
from ood_monitor.drift.change import KEPT, Bets
from ood_monitor.drift.correlation import MEAN_RUN_TIMES, RUN_TIMES, expected_run_time


def test_weights_are_products_of_bets_from_there_on() -> None:
    bets = np.log(np.random.default_rng(0).uniform(0.5, 2, (30, 2)))
    weights = np.array([np.exp(bets[t:].sum(0)).mean() for t in range(30)])
    kept = Bets(2)
    for row in bets:
        kept.append(row)
    found = kept.since()
    assert found.estimate == 29 - weights.argmax()
    least = np.argsort(-weights)
    enough = np.searchsorted(np.cumsum(weights[least]), 0.9 * weights.sum()) + 1
    assert found.earliest == 29 - least[:enough].min()
    assert found.latest == 29 - least[:enough].max()


def errors(shift: float) -> tuple[float, float]:
    """Median distance of the estimate from the change, and how often the interval holds it."""
    distances, covered = [], []
    for seed in range(40):
        generator = np.random.default_rng([seed, 1])
        detector = EDetector(generator.normal(size=500), ert=10_000, seed=seed)
        before = generator.integers(100, 400)
        if any(e.alarm for e in detector.update_many(generator.normal(size=before))):
            continue
        after = (detector.update(generator.normal() + shift).alarm for _ in range(2000))
        n = next(n for n, alarm in enumerate(after) if alarm)
        since = detector.since()
        distances.append(abs(since.estimate - n))
        covered.append(since.latest <= n <= since.earliest)
    return float(np.median(distances)), float(np.mean(covered))


@pytest.mark.parametrize(("shift", "at_most"), [(1.0, 4), (0.5, 20)])
def test_the_change_is_found_where_it_was(shift: float, at_most: float) -> None:
    # Of 40 streams: a coverage of .95 falls to .8 once in 2 000 runs.
    distance, coverage = errors(shift)
    assert distance <= at_most
    assert coverage >= 0.8


def test_as_many_bets_are_kept_and_no_more() -> None:
    detector = EDetector(np.arange(30.0), ert=1e9, max_history=30)
    detector.update_many(np.random.default_rng(0).uniform(0, 30, KEPT + 10))
    assert len(detector.state_dict()["bets"]) == KEPT
    assert detector.since().earliest < KEPT


def test_nothing_is_said_of_no_sample() -> None:
    with pytest.raises(ValueError, match="bets of at least one sample, got none"):
        EDetector(np.arange(30.0), ert=100).since()


@pytest.mark.parametrize(
    ("ert", "correlation", "expected"),
    [
        (10_000, 0.1, MEAN_RUN_TIMES[2][2]),
        (1_000, 0.8, MEAN_RUN_TIMES[1][6]),
        (10_000, -0.3, 10_000),
        (1_000, 1.0, MEAN_RUN_TIMES[1][-1]),
        (50, 0.0, 50),
    ],
)
def test_run_times_are_those_of_the_table(ert: float, correlation: float, expected: float) -> None:
    assert expected_run_time(ert, correlation) == pytest.approx(expected)


def test_run_times_fall_with_correlation_and_grow_with_the_promise() -> None:
    found = [expected_run_time(3_000, rho) for rho in np.linspace(0, 1, 50)]
    assert found == sorted(found, reverse=True)
    times = [expected_run_time(ert, 0.4) for ert in (10, *RUN_TIMES, 1e8)]
    assert times == sorted(times)
    assert times[-1] < 1e8


@pytest.mark.parametrize(("ert", "correlation"), [(1, 0.1), (100, 1.5), (100, math.nan)])
def test_run_times_of_nothing_sensible_are_refused(ert: float, correlation: float) -> None:
    with pytest.raises(ValueError, match=r"Expected (ert|correlation) in"):
        expected_run_time(ert, correlation)
