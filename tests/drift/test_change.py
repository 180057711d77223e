"""Since when the evidence counts, and what run times neighbours that are alike leave."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from ood_monitor import EDetector
from ood_monitor.drift.change import KEPT, since_when
from ood_monitor.drift.correlation import MEAN_RUN_TIMES, RUN_TIMES, expected_run_time


def probability(ranks: np.ndarray, samples: float) -> float:
    """Density of ranks that come one after the other, each by what came before: Polya's urn."""
    edges = np.array([0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.7, 0.9, 0.97, 0.99, 0.997, 1])
    widths, density = np.diff(edges), 1.0
    seen = samples * widths
    for bin_ in np.searchsorted(edges, ranks, side="right") - 1:
        density *= seen[bin_] / seen.sum() / widths[bin_]
        seen[bin_] += 1
    return density


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_the_probabilities_of_what_came_from_there_on(seed: int) -> None:
    generator = np.random.default_rng(seed)
    ranks = np.concatenate([generator.uniform(size=30), generator.uniform(0, 0.2, 10)])
    weights = [sum(probability(ranks[t:], a) for a in (10, 30, 100)) for t in range(40)]
    found, back = since_when(ranks), np.array(weights[::-1])
    assert found.estimate == back.argmax()
    order = np.argsort(-back)
    chosen = order[: np.searchsorted(np.cumsum(back[order]), 0.9 * back.sum()) + 1]
    assert (found.earliest, found.latest) == (chosen.max(), chosen.min())


CHANGES: dict[str, Callable[[np.random.Generator], float]] = {
    "one deviation": lambda g: g.normal(1, 1),
    "half of one": lambda g: g.normal(0.5, 1),
    "one of ten": lambda g: g.normal(4 * (g.random() < 0.1), 1),
    "variance": lambda g: g.normal(0, 1.5),
}


def errors(change: Callable[[np.random.Generator], float]) -> tuple[float, float]:
    """Median distance of the estimate from the change, and how often the interval holds it."""
    distances, covered = [], []
    for seed in range(40):
        generator = np.random.default_rng([seed, 1])
        detector = EDetector(generator.normal(size=500), ert=10_000, seed=seed)
        before = generator.integers(100, 400)
        if any(e.alarm for e in detector.update_many(generator.normal(size=before))):
            continue
        after = (detector.update(change(generator)).alarm for _ in range(3000))
        n = next((n for n, alarm in enumerate(after) if alarm), None)
        if n is None:  # taken in by the history before it was found
            continue
        since = detector.since()
        distances.append(abs(since.estimate - n))
        covered.append(since.latest <= n <= since.earliest)
    return float(np.median(distances)), float(np.mean(covered))


@pytest.mark.parametrize(
    ("change", "at_most"),
    [("one deviation", 4), ("half of one", 20), ("one of ten", 25), ("variance", 25)],
)
def test_the_change_is_found_where_it_was(change: str, at_most: float) -> None:
    # Of 40 streams: a coverage of .95 falls to .8 once in 2 000 runs.
    distance, coverage = errors(CHANGES[change])
    assert distance <= at_most
    assert coverage >= 0.8


def test_as_many_ranks_are_kept_and_no_more() -> None:
    detector = EDetector(np.arange(30.0), ert=1e9, max_history=30)
    detector.update_many(np.random.default_rng(0).uniform(0, 30, KEPT + 10))
    assert len(detector.state_dict()["ranks"]) == KEPT
    assert detector.since().earliest < KEPT


def test_nothing_is_said_of_no_sample() -> None:
    with pytest.raises(ValueError, match="ranks of at least one sample, got none"):
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
