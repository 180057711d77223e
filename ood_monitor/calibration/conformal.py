r"""Calibration: what a score is worth, judged against scores of data known to be in distribution.

Higher score = more anomalous. With calibration scores :math:`s_1, \ldots, s_n` of held-out data,
the conformal p-value of a new score :math:`s` is

.. math:: p(s) = \frac{1 + \#\{i : s_i \geq s\}}{n + 1}.

If the :math:`n + 1` scores are exchangeable, :math:`P(p \leq \alpha) \leq \alpha` for every
:math:`\alpha`, whatever the law of the scores. The condition is that the scorer was fitted on data
*disjoint* from the calibration data: a scorer finds the data it was fitted on too normal, and every
new sample then looks anomalous. The probability is over the calibration set and the sample
together, so the p-value is for judging one sample. Over a stream, p-values against the same
calibration set are dependent; :class:`~ood_monitor.EDetector` has the ranks to accumulate instead.

References:
    | Algorithmic Learning in a Random World (Vladimir Vovk, Alexander Gammerman,
      Glenn Shafer, 2005)
    | https://doi.org/10.1007/b106715

    | Testing for Outliers with Conformal p-values (Stephen Bates, Emmanuel Candès, Lihua Lei,
      Yaniv Romano, Matteo Sesia, 2023)
    | https://arxiv.org/abs/2104.08279
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.checks import number, seed_of, whole

MINIMUM_SCORES = 20
"""The fewest scores to calibrate with; with fewer, no p-value is below .05."""


def check_scores(scores: ArrayLike, minimum: int = MINIMUM_SCORES) -> NDArray[np.float64]:
    """Returns scores as float64 if they are fit to calibrate with.

    Args:
        scores: The scores, with shape (n,).
        minimum: The fewest that will do.

    Returns:
        The scores, with shape (n,).

    Raises:
        ValueError: If they are not one-dimensional, fewer than the minimum, or not all finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"Expected scores of shape (n,), got shape {values.shape}.")
    if len(values) < minimum:
        raise ValueError(f"Expected at least {minimum} scores, got {len(values)}.")
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise ValueError(f"Expected finite scores, got {bad} of {len(values)} that are not.")
    return values


