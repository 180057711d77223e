"""Expected delays: what they grow with, and against streams of the same law."""

import math

import numpy as np
import pytest

from ood_monitor.drift import EDetector, expected_delay


def test_expected_delay_falls_with_what_there_is_to_see() -> None:
    scores = np.random.default_rng(0).normal(size=300)
    delays = [
        expected_delay(scores, ert=1000, contamination=c, shift=s, runs=15)
        for c, s in ((0.05, 3.0), (0.2, 3.0), (1.0, 3.0))
    ]
    assert delays[0] > delays[1] > delays[2] > 0


def test_what_is_not_seen_within_the_horizon_takes_forever() -> None:
    scores = np.random.default_rng(0).normal(size=300)
    assert expected_delay(scores, ert=1e6, shift=0.0, runs=5, horizon=50) == math.inf


def test_expected_delay_is_about_what_streams_of_the_same_law_take() -> None:
    generator = np.random.default_rng(1)
    delays = []
    for seed in range(31):
        detector = EDetector(generator.normal(size=500), ert=1000, seed=seed)
        moved = generator.normal(size=2000) + 3 * (generator.uniform(size=2000) < 0.1)
        delays.append(next(i for i, s in enumerate(moved, 1) if detector.update(s).alarm))
    expected = expected_delay(generator.normal(size=500), ert=1000, contamination=0.1, runs=31)
    assert 0.4 < expected / np.median(delays) < 2.5


@pytest.mark.parametrize("contamination", [0.0, 1.5, -0.1])
def test_a_contamination_is_a_share(contamination: float) -> None:
    with pytest.raises(ValueError, match=rf"contamination in \(0, 1\], got {contamination}"):
        expected_delay(np.arange(50.0), ert=100, contamination=contamination)
