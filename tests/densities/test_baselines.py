"""The baselines against their formulas, numpy and scipy, and the contract that they keep."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import logsumexp, polygamma
from scipy.stats import chi2, lognorm, multivariate_normal, norm
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM as ScikitLearnsSVM
from support.density_cases import FEATURES, correlated, independent

from ood_monitor.densities import Array, DiagonalGaussian, GaussianMixture
from ood_monitor.densities.baselines import (
    ChiSquare,
    ComplexityCorrected,
    DensityOfStates,
    GroupTypicality,
    IsolationForest,
    LogNormal,
    LowLikelihood,
    OneClassSVM,
    TotalNorm,
    Typicality,
    effective_dof,
)

Make = Callable[[], Any]
Features = Callable[..., Array]

#: Of features (N, F): a baseline is added to all contract checks by a line here.
OF_FEATURES: dict[str, Make] = {
    "LogNormal": LogNormal,
    "ChiSquare": ChiSquare,
    "OneClassSVM": OneClassSVM,
    "OneClassSVM-half": lambda: OneClassSVM(nu=0.5),
    "IsolationForest": IsolationForest,
    "DensityOfStates": DensityOfStates,
    "GaussianMixture": GaussianMixture,
    "GaussianMixture-5": lambda: GaussianMixture(components=5),
}

#: Those that saturate, and so tell far from farther no more.
SATURATING = (OneClassSVM, IsolationForest)

#: Calls of fit that are refused, with what is said.
UNFIT: dict[str, tuple[Array, str]] = {
    "one row": (independent(1), r"Expected at least \d rows \(N, F\), got shape \(1, 6\)"),
    "one-dimensional": (independent(50)[:, 0], r"rows \(N, F\), got shape \(50,\)"),
    "nan": (np.where(np.eye(50, 6), np.nan, independent(50)), "finite features, got 6 not"),
    "infinite": (np.where(np.eye(50, 6), -np.inf, independent(50)), "finite features, got 6 not"),
    "constant": (independent(50) * (np.arange(6) != 4), r"constant columns \[4\]"),
}

every_baseline = pytest.mark.parametrize("make", OF_FEATURES.values(), ids=OF_FEATURES)
every_kind = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)

VALUES = np.array([-10.0, -12.0, -20.0, -2.0])


def chi_square(n: int, dof: list[float], seed: int = 0) -> Array:
    """Logs of s chi2_k, each of a dof k and a scale s of its own."""
    generator = np.random.default_rng(seed)
    return np.log(generator.chisquare(dof, (n, len(dof)))) + np.linspace(-9.0, 4.0, len(dof))


# Likelihoods


def test_low_likelihood_is_anomalous() -> None:
    score = LowLikelihood().fit(VALUES).score(VALUES)
    assert score.tolist() == [10.0, 12.0, 20.0, 2.0]


def test_typicality_is_the_distance_from_the_mean_of_the_fit() -> None:
    assert Typicality().fit(VALUES).score(VALUES - 1.0).tolist() == [0.0, 2.0, 10.0, 8.0]


@pytest.mark.parametrize("baseline", [LowLikelihood, Typicality, lambda: GroupTypicality(1)])
def test_score_is_one_number_a_sample(baseline: Make) -> None:
    given = VALUES.copy()
    assert baseline().fit(VALUES).score(VALUES[:3]).shape == (3,)
    assert np.array_equal(VALUES, given)


def test_group_typicality_is_of_the_mean_of_consecutive_samples() -> None:
    new = np.array([-10.0, -8.0, -30.0, -10.0, -1.0])
    assert GroupTypicality(2).fit(VALUES).score(new).tolist() == [2.0, 9.0]


def test_groups_of_one_are_scored_as_by_typicality() -> None:
    score = GroupTypicality(1).fit(VALUES).score(VALUES - 1.0)
    assert np.array_equal(score, Typicality().fit(VALUES).score(VALUES - 1.0))


@pytest.mark.parametrize("group", [1, 5, 40])
@pytest.mark.parametrize("fpr", [0.01, 0.1, 0.5])
def test_a_share_of_new_groups_exceeds_the_threshold(group: int, fpr: float) -> None:
    generator = np.random.default_rng(0)
    typicality = GroupTypicality(group).fit(generator.gumbel(-3000.0, 50.0, 20_000))
    score = typicality.score(generator.gumbel(-3000.0, 50.0, 4000 * group))
    exceeding = np.mean(score > typicality.threshold(fpr))
    assert exceeding == pytest.approx(fpr, abs=5 * math.sqrt(fpr / 4000))


def test_threshold_is_the_same_each_time_and_of_its_seed() -> None:
    first, second = (GroupTypicality(3, draws=50, seed=s).fit(VALUES) for s in (0, 1))
    assert first.threshold(0.2) == first.threshold(0.2)
    assert first.threshold(0.2) != second.threshold(0.2)


def test_threshold_keeps_what_was_fitted() -> None:
    given = VALUES.copy()
    typicality = GroupTypicality(2).fit(given)
    before = typicality.threshold(0.1)
    given[:] = 0.0
    assert typicality.threshold(0.1) == before
    assert typicality.score(VALUES).tolist() == [0.0, 0.0]


def test_complexity_is_taken_from_the_bits_that_the_model_needs() -> None:
    # 2^-3 and 2^-10 of probability need 3 and 10 bits.
    log_likelihood, bits = np.log([2.0**-3, 2.0**-10]), np.array([1.0, 16.0])
    score = ComplexityCorrected().fit(log_likelihood, bits).score(log_likelihood, bits)
    np.testing.assert_allclose(score, [2.0, -6.0])


# Features


@pytest.mark.parametrize("size", [3.0, -1000.0, 1000.0], ids="log norm {:+.0f}".format)
def test_total_norm_is_the_log_of_the_sum(size: float) -> None:
    squared_norms = np.random.default_rng(0).uniform(0.1, 5.0, (7, 4))
    score = TotalNorm().fit(squared_norms).score(np.log(squared_norms) + size)
    np.testing.assert_allclose(score, [np.log(sum(row)) + size for row in squared_norms])


@every_kind
def test_log_normal_is_the_papers_score_with_the_log_norms_added(features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    difference = LogNormal().fit(fit).score(new) - DiagonalGaussian().fit(fit).score(new)
    np.testing.assert_allclose(difference, new.sum(1), rtol=1e-9)


def test_log_normal_is_scipys_density_of_the_norms() -> None:
    fit, new = independent(50), independent(20, seed=1)
    law = lognorm(fit.std(0, ddof=1), scale=np.exp(fit.mean(0)))
    expected = -law.logpdf(np.exp(new)).sum(1)
    np.testing.assert_allclose(LogNormal().fit(fit).score(new), expected, rtol=1e-9)


DOFS = pytest.mark.parametrize("dof", [0.5, 1.0, 3.0, 40.0, 1e4], ids="k = {:g}".format)


def law_of_one_layer(dof: float, given: bool) -> tuple[Array, Callable[[float], float]]:
    """What was fitted on and the density of v."""
    fit = chi_square(500, [dof])
    density = ChiSquare([dof] if given else None).fit(fit)
    return fit, lambda v: float(np.exp(-density.score(np.array([[v]]))[0]))


def integral(of: Callable[[float], float], fit: Array) -> float:
    """Over all v, which lie around the fit's and reach far to the left where dof are few."""
    middle, sd = float(fit.mean()), float(fit.std())
    edges = middle + sd * np.array([-30.0, -10.0, -3.0, 0.0, 3.0, 10.0])
    return sum(quad(of, a, b)[0] for a, b in pairwise(edges))


