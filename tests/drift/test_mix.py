"""The test of the mix of groups, and both tests of a stream together."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from ood_monitor import EDetector
from ood_monitor.drift.mix import MixDetector
from ood_monitor.drift.stream import StreamTest

SHARES = np.array([0.5, 0.3, 0.1, 0.07, 0.03])


def made(ert: float = 1_000, seed: int = 0) -> MixDetector:
    return MixDetector(np.random.default_rng(seed).multinomial(500, SHARES), ert=ert, seed=seed)


def groups(n: int, shares: np.ndarray = SHARES, seed: int = 0) -> list[int]:
    return np.random.default_rng([5, seed]).choice(5, n, p=shares).tolist()


def alarm(detector: MixDetector, stream: list[int]) -> float:
    found = (n for n, group in enumerate(stream, 1) if detector.update(group).alarm)
    return next(found, math.inf)


def test_places_are_uniform_and_independent() -> None:
    # Each test fails once in 1 000 runs of another seed.
    detector = made(ert=1e300)
    places = np.array([detector.update(group).p_value for group in groups(3000)])
    assert kstest(places, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 3.3 / 3000**0.5


def test_the_run_time_is_as_promised() -> None:
    # Run times are about exponential: a mean of 100 is short by 3 standard errors once in 700.
    times = [min(alarm(made(ert=200, seed=s), groups(2000, seed=s)), 2000) for s in range(100)]
    assert np.mean(times) >= 200 - 3 * np.std(times) / 10


@pytest.mark.parametrize(
    ("shares", "at_most"),
    [([0.2] * 5, 60), ([0.4, 0.3, 0.2, 0.07, 0.03], 500), ([0.53, 0.3, 0.1, 0.07, 0.0], math.inf)],
    ids=["all alike", "a tenth moves", "one vanishes"],
)
def test_a_change_of_the_mix_is_found(shares: list[float], at_most: float) -> None:
    times = [alarm(made(10_000, s), groups(2000, np.array(shares), s)) for s in range(20)]
    assert np.median(times) <= at_most


def test_a_group_that_no_calibration_sample_is_of_may_come() -> None:
    detector = MixDetector([300, 0], ert=1_000)
    assert alarm(detector, [1] * 10) <= 8


def test_a_resumed_test_goes_on_to_the_bit() -> None:
    first, stream = made(), groups(200)
    alarm(first, stream[:100])
    resumed = made()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert [resumed.update(g) for g in stream[100:]] == [first.update(g) for g in stream[100:]]


def test_a_copy_goes_on_by_itself() -> None:
    first = made()
    alarm(first, groups(50))
    before, other = first.state_dict(), first.copy()
    expected = [other.update(g) for g in groups(20, seed=1)]
    assert first.state_dict() == before
    assert [first.update(g) for g in groups(20, seed=1)] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9},
        {"calibration": ""},
        {"ert": 7.0},
        {"counts": [1, 2]},
        {"counts": [11, -1, 0, 0, 0]},
        {"n": 9},
        {"log1p_sums": [math.nan] * 4},
        {"recent": "x"},
        {"ranks": []},
        {"generator": {}},
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused(change: dict[str, Any]) -> None:
    detector = made()
    alarm(detector, groups(10))
    before = detector.state_dict()
    with pytest.raises(ValueError, match=r"state of a mix|state of the mix"):
        detector.load_state_dict(before | change)
    assert detector.state_dict() == before


@pytest.mark.parametrize("counts", [[], [[1]], [3, -1]], ids=str)
def test_counts_that_are_none_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match="Expected counts of shape"):
        MixDetector(counts, ert=100)


# Both together


def both(ert: float = 10_000, seed: int = 0) -> StreamTest:
    """Two groups, three to one, with scores around 0 and 20."""
    generator = np.random.default_rng([3, seed])
    own = generator.choice(2, 400, p=[0.75, 0.25])
    return StreamTest(
        generator.normal(size=400) + 20 * own, ert=ert, seed=seed, groups=own, group_count=2
    )


def first_alarm(test: StreamTest, n: int, *, second: float, shift: float, seed: int = 0) -> Any:
    generator = np.random.default_rng([4, seed])
    for group in generator.choice(2, n, p=[1 - second, second]):
        evidence = test.update(generator.normal(shift) + 20 * group, int(group))
        if evidence.alarm:
            return evidence
    return None


def test_a_change_of_the_mix_alone_is_no_drift_of_the_data() -> None:
    found = [first_alarm(both(seed=s), 400, second=0.6, shift=0, seed=s) for s in range(10)]
    assert [evidence.cause for evidence in found] == ["mix"] * 10
    assert max(evidence.n for evidence in found) < 120


def test_a_change_within_groups_is_a_drift_of_the_data() -> None:
    found = [first_alarm(both(seed=s), 400, second=0.25, shift=1.0, seed=s) for s in range(10)]
    assert [evidence.cause for evidence in found] == ["data"] * 10


def test_ranks_are_within_the_own_group() -> None:
    # What would be usual among all is the largest that its group has seen.
    assert both().update(8.0, 0).p_value < 0.01
    assert both().update(8.0, 1).p_value > 0.98


def test_ranks_of_groups_are_those_of_a_detector_of_each() -> None:
    generator = np.random.default_rng(0)
    scores, own = generator.normal(size=100), np.arange(100) % 2
    together = EDetector(scores, ert=1_000, groups=own)
    alone = EDetector(scores[own == 1], ert=1_000)
    first, second = together.update(0.3, 1), alone.update(0.3)
    assert first.p_value == second.p_value  # of the same tie-breaker


def test_both_together_run_as_long_as_promised() -> None:
    # As above: short by 3 standard errors once in 700.
    found = [first_alarm(both(100, s), 1000, second=0.25, shift=0, seed=s) for s in range(100)]
    times = [1000 if evidence is None else evidence.n for evidence in found]
    assert np.mean(times) >= 100 - 3 * np.std(times) / 10


def test_a_test_of_a_stream_resumes_and_refuses_what_is_not_its_own() -> None:
    first, other = both(), StreamTest(np.arange(30.0), ert=100)
    first_alarm(first, 30, second=0.25, shift=0)
    resumed = both()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.update(1.0, 0) == first.update(1.0, 0)
    for state in (other.state_dict(), {}, {"data": {}, "mix": None}):
        with pytest.raises(ValueError, match="state"):
            first.load_state_dict(state)
