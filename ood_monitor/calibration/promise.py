"""Whether normal samples are flagged as often as promised, the calibration's own luck included."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.calibration.conformal import ConformalPValue, check_scores
from ood_monitor.checks import number, whole

__all__ = ["FlaggedShare", "flagged_interval", "flagged_share"]


@dataclass(frozen=True)
class FlaggedShare:
    """How many of m normal samples were flagged, and how many may be.

    Attributes:
        flagged: How many were.
        samples: m.
        low: The fewest that may be.
        high: The most.
        mean: Share flagged, mean over random splits of all scores into calibration and samples.
        standard_error: Of this mean over splits of the same scores.
        expected: Share that is expected, at most ``fpr``: ``floor(fpr (n + 1)) / (n + 1)``.
    """

    flagged: int
    samples: int
    low: int
    high: int
    mean: float
    standard_error: float
    expected: float

    @property
    def holds(self) -> bool:
        """Whether as many may be."""
        return self.low <= self.flagged <= self.high


def flagged_interval(
    samples: int, calibration: int, fpr: float, *, level: float = 0.001, cells: int = 1
) -> tuple[int, int]:
    """The number of normal samples with p <= fpr that a sound detector stays within.

    Of m normal samples judged against n calibration scores it has the Beta-binomial law
    (m, k, n + 1 - k) with k = floor(fpr (n + 1)): wider than a binomial's, by the calibration
    sample's own luck. Samples are exchangeable with the calibration's, and scores have no ties.

    Args:
        samples: m.
        calibration: n.
        fpr: The nominal false-positive rate.
        level: How often a sound detector is outside, at most, in one of all cells.
        cells: How many counts are looked at.

    Returns:
        The smallest and the largest number that belong to it.

    Raises:
        ValueError: No samples or calibration scores, an ``fpr`` that is not in (0, 1), or a level
            or number of cells that is none.
        TypeError: A number of another type.

    References:
        Testing for Outliers with Conformal p-values (Bates, Candes, Lei, Romano, Sesia, 2023),
        https://arxiv.org/abs/2104.08279, for the law of the false-positive rate given calibration.

    Example:
        >>> flagged_interval(600, 600, 0.01)
        (0, 22)
    """
    from scipy.stats import betabinom

    samples, cells = whole("samples", samples, 1), whole("cells", cells, 1)
    calibration, fpr = whole("calibration", calibration, 1), number("fpr", fpr, 0, 1, ends="()")
    level = number("level", level, 0, 1, ends="()")
    k = _smallest_ranks(calibration, fpr)
    if k == 0:  # no p-value is so small
        return 0, 0
    law, tail = betabinom(samples, k, calibration + 1 - k), level / cells / 2
    return int(law.ppf(tail)), int(law.isf(tail))


def flagged_share(
    calibration: ArrayLike,
    normal: ArrayLike,
    *,
    fpr: float,
    cells: int = 1,
    splits: int = 200,
    seed: int = 0,
) -> FlaggedShare:
    """Compares how many normal samples are flagged with the law of their number.

    Args:
        calibration: Scores, with shape (n,), of samples that the scorer was not fitted on.
        normal: Scores of further samples of the same law, with shape (m,).
        fpr: The rate, in (0, 1).
        cells: How many such comparisons a test makes in all.
        splits: How many random splits of all n + m scores the mean is of, at least 2.
        seed: Of the splits; fix it before the run.

    Returns:
        The number, its interval as of :func:`flagged_interval`, and the mean.

    Raises:
        ValueError: Scores that are not finite or too few, a rate outside (0, 1) or that n scores
            cannot reach, or a count out of range.
        TypeError: A count is no whole number.

    Example:
        >>> scores = np.random.default_rng(0).normal(size=(2, 1000))
        >>> found = flagged_share(*scores, fpr=0.05)
        >>> found.low, found.flagged, found.high, found.holds
        (22, 73, 86, True)
    """
    known, new = check_scores(calibration), check_scores(normal, minimum=1)
    n, m = len(known), len(new)
    ConformalPValue.fit(known).check_fpr(fpr)
    low, high = flagged_interval(m, n, fpr, cells=whole("cells", cells, 1))
    generator, pool = np.random.default_rng(whole("seed", seed)), np.concatenate([known, new])
    mixed = (generator.permutation(pool) for _ in range(whole("splits", splits, 2)))
    shares = np.array([_flagged(scores[:n], scores[n:], fpr) / m for scores in mixed])
    return FlaggedShare(
        flagged=_flagged(known, new, fpr),
        samples=m,
        low=low,
        high=high,
        mean=float(shares.mean()),
        standard_error=float(shares.std(ddof=1) / np.sqrt(len(shares))),
        expected=_smallest_ranks(n, fpr) / (n + 1),
    )


def _smallest_ranks(calibration: int, fpr: float) -> int:
    """floor(fpr (n + 1)), of a rate that may have been rounded down."""
    return math.floor(fpr * (calibration + 1) * (1 + np.finfo(float).eps))


def _flagged(calibration: NDArray[np.float64], scores: NDArray[np.float64], fpr: float) -> int:
    return int((ConformalPValue.fit(calibration).p_value(scores) <= fpr).sum())