def p_values(calibration: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Returns :math:`(1 + \#\{i : s_i \geq s\}) / (n + 1)` of each score.

    Args:
        calibration: The calibration scores in ascending order, with shape (n,); n may be 0.
        scores: The scores, with shape (B,).

    Returns:
        The p-values, with shape (B,); nan where the score is nan.
    """
    n = len(calibration)
    at_least = n - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1.0 + at_least) / (n + 1.0))


@dataclass(frozen=True, eq=False)
class ConformalPValue:
    r"""Conformal p-values :math:`p(s) = (1 + \#\{i : s_i \geq s\}) / (n + 1)`.

    Args:
        scores: The calibration scores in ascending order, with shape (n,). :meth:`fit` sorts.

    Raises:
        ValueError: If the scores are not ascending, or :func:`check_scores` refuses them.

    Example:
        >>> calibration = ConformalPValue.fit(np.arange(99.0))
        >>> calibration.p_value([-1.0, 49.5, 98.0, 1000.0])
        array([1.  , 0.5 , 0.02, 0.01])
    """

    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Checks the scores, and keeps a copy that nobody can write to."""
        values = check_scores(self.scores).copy()
        if np.any(values[1:] < values[:-1]):
            raise ValueError("Expected scores in ascending order; ConformalPValue.fit sorts them.")
        values.flags.writeable = False
        object.__setattr__(self, "scores", values)

    @classmethod
    def fit(cls, scores: ArrayLike) -> Self:
        """Calibrates on the scores of held-out data which the scorer was not fitted on.

        Args:
            scores: The calibration scores in any order, with shape (n,).

        Returns:
            The calibration.

        Raises:
            ValueError: If :func:`check_scores` refuses the scores.
        """
        return cls(np.sort(check_scores(scores)))

    @property
    def smallest(self) -> float:
        """The smallest p-value there is, 1 / (n + 1)."""
        return 1.0 / (len(self.scores) + 1)

    def p_value(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Returns the p-value of each score.

        Args:
            scores: The scores, with shape (B,). They may be infinite.

        Returns:
            The p-values, with shape (B,); nan where the score is nan.

        Raises:
            ValueError: If the scores are not one-dimensional.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1:
            raise ValueError(f"Expected scores of shape (B,), got shape {values.shape}.")
        return p_values(self.scores, values)

    def check_fpr(self, fpr: float) -> None:
        """Refuses a false-positive rate which this calibration cannot reach.

        Args:
            fpr: The rate at which in-distribution samples may be flagged, in (0, 1).

        Raises:
            ValueError: If the rate is not in (0, 1), or below the smallest p-value, so that
                nothing would ever be flagged.
        """
        needed = samples_for(fpr)
        if len(self.scores) < needed:
            raise ValueError(
                f"A false-positive rate of {fpr} needs at least {needed} "
                f"calibration samples, got {len(self.scores)}: give more held-out samples, "
                "or a larger `fpr`."
            )

    def smoothed_p_value(self, scores: ArrayLike, *, seed: int = 0) -> NDArray[np.float64]:
        r"""Returns p-values that are exactly uniform for exchangeable scores, by random ties.

        .. math:: p(s) = \frac{\#\{i : s_i > s\} + U (1 + \#\{i : s_i = s\})}{n + 1}

        Args:
            scores: The scores, with shape (B,). They may be infinite.
            seed: The seed of the B uniform numbers U.

        Returns:
            The p-values, with shape (B,), at most those of :meth:`p_value`; nan where the score is
            nan.

        Raises:
            ValueError: If the scores are not one-dimensional, or the seed is below 0.
            TypeError: If the seed is no whole number.
        """
        seed, values = seed_of("seed", seed), np.asarray(scores, dtype=np.float64)
        largest = self.p_value(values)
        n = len(self.scores)
        above = n - np.searchsorted(self.scores, values, side="right")
        u = np.random.default_rng(seed).uniform(size=len(values))
        return above / (n + 1.0) + u * (largest - above / (n + 1.0))


def samples_for(fpr: float) -> int:
    r"""Returns how many calibration samples a false-positive rate needs.

    Args:
        fpr: The rate, in (0, 1).

    Returns:
        The smallest n with :math:`1 / (n + 1) \leq` fpr.

    Raises:
        ValueError: If the rate is not in (0, 1).
        TypeError: If it is no number.
    """
    fpr = number("a false-positive rate", fpr, 0, 1, ends="()")
    n = math.ceil(1.0 / fpr) - 1
    # The reciprocal of the float nearest to 1 / 49 rounds to just above 49.
    return n - 1 if 1.0 / n <= fpr else n


def lag1_autocorrelation(scores: ArrayLike) -> float:
    r"""Returns the lag-1 autocorrelation of the ranks of the scores.

    .. math:: \hat\rho = \frac{\sum_{t<n} (r_t - \bar r)(r_{t+1} - \bar r)}{\sum_t (r_t - \bar r)^2}

    Ranks, so that heavy tails do not matter; ties share their mean rank. What it should be beside
    :func:`autocorrelation_bound` decides whether the scores may be taken as exchangeable.

    Args:
        scores: The scores in the order of their arrival, with shape (n,), n at least 3.

    Returns:
        A number in (-1, 1); 0 if all scores are the same.

    Raises:
        ValueError: If :func:`check_scores` refuses the scores.

    References:
        | An Exact Test for Randomness in the Non-Parametric Case Based on Serial Correlation
          (Abraham Wald, Jacob Wolfowitz, 1943)
        | https://doi.org/10.1214/aoms/1177731358
    """
    from scipy.stats import rankdata

    ranks = rankdata(check_scores(scores, minimum=3))
    centred = ranks - ranks.mean()
    energy = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / energy if energy > 0.0 else 0.0


def autocorrelation_bound(n: int, confidence: float = 0.999) -> float:
    r"""Returns what the lag-1 autocorrelation of exchangeable scores rarely exceeds.

    Under exchangeability :math:`\hat\rho` has mean :math:`-1/n`, a variance just below :math:`1/n`
    and is close to Gaussian (Wald and Wolfowitz, 1943): the limit is :math:`z_c / \sqrt n`. It is
    one-sided, since only neighbours that are alike raise more false alarms than promised.

    Args:
        n: The number of scores.
        confidence: The probability :math:`c`, at least, that exchangeable scores do not exceed it.

    Returns:
        The limit, from above.

    Raises:
        ValueError: If n is below 3 or the confidence is not in (0, 1).
        TypeError: If n is no whole number, or the confidence no number.
    """
    n, confidence = whole("n", n, 3), number("confidence", confidence, 0, 1, ends="()")
    return NormalDist().inv_cdf(confidence) / math.sqrt(n)


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the exact (Clopper-Pearson) confidence interval of a proportion.

    Args:
        successes: How many of n trials succeeded.
        n: The number of trials, at least 1.
        confidence: The probability, at least, that the interval holds the proportion.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: If successes is not in [0, n], or n or the confidence makes no sense.
        TypeError: If a count is no whole number, or the confidence no number.

    References:
        | The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial
          (Charles Clopper, Egon Pearson, 1934)
        | https://doi.org/10.1093/biomet/26.4.404
    """
    from scipy.special import betaincinv

    successes, n = whole("successes", successes), whole("n", n, 1)
    confidence = number("confidence", confidence, 0, 1, ends="()")
    if successes > n:
        raise ValueError(f"Expected at most {n} successes of n={n}, got {successes}.")
    # Quantiles of beta laws; SciPy's `binomtest` looks for the same by bisection, in milliseconds.
    failures, tail = n - successes, (1 - confidence) / 2
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)