@DOFS
@pytest.mark.parametrize("given", [True, False], ids=["given", "fitted"])
def test_chi_square_is_a_density_over_the_log_norms(dof: float, given: bool) -> None:
    fit, density = law_of_one_layer(dof, given)
    assert integral(density, fit) == pytest.approx(1, abs=1e-5)


@DOFS
@pytest.mark.parametrize("given", [True, False], ids=["given", "fitted"])
def test_mean_of_the_chi_square_is_that_of_the_norms(dof: float, given: bool) -> None:
    fit, density = law_of_one_layer(dof, given)
    centre = fit.mean()
    mean = integral(lambda v: math.exp(v - centre) * density(v), fit)
    assert mean == pytest.approx(np.exp(fit - centre).mean(), rel=1e-5)


def test_chi_square_is_scipys_density_of_the_norms_with_its_jacobian() -> None:
    dof = [2.0, 7.0, 100.0]
    fit, new = chi_square(50, dof), chi_square(20, dof, seed=1)
    law = chi2(dof, scale=np.exp(fit).mean(0) / dof)
    expected = -(law.logpdf(np.exp(new)) + new).sum(1)
    np.testing.assert_allclose(ChiSquare(dof).fit(fit).score(new), expected, rtol=1e-9)


def test_chi_square_without_dof_takes_the_effective_ones() -> None:
    fit, new = correlated(50), correlated(20, seed=1)
    expected = ChiSquare(list(effective_dof(fit))).fit(fit).score(new)
    assert np.array_equal(ChiSquare().fit(fit).score(new), expected)


