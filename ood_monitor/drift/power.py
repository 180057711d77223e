"""How soon a drift test would see a change, from the held-out scores that it is calibrated with."""

import math

import numpy as np
from numpy.typing import ArrayLike

from ood_monitor.calibration.conformal import check_scores
from ood_monitor.checks import number, seed_of, whole
from ood_monitor.drift.e_detector import EDetector

__all__ = ["expected_delay"]


def expected_delay(
    calibration_scores: ArrayLike,
    *,
    ert: float,
    contamination: float = 0.05,
    shift: float = 3.0,
    runs: int = 50,
    horizon: int = 2000,
    seed: int = 0,
) -> float:
    """Returns how many samples it takes to see a contamination, from held-out scores alone.

    Streams are drawn from the calibration scores with replacement, and a share of their samples is
    moved up, from the first one on. It is the test's power for this calibration set; the stream's
    own noise is in it, the calibration set's is not.

    Args:
        calibration_scores: Scores of in-distribution data, with shape (m,).
        ert: The expected run time to a false alarm, in samples.
        contamination: The share of samples that are moved, in (0, 1].
        shift: By how much, in standard deviations of the calibration scores.
        runs: Number of streams.
        horizon: Samples after which a stream counts as not seen.
        seed: The seed of the streams.

    Returns:
        The median number of samples to the alarm; infinite if most streams have none.

    Raises:
        ValueError: If an option is out of its range, or :class:`~ood_monitor.EDetector` refuses
            the rest.
        TypeError: If an option is of another type.

    Example:
        >>> scores = np.random.default_rng(0).normal(size=500)
        >>> 20 < expected_delay(scores, ert=10_000, contamination=0.2, runs=9) < 60
        True
    """
    contamination = number("contamination", contamination, 0, 1, ends="(]")
    shift, seed = number("shift", shift, ends="()"), seed_of("seed", seed)
    runs, horizon = whole("runs", runs, 1), whole("horizon", horizon, 1)
    scores = check_scores(calibration_scores)
    generator = np.random.default_rng(seed)
    delays = []
    for run in range(runs):
        stream = generator.choice(scores, horizon)
        stream += shift * scores.std(ddof=1) * (generator.uniform(size=horizon) < contamination)
        detector = EDetector(scores, ert=ert, seed=run)
        alarms = (i for i, score in enumerate(stream, 1) if detector.update(score).alarm)
        delays.append(next(alarms, math.inf))
    return float(np.median(delays))
