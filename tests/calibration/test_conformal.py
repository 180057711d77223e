"""Calibration against loops, definitions and simulation."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, kstest, norm

from ood_monitor.calibration.conformal import (
    MINIMUM_SCORES,
    ConformalPValue,
    autocorrelation_bound,
    binomial_interval,
    check_scores,
    lag1_autocorrelation,
    samples_for,
)

FAR = 1e-3
BAD_SCORES = [
    (np.zeros((20, 1)), r"Expected scores of shape \(n,\), got shape \(20, 1\)"),
    (np.float64(1.0), r"Expected scores of shape \(n,\), got shape \(\)"),
    (np.zeros(0), f"Expected at least {MINIMUM_SCORES} scores, got 0"),
    (np.zeros(MINIMUM_SCORES - 1), "Expected at least 20 scores, got 19"),
    (np.r_[np.zeros(30), np.nan, np.inf], "Expected finite scores, got 2 of 32 that are not"),
]


def draw(generator: np.random.Generator, shape: tuple[int, ...], step: float) -> NDArray:
    values = generator.standard_t(df=3, size=shape)
    return np.round(values / step) * step if step else values


# Conformal p-values


@pytest.mark.parametrize("step", [0.0, 0.5, 2.0], ids="rounded to {}".format)
def test_p_value_equals_loop(step: float) -> None:
    generator = np.random.default_rng(0)
    calibration, scores = draw(generator, (37,), step), draw(generator, (50,), step)
    expected = [(1 + sum(s_i >= s for s_i in calibration)) / 38 for s in scores]
    assert ConformalPValue.fit(calibration).p_value(scores).tolist() == expected


def test_p_value_of_what_is_not_finite() -> None:
    p = ConformalPValue.fit(np.arange(99.0)).p_value([math.nan, math.inf, -math.inf, math.nan])
    np.testing.assert_array_equal(p, [math.nan, 0.01, 1.0, math.nan])


@pytest.mark.parametrize("fpr", [0.1, 0.01])
def test_false_positive_rate(fpr: float) -> None:
    generator = np.random.default_rng(1)
    scores = draw(generator, (8_000, 200), 0.0)
    hits = sum(ConformalPValue.fit(row[:-1]).p_value(row[-1:])[0] <= fpr for row in scores)
    low, high = binomial_interval(hits, len(scores), confidence=1.0 - FAR)
    assert low <= fpr <= high, hits


@pytest.mark.parametrize("fpr", [0.1, 0.01])
def test_false_positive_rate_is_lower_with_ties(fpr: float) -> None:
    scores = draw(np.random.default_rng(2), (4_000, 200), 1.0)
    hits = sum(ConformalPValue.fit(row[:-1]).p_value(row[-1:])[0] <= fpr for row in scores)
    assert binomial_interval(hits, len(scores), confidence=1.0 - FAR)[0] <= fpr, hits


def test_fit_neither_sorts_nor_keeps_its_argument() -> None:
    scores = np.random.default_rng(0).normal(size=30)
    given = scores.copy()
    calibration = ConformalPValue.fit(scores)
    np.testing.assert_array_equal(scores, given)
    scores[:] = 0.0
    np.testing.assert_array_equal(calibration.scores, np.sort(given))
    with pytest.raises(ValueError, match="read-only"):
        calibration.scores[0] = 1.0


def test_construction_keeps_a_copy() -> None:
    scores = np.arange(30.0)
    calibration = ConformalPValue(scores)
    scores[0] = -100.0
    assert calibration.scores[0] == 0.0


def test_construction_refuses_unsorted() -> None:
    with pytest.raises(ValueError, match="ascending order"):
        ConformalPValue(np.arange(30.0)[::-1])


@pytest.mark.parametrize(("scores", "message"), BAD_SCORES)
def test_fit_refuses(scores: NDArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConformalPValue.fit(scores)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_p_value_refuses_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected scores of shape \(B,\)"):
        ConformalPValue.fit(np.arange(30.0)).p_value(np.zeros(shape))


def test_p_value_of_empty_batch() -> None:
    assert ConformalPValue.fit(np.arange(30.0)).p_value([]).shape == (0,)


def test_check_scores_converts() -> None:
    values = check_scores([1, 2, 3], minimum=3)
    assert values.dtype == np.float64
    assert values.tolist() == [1.0, 2.0, 3.0]


# What rate a calibration can reach


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 19), (0.01, 99), (0.001, 999), (0.03, 33)])
def test_check_fpr_names_the_samples_needed(fpr: float, needed: int) -> None:
    enough = max(needed, MINIMUM_SCORES)
    ConformalPValue.fit(np.arange(float(enough))).check_fpr(fpr)
    assert samples_for(fpr) == needed
    if needed > MINIMUM_SCORES:
        with pytest.raises(ValueError, match=f"needs at least {needed} .* got {needed - 1}"):
            ConformalPValue.fit(np.arange(float(needed - 1))).check_fpr(fpr)


def test_samples_for_agrees_with_smallest_p_value() -> None:
    for n in range(1, 2000):
        assert samples_for(1.0 / (n + 1)) == n


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_check_fpr_refuses(fpr: float) -> None:
    with pytest.raises(ValueError, match=r"Expected a false-positive rate in \(0, 1\), got"):
        ConformalPValue.fit(np.arange(30.0)).check_fpr(fpr)


@pytest.mark.parametrize("n", [20, 99, 1000])
def test_smallest_is_attained(n: int) -> None:
    calibration = ConformalPValue.fit(np.arange(float(n)))
    assert calibration.smallest == 1 / (n + 1) == calibration.p_value([n])[0]


# Autocorrelation


def test_autocorrelation_equals_definition() -> None:
    scores = [3.0, 1.0, 2.0, 2.0, 10.0]
    ranks = [4.0, 1.0, 2.5, 2.5, 5.0]
    deviations = [rank - 3.0 for rank in ranks]
    products = [a * b for a, b in itertools.pairwise(deviations)]
    assert lag1_autocorrelation(scores) == pytest.approx(
        sum(products) / sum(d * d for d in deviations), rel=1e-12
    )


def test_autocorrelation_of_exchangeable_scores_has_mean_minus_1_over_n() -> None:
    values = [lag1_autocorrelation(order) for order in itertools.permutations(range(6))]
    assert np.mean(values) == pytest.approx(-1 / 6, rel=1e-12)


def test_autocorrelation_ignores_tails() -> None:
    scores = np.random.default_rng(0).normal(size=100)
    assert lag1_autocorrelation(np.sinh(20.0 * scores)) == lag1_autocorrelation(scores)


def test_autocorrelation_of_constant_scores() -> None:
    assert lag1_autocorrelation(np.full(50, 3.7)) == 0.0


@pytest.mark.parametrize("n", [20, 100, 500])
@pytest.mark.parametrize("confidence", [0.95, 0.99, 0.999])
def test_exchangeable_scores_stay_below_bound(n: int, confidence: float) -> None:
    scores = np.random.default_rng(n).standard_cauchy(size=(1500, n))
    bound = autocorrelation_bound(n, confidence)
    exceeding = sum(lag1_autocorrelation(row) > bound for row in scores)
    low, high = binomial_interval(exceeding, len(scores), confidence=1.0 - FAR)
    assert low <= 1 - confidence, exceeding
    # Less often with few scores: the mean is -1 / n.
    assert high >= (1 - confidence) / (2 if n > 20 else 4), exceeding


@pytest.mark.parametrize(("rho", "exceeds"), [(0.3, True), (-0.3, False)])
def test_scores_alike_their_neighbours_exceed_bound(rho: float, exceeds: bool) -> None:
    noise = np.random.default_rng(0).normal(size=500)
    scores = list(itertools.accumulate(noise, lambda past, new: rho * past + new))
    assert (lag1_autocorrelation(scores) > autocorrelation_bound(500)) == exceeds


def test_bound_is_rarely_exceeded_by_default() -> None:
    assert autocorrelation_bound(100) == pytest.approx(norm.ppf(0.999) / 10)


def test_autocorrelation_refuses_two_scores() -> None:
    with pytest.raises(ValueError, match="Expected at least 3 scores, got 2"):
        lag1_autocorrelation([1.0, 2.0])


# Binomial intervals


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 20, 0.95), (50, 100, 0.99)])
def test_binomial_interval_is_where_the_tails_are(
    successes: int, n: int, confidence: float
) -> None:
    low, high = binomial_interval(successes, n, confidence)
    tail = (1.0 - confidence) / 2.0
    assert binom.sf(successes - 1, n, low) == pytest.approx(tail, rel=1e-6)
    assert binom.cdf(successes, n, high) == pytest.approx(tail, rel=1e-6)


def test_binomial_interval_at_the_ends() -> None:
    assert binomial_interval(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1), rel=1e-9, abs=0.0)
    assert binomial_interval(10, 10) == pytest.approx((0.025**0.1, 1.0), rel=1e-9, abs=0.0)


# Smoothed


def test_smoothed_p_values_are_between_those_of_ties_won_and_lost() -> None:
    calibration = ConformalPValue.fit(np.repeat([1.0, 2.0, 3.0], 10))
    scores = np.array([0.0, 1.0, 2.5, 3.0, 9.0, np.nan])
    p = calibration.smoothed_p_value(scores)
    largest = calibration.p_value(scores)
    smallest = np.array([30, 20, 10, 0, 0, np.nan]) / 31
    assert np.all((smallest <= p) & (p <= largest) | np.isnan(scores))
    assert np.isnan(p[-1])


def test_smoothed_p_values_are_uniform_whatever_the_ties() -> None:
    generator = np.random.default_rng(0)
    p = []
    for seed in range(400):
        scores = generator.integers(4, size=60).astype(float)
        p += ConformalPValue.fit(scores[:50]).smoothed_p_value(scores[50:], seed=seed).tolist()
    assert kstest(p, "uniform").pvalue > 0.01


def test_smoothing_is_seeded() -> None:
    calibration, scores = ConformalPValue.fit(np.arange(30.0)), np.zeros(5)
    first, again, other = (calibration.smoothed_p_value(scores, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n", [1, 2, 30, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_is_scipys_exact_one(n: int, confidence: float) -> None:
    for successes in {0, 1, n // 2, n - 1, n}:
        exact = binomtest(successes, n).proportion_ci(confidence, method="exact")
        found = binomial_interval(successes, n, confidence)
        assert found == pytest.approx((exact.low, exact.high), abs=1e-9)