def test_chi_square_takes_a_norm_without_end_for_anomalous() -> None:
    density = ChiSquare().fit(chi_square(50, [1e6]))
    assert density.score(np.array([[800.0], [-np.inf], [0.0]])).tolist()[:2] == [np.inf, np.inf]


def test_effective_dof_are_those_of_the_chi_square() -> None:
    dof = [0.5, 1.0, 2.0, 30.0, 1e5]
    np.testing.assert_allclose(effective_dof(chi_square(200_000, dof)), dof, rtol=0.02)


@pytest.mark.parametrize("variance", np.logspace(-16, 4, 11), ids="{:.0e}".format)
def test_trigamma_of_the_effective_dof_is_the_variance(variance: float) -> None:
    fit = np.array([[-1.0], [1.0]]) * math.sqrt(variance / 2)
    assert polygamma(1, effective_dof(fit)[0] / 2) == pytest.approx(variance, rel=1e-9, abs=0)


def test_effective_dof_are_few_where_few_gradients_are_large() -> None:
    # Of 400 gradients 10 carry the norm: Satterthwaite's (sum a)^2 / sum a^2.
    weights = np.r_[np.ones(10), np.full(390, 1e-3)]
    squares = np.random.default_rng(0).normal(size=(10_000, 400)) ** 2
    expected = weights.sum() ** 2 / (weights**2).sum()
    assert effective_dof(np.log(squares @ weights)[:, None])[0] == pytest.approx(expected, rel=0.1)


def test_effective_dof_are_the_same_in_any_unit() -> None:
    fit = chi_square(50, [2.0, 20.0])
    np.testing.assert_allclose(effective_dof(fit + 7.0), effective_dof(fit))


@pytest.mark.parametrize("nu", [0.001, 0.3])
def test_one_class_svm_is_scikit_learns_of_standardised_norms(nu: float) -> None:
    fit, new = independent(200), independent(20, seed=1)
    mean, sd = fit.mean(0), fit.std(0)
    expected = -ScikitLearnsSVM(nu=nu).fit((fit - mean) / sd).score_samples((new - mean) / sd)
    np.testing.assert_allclose(OneClassSVM(nu).fit(fit).score(new), expected, rtol=1e-7)


