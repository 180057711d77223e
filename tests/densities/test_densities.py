"""The densities against numpy, scipy and scikit-learn, and the contract that all of them keep."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import combine_pvalues, multivariate_normal, norm, spearmanr, t
from sklearn.covariance import LedoitWolf, ledoit_wolf, oas
from sklearn.decomposition import PCA
from support.density_cases import DENSITIES, FEATURES, OF_VALUES, correlated, independent, wide

from ood_monitor import densities
from ood_monitor.densities import (
    Array,
    Density,
    DiagonalGaussian,
    FisherCombination,
    GaussianMixture,
    Maximum,
    PrincipalGaussian,
    ShrunkGaussian,
    StudentT,
    TermsAndNorms,
)

every_density = pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
OF_NORMS = {name: make for name, make in DENSITIES.items() if name not in OF_VALUES}
every_one_of_norms = pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
every_kind = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)

Make = Callable[[], Density]
Features = Callable[..., Array]


# Each against an independent implementation


@every_kind
def test_diagonal_gaussian_is_the_papers_score(features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    mean = sum(fit) / 50
    variance = sum((v - mean) ** 2 for v in fit) / 49
    log_density = -((new - mean) ** 2) / (2 * variance) - np.log(2 * np.pi * variance) / 2
    score = DiagonalGaussian().fit(fit).score(new)
    np.testing.assert_allclose(score, -log_density.sum(1), rtol=1e-10)


@every_kind
def test_shrunk_gaussian_is_a_normal_with_ledoit_and_wolfs_covariance(features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    mean, sd = fit.mean(0), fit.std(0, ddof=1)
    shrunk = LedoitWolf(assume_centered=True).fit((fit - mean) / sd).covariance_
    normal = multivariate_normal(mean, shrunk * np.outer(sd, sd))
    score = ShrunkGaussian("ledoit_wolf").fit(fit).score(new)
    np.testing.assert_allclose(score, -normal.logpdf(new), rtol=1e-8)


def test_gaussians_agree_if_the_layers_are_uncorrelated() -> None:
    n, width, new = 400, 4, independent(30, seed=1, width=4)
    centred = independent(n, width=4) - independent(n, width=4).mean(0)
    fit = np.linalg.qr(centred)[0]  # columns of mean zero, exactly orthogonal
    diagonal, shrunk = DiagonalGaussian().fit(fit), ShrunkGaussian("ledoit_wolf").fit(fit)
    # Scikit-learn's covariance divides by n, the paper's standard deviation by n - 1.
    stretch = n / (n - 1)
    expected = diagonal.distance_parts(new).sum(1) * stretch - width * math.log(stretch)
    constant = 2 * np.log(diagonal.state()["sd"]).sum() + width * math.log(2 * math.pi)
    np.testing.assert_allclose(shrunk.score(new), (expected + constant) / 2, rtol=1e-10)


def cross_fitted_log_distances(distance: Any, fit: Array, folds: int) -> Array:
    """Log distance of each sample from a fit that has not seen its fold."""
    fold = np.arange(len(fit)) % folds
    return np.log([distance(fit[fold != fold[i]], fit[[i]])[0] for i in range(len(fit))])


def diagonal_distance(fit: Array, new: Array) -> Array:
    return (((new - fit.mean(0)) / fit.std(0, ddof=1)) ** 2).sum(1)


def shrunk_distance(fit: Array, new: Array) -> Array:
    mean, sd = fit.mean(0), fit.std(0, ddof=1)
    covariance = LedoitWolf(assume_centered=True).fit((fit - mean) / sd).covariance_
    return np.array([z @ np.linalg.solve(covariance, z) for z in (new - mean) / sd])


@every_kind
@pytest.mark.parametrize("folds", [3, 5])
def test_maximum_is_the_larger_standardised_log_distance(features: Features, folds: int) -> None:
    fit, new = features(50), features(20, seed=1)
    standardised = []
    for distance in (diagonal_distance, shrunk_distance):
        held_out = cross_fitted_log_distances(distance, fit, folds)
        standardised.append((np.log(distance(fit, new)) - held_out.mean()) / held_out.std(ddof=1))
    score = Maximum(folds).fit(fit).score(new)
    np.testing.assert_allclose(score, np.maximum(*standardised), rtol=1e-8)


def test_maximum_finds_what_each_part_finds() -> None:
    fit = correlated(300)
    sd, mean = fit.std(0), fit.mean(0)
    all_larger = (mean + 4 * sd)[None]
    against_the_correlation = (mean + 2 * sd * np.array([1, -1, 1, -1, 1, -1]))[None]
    maximum = Maximum().fit(fit)
    usual = np.quantile(maximum.score(correlated(300, seed=1)), 0.99)
    assert maximum.score(all_larger) > usual
    assert maximum.score(against_the_correlation) > usual


def test_every_density_is_checked_and_can_be_loaded_by_name() -> None:
    assert {type(make()) for make in DENSITIES.values()} == set(densities.DENSITIES.values())
    assert all(make().__class__.__name__ == name for name, make in densities.DENSITIES.items())


# The contract


@every_kind
@every_density
def test_scores_are_one_number_a_sample(make: Make, features: Features) -> None:
    score = make().fit(features(50)).score(features(7, seed=1))
    assert score.shape == (7,)
    assert score.dtype == np.float64
    assert np.isfinite(score).all()


@every_kind
@every_density
def test_contributions_add_up_to_the_score(make: Make, features: Features) -> None:
    density, new = make().fit(features(50)), features(20, seed=1)
    parts = density.contributions(new)
    assert parts.shape == new.shape
    np.testing.assert_allclose(parts.sum(1), density.score(new), rtol=1e-10, atol=1e-10)


@every_density
def test_contributions_add_up_where_nothing_is_unusual(make: Make) -> None:
    fit = np.array([[-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0], [1.0, 2.0]] * 10)
    density, mean = make().fit(fit), np.zeros((1, 2))
    np.testing.assert_allclose(density.contributions(mean).sum(1), density.score(mean))


@every_one_of_norms
def test_the_unusual_layer_contributes_most(make: Make) -> None:
    density, new = make().fit(independent(200)), independent(200).mean(0, keepdims=True)
    new[0, 3] += 30.0
    assert density.contributions(new)[0].argmax() == 3


@every_kind
@every_density
def test_sample_scores_the_same_alone(make: Make, features: Features) -> None:
    density, new = make().fit(features(50)), features(9, seed=1)
    alone = np.concatenate([density.score(new[[i]]) for i in range(9)])
    np.testing.assert_allclose(alone, density.score(new), rtol=1e-12)


@every_kind
@every_density
@pytest.mark.parametrize(
    ("offset", "factor"),
    [(np.log(7.0), 1.0), ("each", 1.0), (0.0, 0.5), ("each", "each")],
    ids=["bits for nats", "rescaled layers", "norm for squared norm", "both for each layer"],
)
def test_units_of_the_norms_add_a_constant(
    make: Make, features: Features, offset: Any, factor: Any
) -> None:
    fit, new = features(50), features(20, seed=1)
    generator = np.random.default_rng(3)
    offset = generator.normal(size=fit.shape[1]) if offset == "each" else offset
    factor = generator.uniform(0.3, 3.0, fit.shape[1]) if factor == "each" else factor
    before = make().fit(fit).score(new)
    after = make().fit(fit * factor + offset).score(new * factor + offset)
    np.testing.assert_allclose(after - after[0], before - before[0], rtol=1e-7, atol=1e-7)


@every_kind
@every_density
def test_order_of_the_layers_changes_nothing(make: Make, features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    order = np.random.default_rng(0).permutation(fit.shape[1])
    reordered = make().fit(fit[:, order]).score(new[:, order])
    np.testing.assert_allclose(reordered, make().fit(fit).score(new), rtol=1e-8)


@every_kind
@every_one_of_norms
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["larger", "smaller"])
def test_gradients_score_higher_the_further_off(
    make: Make, features: Features, sign: float
) -> None:
    fit = features(50)
    steps = sign * np.array([1.0, 2.0, 4.0, 8.0, 100.0])[:, None]
    score = make().fit(fit).score(fit.mean(0) + steps * fit.std(0))
    assert (np.diff(score) > 0).all()


@every_kind
@every_density
def test_state_is_all_that_was_learned(make: Make, features: Features) -> None:
    density, new = make().fit(features(50)), features(20, seed=1)
    state = {name: value.copy() for name, value in density.state().items()}
    loaded = type(density)().load_state(state)
    assert np.array_equal(loaded.score(new), density.score(new))
    assert np.array_equal(loaded.contributions(new), density.contributions(new))
    assert all(np.array_equal(value, state[name]) for name, value in loaded.state().items())


@every_density
def test_fit_forgets_an_earlier_fit(make: Make) -> None:
    new = independent(20, seed=1)
    again = make().fit(correlated(70, seed=5)).fit(independent(50)).score(new)
    assert np.array_equal(again, make().fit(independent(50)).score(new))


@every_density
def test_fit_forgets_a_loaded_state(make: Make) -> None:
    state, new = make().fit(correlated(70, seed=5)).state(), independent(20, seed=1)
    again = make().load_state(state).fit(independent(50)).score(new)
    assert np.array_equal(again, make().fit(independent(50)).score(new))


@every_density
def test_features_are_left_as_they_were(make: Make) -> None:
    fit, new = independent(50), independent(20, seed=1)
    fit.flags.writeable = new.flags.writeable = False
    density = make().fit(fit)
    before = density.score(new)
    fit.flags.writeable = True
    fit[:] = 0.0
    assert np.array_equal(density.score(new), before)


@every_density
def test_minimum_samples_suffice(make: Make) -> None:
    density = make()
    score = density.fit(independent(density.minimum_samples)).score(independent(5, seed=1))
    assert np.isfinite(score).all()


def test_minimum_samples_suffice_for_two_folds() -> None:
    density = Maximum(folds=2)
    assert np.isfinite(
        density.fit(independent(density.minimum_samples)).score(independent(2))
    ).all()


# Refusals


@every_density
def test_fewer_than_the_minimum_are_refused(make: Make) -> None:
    density = make()
    with pytest.raises(ValueError, match=f"at least {density.minimum_samples} rows"):
        density.fit(independent(density.minimum_samples - 1))


@every_density
@pytest.mark.parametrize("call", ["score", "contributions"])
def test_unfitted_density_is_refused(make: Make, call: str) -> None:
    with pytest.raises(RuntimeError, match="to be fitted, got it unfitted"):
        getattr(make(), call)(independent(5))


@every_density
@pytest.mark.parametrize("call", ["score", "contributions"])
@pytest.mark.parametrize(
    "new", [independent(5, width=5), independent(1)[0]], ids=["width", "one-dimensional"]
)
def test_features_of_another_shape_are_refused(make: Make, call: str, new: Array) -> None:
    density = make().fit(independent(50))
    with pytest.raises(ValueError, match=r"Expected features \(N, .*, got shape"):
        getattr(density, call)(new)


@every_density
def test_fit_refuses_one_dimensional_features(make: Make) -> None:
    with pytest.raises(ValueError, match=r"rows \(N, F\), got shape \(50,\)"):
        make().fit(independent(50)[:, 0])


@every_density
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fit_refuses_features_that_are_not_finite(make: Make, bad: float) -> None:
    fit = independent(50)
    fit[3, 2] = bad
    with pytest.raises(ValueError, match="Expected finite features, got 1 not"):
        make().fit(fit)


@every_density
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6 / 3])
def test_fit_refuses_constant_features(make: Make, value: float) -> None:
    fit = independent(50)
    fit[:, [1, 4]] = value
    with pytest.raises(ValueError, match=r"constant columns \[1, 4\]"):
        make().fit(fit)


@every_one_of_norms
@pytest.mark.parametrize("varying", [[7], [2, 2 + 15]], ids=["one sample", "one fold"])
def test_a_feature_may_vary_in_few_samples(make: Make, varying: list[int]) -> None:
    fit, new = independent(50), independent(20, seed=1)
    without = make().fit(np.delete(fit, 4, axis=1)).score(np.delete(new, 4, axis=1))
    fit[:, 4], new[:, 4] = 1.5, 1.5
    fit[varying, 4] = 2.5
    density = make().fit(fit)
    # A layer that says nothing of these samples leaves their order nearly as it was.
    assert spearmanr(density.score(new), without).statistic > 0.95
    new[3, 4] = 9.0
    assert density.score(new).argmax() == 3


@pytest.mark.parametrize("folds", [2, 5])
def test_a_single_feature_that_varies_in_one_sample_is_refused(folds: int) -> None:
    fit = np.ones((50, 1))
    fit[0] = 2.0
    with pytest.raises(
        ValueError, match=r"vary in every fold, got none among .. of 50 samples: fit"
    ):
        Maximum(folds).fit(fit)


@every_density
def test_fit_is_as_before_after_a_refusal(make: Make) -> None:
    density, new = make().fit(independent(50)), independent(20, seed=1)
    before = density.score(new)
    with pytest.raises(ValueError, match="finite"):
        density.fit(np.full((50, 3), np.nan))
    assert np.array_equal(density.score(new), before)


@pytest.mark.parametrize("folds", [1, 0, -2])
def test_maximum_needs_two_folds(folds: int) -> None:
    with pytest.raises(ValueError, match="fold"):
        Maximum(folds)


# The relatives


@every_kind
@pytest.mark.parametrize("rule", ["ledoit_wolf", "oas", "leave_one_out", 0.3])
def test_shrunk_gaussian_is_a_normal_with_the_shrunk_covariance(
    features: Features, rule: Any
) -> None:
    fit, new = features(50), features(20, seed=1)
    density = ShrunkGaussian(rule).fit(fit)
    mean, sd = fit.mean(0), fit.std(0, ddof=1)
    z = (fit - mean) / sd
    amounts = {
        "ledoit_wolf": lambda: ledoit_wolf(z, assume_centered=True)[1],
        "oas": lambda: oas(z, assume_centered=True)[1],
        "leave_one_out": lambda: likeliest_shrinkage(z),
        0.3: lambda: 0.3,
    }
    amount = max(amounts[rule](), 1e-4)
    covariance = z.T @ z / len(z)
    target = np.trace(covariance) / z.shape[1] * np.eye(z.shape[1])
    shrunk = (1 - amount) * covariance + amount * target
    normal = multivariate_normal(mean, shrunk * np.outer(sd, sd))
    np.testing.assert_allclose(density.score(new), -normal.logpdf(new), rtol=1e-7)


def likeliest_shrinkage(z: Array) -> float:
    """By fits to all samples but one, one after the other."""

    def log_likelihood(amount: float) -> float:
        target = np.mean(z**2) * np.eye(z.shape[1])
        total = 0.0
        for i in range(len(z)):
            others = np.delete(z, i, 0)
            covariance = (1 - amount) * others.T @ others / len(others) + amount * target
            total += multivariate_normal(np.zeros(z.shape[1]), covariance).logpdf(z[i])
        return total

    return float(max(np.logspace(-4, 0, 41), key=log_likelihood))


@pytest.mark.parametrize("features", [correlated, wide], ids=["correlated", "wide"])
def test_principal_gaussian_is_probabilistic_pca(features: Features) -> None:
    fit, new = features(50), features(20, seed=1)
    mean, sd = fit.mean(0), fit.std(0, ddof=1)
    density = PrincipalGaussian(0.6).fit(fit)
    kept = len(density.state()["axes"])
    pca = PCA(kept).fit((fit - mean) / sd)
    found, expected = density.score(new), -pca.score_samples((new - mean) / sd)
    # Scikit-learn divides by n - 1, and so does not quite give the same distance.
    assert spearmanr(found, expected).statistic > 0.99
    assert pca.explained_variance_ratio_.sum() >= 0.6 > pca.explained_variance_ratio_[:-1].sum()


def test_student_t_is_the_law_with_the_sample_variance_and_kurtosis() -> None:
    generator = np.random.default_rng(0)
    fit = generator.standard_t(8, size=(200_000, 1)) * 3 + 1
    state = StudentT().fit(fit).state()
    assert state["dof"][0] == pytest.approx(8, rel=0.2)
    assert state["scale"][0] == pytest.approx(3, rel=0.05)
    new = np.array([[-4.0], [1.0], [30.0]])
    expected = -t.logpdf(new, state["dof"], state["mean"], state["scale"]).sum(1)
    np.testing.assert_allclose(StudentT().fit(fit).score(new), expected)


def test_student_t_without_heavy_tails_is_the_papers_score() -> None:
    fit = np.random.default_rng(0).uniform(size=(500, 3))
    new = np.random.default_rng(1).uniform(size=(20, 3))
    found, expected = StudentT(1e9).fit(fit).score(new), DiagonalGaussian().fit(fit).score(new)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fishers_combination_is_scipys() -> None:
    fit, new = independent(50), independent(20, seed=1)
    z = (new - fit.mean(0)) / fit.std(0, ddof=1)
    expected = [combine_pvalues(2 * norm.sf(np.abs(row))).statistic for row in z]
    np.testing.assert_allclose(FisherCombination().fit(fit).score(new), expected)


def test_a_wide_density_is_stored_by_its_axes() -> None:
    fit = np.random.default_rng(0).normal(size=(40, 3000))
    state = ShrunkGaussian().fit(fit).state()
    assert sum(value.size for value in state.values()) < 50 * 3000


# Terms and norms


def terms_and_norms(n: int, seed: int = 0, terms: int = 2) -> Array:
    """Terms that take one of two values, then correlated log norms."""
    rng = np.random.default_rng(seed)
    values = 3.0 * rng.integers(2, size=(n, 1)) + rng.normal(size=(n, terms)) - 1e4
    return np.hstack([values, correlated(n, seed)])


def of_two(make: Callable[[], Density], columns: slice, fit: Array, new: Array) -> Array:
    """Scores less their mean, over their standard deviation, by cross-fitting in 5 folds."""
    fit, new, fold = fit[:, columns], new[:, columns], np.arange(len(fit)) % 5
    held_out = [make().fit(fit[fold != k]).score(fit[fold == k]) for k in range(5)]
    unseen = np.concatenate(held_out)
    return (make().fit(fit).score(new) - unseen.mean()) / unseen.std(ddof=1)


def test_terms_and_norms_score_by_the_smooth_maximum_of_the_two() -> None:
    fit, new = terms_and_norms(100), terms_and_norms(40, seed=1)
    terms = of_two(GaussianMixture, slice(0, 2), fit, new)
    norms = of_two(ShrunkGaussian, slice(2, None), fit, new)
    score = TermsAndNorms(2).fit(fit).score(new)
    np.testing.assert_allclose(score, np.logaddexp(terms, norms), rtol=1e-10)


def test_terms_that_are_all_too_normal_excuse_no_norm() -> None:
    density = TermsAndNorms(2).fit(terms_and_norms(300))
    usual = terms_and_norms(300, seed=1)
    odd = usual.copy()
    odd[:, :2] = usual[usual[:, 0] > -1e4 + 1.5, :2].mean(0)  # the middle of a component
    odd[:, 7] += 6 * usual[:, 7].std()
    assert (density.score(odd) > np.quantile(density.score(usual), 0.99)).all()


def test_terms_and_norms_without_terms_rank_as_the_norms_do() -> None:
    fit, new = correlated(100), correlated(40, seed=1)
    score = TermsAndNorms().fit(fit).score(new)
    assert np.array_equal(score.argsort(), ShrunkGaussian().fit(fit).score(new).argsort())


@pytest.mark.parametrize("column", [0, 1, 2, 7])
def test_either_a_term_or_a_norm_gives_a_sample_away(column: int) -> None:
    density = TermsAndNorms(2).fit(terms_and_norms(300))
    usual = terms_and_norms(300, seed=1)
    odd = usual[:5].copy()
    odd[:, column] -= 12 * usual[:, column].std()
    assert (density.score(odd) > np.quantile(density.score(usual), 0.99)).all()
    assert (density.contributions(odd).argmax(1) == column).all()


def test_terms_that_are_infinite_are_anomalous_beyond_all() -> None:
    density = TermsAndNorms(2).fit(terms_and_norms(100))
    odd = terms_and_norms(2, seed=1)
    odd[0, 0], odd[1, 0] = -np.inf, np.nan
    score = density.score(odd)
    assert np.isfinite(score[0])
    assert score[0] > 1e6
    assert np.isnan(score[1])


def test_terms_and_norms_are_all_in_their_state() -> None:
    fit, new = terms_and_norms(100), terms_and_norms(20, seed=1)
    density = TermsAndNorms(2, folds=4).fit(fit)
    loaded = TermsAndNorms().load_state({k: v.copy() for k, v in density.state().items()})
    assert np.array_equal(loaded.contributions(new), density.contributions(new))
    assert np.array_equal(loaded.fit(fit).score(new), density.score(new))


def test_features_without_a_norm_are_refused() -> None:
    density = TermsAndNorms(2).fit(terms_and_norms(100))
    with pytest.raises(ValueError, match="of 2 terms and of norms, got shape"):
        density.score(terms_and_norms(5)[:, :2])