def test_isolation_forest_is_of_its_seed() -> None:
    fit, new = independent(50), independent(20, seed=1)
    first, again, other = (IsolationForest(seed).fit(fit).score(new) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_density_of_states_is_a_sum_of_kernel_estimates() -> None:
    fit, new = correlated(50), correlated(20, seed=1)
    width = fit.std(0, ddof=1) * 50 ** (-1 / 5)  # Scott's rule
    kernels = norm.logpdf(new[:, None], fit, width)  # (20, 50, 6)
    expected = -logsumexp(kernels, axis=1, b=1 / 50).sum(1)
    score = DensityOfStates().fit(fit).score(new)
    np.testing.assert_allclose(score, expected, rtol=1e-8)


def two_kinds(n: int, seed: int = 0) -> Array:
    """Losses at 10 levels, which fall for one half of the samples where the other's rise."""
    generator = np.random.default_rng(seed)
    slope = np.where(np.arange(n) % 2, 1.0, -1.0)[:, None] * np.linspace(-1.0, 1.0, 10)
    return 5.0 + slope + 0.1 * generator.normal(size=(n, 10))


@pytest.mark.parametrize("regularisation", [0.01, 0.5])
def test_mixture_of_one_is_a_normal(regularisation: float) -> None:
    fit, new = correlated(50), correlated(20, seed=1)
    mean, sd = fit.mean(0), fit.std(0)
    covariance = np.corrcoef(fit.T) + regularisation * np.eye(6)
    expected = -multivariate_normal(mean, covariance * np.outer(sd, sd)).logpdf(new)
    score = GaussianMixture(1, regularisation).fit(fit).score(new)
    np.testing.assert_allclose(score, expected, rtol=1e-7)


def test_mixture_finds_what_lies_between_its_components() -> None:
    fit, new = two_kinds(50), two_kinds(200, seed=1)
    between = np.full((1, 10), 5.0)
    one, two = (GaussianMixture(components).fit(fit) for components in (1, 2))
    assert two.score(between) > two.score(new).max()
    assert one.score(between) < np.median(one.score(new))


def test_mixture_says_which_level_is_odd_for_the_component_that_is_near() -> None:
    fit = independent(400, width=2) + np.where(np.arange(400) % 2, 50.0, -50.0)[:, None]
    mixture, sd = GaussianMixture(2, regularisation=0.0).fit(fit), fit[::2].std(0)
    odd = fit[::2].mean(0) + sd * np.array([0.0, 6.0])
    parts = mixture.contributions(odd[None])[0]
    # Half a squared deviation of 6; the other component, hundreds away, has no say.
    assert parts[1] - parts[0] == pytest.approx(18.0, rel=0.05)


@pytest.mark.parametrize("components", [1, 2, 5])
def test_few_samples_do_not_fool_the_mixture(components: int) -> None:
    mixture = GaussianMixture(components).fit(two_kinds(50))
    score, held_out = mixture.score(two_kinds(50)), mixture.score(two_kinds(1000, seed=1))
    # Not in the dozens of nats, as of a covariance that is nearly singular.
    assert held_out.mean() - score.mean() < 10
    shifted = mixture.score(two_kinds(1000, seed=2) + 0.2)
    assert roc_auc_score([0] * 1000 + [1] * 1000, [*held_out, *shifted]) > 0.7


# The contract of those of features


@every_kind
@every_baseline
def test_scores_of_features_are_one_number_a_sample(make: Make, features: Features) -> None:
    score = make().fit(features(50)).score(features(7, seed=1))
    assert score.shape == (7,)
    assert score.dtype == np.float64
    assert np.isfinite(score).all()


@every_kind
@every_baseline
def test_sample_scores_the_same_alone(make: Make, features: Features) -> None:
    baseline, new = make().fit(features(50)), features(9, seed=1)
    alone = np.concatenate([baseline.score(new[[i]]) for i in range(9)])
    np.testing.assert_allclose(alone, baseline.score(new), rtol=1e-9)


@every_kind
@every_baseline
def test_unit_of_the_norms_adds_a_constant(make: Make, features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    before = make().fit(fit).score(new)
    after = make().fit(fit + np.log(7.0)).score(new + np.log(7.0))
    np.testing.assert_allclose(after - after[0], before - before[0], rtol=1e-6, atol=1e-6)


@every_baseline
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["larger", "smaller"])
def test_norms_far_off_score_higher(make: Make, sign: float) -> None:
    fit = independent(300)
    baseline = make().fit(fit)
    far = baseline.score(fit.mean(0) + sign * np.array([[8.0], [100.0]]) * fit.std(0))
    assert far.min() > np.quantile(baseline.score(independent(300, seed=1)), 0.95)
    assert far[1] > far[0] or isinstance(baseline, SATURATING)


@every_baseline
def test_fit_forgets_an_earlier_fit(make: Make) -> None:
    new = independent(20, seed=1)
    again = make().fit(correlated(70, seed=5)).fit(independent(50)).score(new)
    assert np.array_equal(again, make().fit(independent(50)).score(new))


@every_baseline
def test_features_are_left_as_they_were(make: Make) -> None:
    fit, new = independent(50), independent(20, seed=1)
    fit.flags.writeable = new.flags.writeable = False
    baseline = make().fit(fit)
    before = baseline.score(new)
    fit.flags.writeable = True
    fit[:] = 0.0
    assert np.array_equal(baseline.score(new), before)


# Refusals


@every_baseline
@pytest.mark.parametrize(("fit", "said"), UNFIT.values(), ids=UNFIT)
def test_fit_refuses_features_and_is_as_before(make: Make, fit: Array, said: str) -> None:
    baseline, new = make().fit(independent(50)), independent(20, seed=1)
    before = baseline.score(new)
    with pytest.raises(ValueError, match=said):
        baseline.fit(fit)
    assert np.array_equal(baseline.score(new), before)


@every_baseline
@pytest.mark.parametrize(
    "new", [independent(5, width=5), independent(1)[0]], ids=["width", "one-dimensional"]
)
def test_features_of_another_shape_are_refused(make: Make, new: Array) -> None:
    baseline = make().fit(independent(50))
    with pytest.raises(ValueError, match=r"Expected features \(N, 6\), got shape"):
        baseline.score(new)


@pytest.mark.parametrize(
    ("make", "new"),
    [(make, independent(5)) for make in OF_FEATURES.values()]
    + [(Typicality, VALUES), (lambda: GroupTypicality(2), VALUES)],
    ids=[*OF_FEATURES, "Typicality", "GroupTypicality"],
)
def test_unfitted_baseline_is_refused(make: Make, new: Array) -> None:
    name = type(make()).__name__
    with pytest.raises(RuntimeError, match=f"Expected {name} to be fitted, got it unfitted"):
        make().score(new)


def test_unfitted_typicality_has_no_threshold() -> None:
    with pytest.raises(RuntimeError, match="to be fitted, got it unfitted"):
        GroupTypicality(2).threshold(0.1)


@pytest.mark.parametrize("components", [1, 4])
def test_mixture_needs_more_samples_than_components(components: int) -> None:
    mixture = GaussianMixture(components)
    with pytest.raises(ValueError, match=f"at least {components + 1} rows"):
        mixture.fit(independent(components))
    assert np.isfinite(mixture.fit(independent(components + 1)).score(independent(5))).all()


#: What is refused, with what is said.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "dof of other layers": (
        lambda: ChiSquare([3.0, 4.0]).fit(independent(50)),
        "Expected dof of 6 layers, got 2",
    ),
    "one row of dof": (lambda: effective_dof(independent(1)), "at least 2 rows"),
    "less than a group": (
        lambda: GroupTypicality(5).fit(VALUES),
        r"at least 5 values \(N,\), got shape \(4,\)",
    ),
    "a single value": (lambda: GroupTypicality(1).fit(VALUES[:1]), "at least 2 values"),
    "less than a group scored": (
        lambda: GroupTypicality(3).fit(VALUES).score(VALUES[:2]),
        r"at least 3 values \(N,\), got shape \(2,\)",
    ),
    "likelihoods by row": (lambda: GroupTypicality(1).fit(VALUES[:, None]), r"shape \(4, 1\)"),
    "infinite likelihood": (
        lambda: GroupTypicality(1).fit(np.array([0.0, 1.0, -np.inf])),
        "finite values, got 1 not",
    ),
    "fpr of too few draws": (
        lambda: GroupTypicality(1, draws=100).fit(VALUES).threshold(0.001),
        r"fpr in \[0.01, 1\), got 0.001",
    ),
    "fpr of one": (lambda: GroupTypicality(1).fit(VALUES).threshold(1.0), "got 1.0"),
    "fewer bits": (
        lambda: ComplexityCorrected().score(VALUES, VALUES[:3]),
        "bits of 4 samples, got 3",
    ),
    "bits by row": (lambda: ComplexityCorrected().score(VALUES, VALUES[:, None]), r"\(4, 1\)"),
}


@pytest.mark.parametrize(("call", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
