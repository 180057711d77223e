"""Parts of a detector and their combination."""

import logging
import math

import numpy as np
import pytest
from scipy.stats import rankdata

from ood_monitor.densities import Array, DiagonalGaussian
from ood_monitor.densities.joined import Joined, Tail, minimum_samples
from ood_monitor.densities.measurements import Measurements, Table
from ood_monitor.densities.parts import KINDS, Kind, Part

EPS = float(np.finfo(np.float32).eps)
GENERATOR = np.random.default_rng


def measured(n: int = 200, seed: int = 0, shift: float = 0.0) -> Measurements:
    """Values, expected norms and gradient norms of samples; a shift moves all of them."""
    generator = GENERATOR(seed)

    def columns(names: tuple[str, ...]) -> Array:
        return generator.normal(size=(n, len(names))) + shift

    norms, layers = ("t/a", "t/b"), tuple(f"layer[{j}]" for j in range(4))
    tables = {
        "values": Table(("t.expected", "t.surprise"), columns(("", ""))),
        "map": Table(("t.expected[0,0]",), columns(("",))),
        "expected_norms": Table(layers, np.exp(columns(layers))),
        "log_likelihood": Table(("total",), columns(("",))),
        "gradient_norms": Table(norms, np.exp(columns(norms))),
        "channel_norms": Table(norms, np.exp(columns(norms))),
        "output_layer": Table(layers, np.exp(columns(layers))),
        "energies": Table(layers, columns(layers)),
        "condition": Table(("t=500",), columns(("",))),
        "own_calls": Table(layers, columns(layers)),
    }
    return Measurements(("t", "u"), columns(("t", "u")), tables)


def between(known: list[float], s: float) -> float:
    """The p-value of a score among known ones, linear between two of them."""
    if s <= known[0]:
        return 1.0
    low = max(i for i, score in enumerate(known) if score < s)
    ends = [
        (1 + sum(score >= known[i] for score in known)) / (len(known) + 1) for i in (low, low + 1)
    ]
    share = (s - known[low]) / (known[low + 1] - known[low])
    return ends[0] + share * (ends[1] - ends[0])


def auroc(normal: Array, odd: Array) -> float:
    ranks = rankdata(np.concatenate([normal, odd]))[len(normal) :]
    return float((ranks.mean() - (len(odd) + 1) / 2) / len(normal))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_part_has_its_own_density_s_score(kind: Kind) -> None:
    fit, new = measured(), measured(seed=1)
    joined = Joined.fit([Part(kind)], fit, EPS)
    part = joined.parts[0]
    np.testing.assert_array_equal(joined.score(new), part.density.score(part.columns(new)))
    np.testing.assert_allclose(joined.contributions(joined.features(new)).sum(1), joined.score(new))
    assert joined.contributions(joined.features(new)).shape == (200, len(joined.names))


def test_joined_parts_score_by_p_values_of_samples_that_they_were_not_fitted_on() -> None:
    """By the definition, in loops."""
    fit, new = measured(100), measured(30, seed=1, shift=1.0)
    parts = [Part("values"), Part("expected_norms")]
    expected = np.zeros(30)
    for part in parts:
        unseen = np.empty(100)
        for fold in range(5):
            others = [i for i in range(100) if i % 5 != fold]
            fitted = part.fit(fit.take(others), EPS)
            for i in range(fold, 100, 5):
                unseen[i] = fitted.score(fit.take([i]))[0]
        u, known = np.quantile(unseen, 0.9), sorted(unseen)
        b = np.median([s - u for s in unseen if s > u]) / math.log(2)
        for i, s in enumerate(part.fit(fit, EPS).score(new)):
            expected[i] -= math.log(between(known, min(s, u))) - max(s - u, 0) / b
    found = Joined.fit(parts, fit, EPS)
    np.testing.assert_allclose(found.score(new), expected)
    np.testing.assert_allclose(found.contributions(found.features(new)).sum(1), expected)


def test_one_broken_fit_sample_silences_no_part() -> None:
    """By a mean excess it would: .999 to .835 in the reference."""
    sound, odd = measured(1000, seed=1), measured(300, seed=2, shift=1.5)
    broken = measured(600)
    broken.tables["values"].values[11, 0] = 1e6
    parts = [Part("values"), Part("expected_norms")]
    found = [Joined.fit(parts, fit, EPS) for fit in (measured(600), broken)]
    clean, with_broken = (auroc(it.score(sound), it.score(odd)) for it in found)
    assert clean > 0.9
    assert with_broken > clean - 0.01


def test_few_scores_are_ranked_alone() -> None:
    tail = Tail(np.sort(GENERATOR(0).normal(size=30)))
    assert tail.scale == 0  # three scores are above the .9 quantile
    np.testing.assert_allclose(tail.log_p(np.array([-9.0, 9.0])), np.log([1.0, 1 / 31]))


def test_a_score_that_is_no_number_stays_none() -> None:
    tail = Tail(np.sort(GENERATOR(0).normal(size=300)))
    assert np.isnan(tail.log_p(np.array([np.nan]))).all()
    assert np.isnan(tail.parts(np.full((1, 3), np.nan))).all()


def test_further_out_is_always_more_anomalous() -> None:
    tail = Tail(np.sort(GENERATOR(0).normal(size=500)))
    scores = np.linspace(-4, 40, 2000)
    assert (np.diff(tail.log_p(scores)) <= 0).all()
    assert (np.diff(tail.log_p(scores[scores > tail.start])) < 0).all()


def test_a_little_of_a_score_is_a_little_of_the_joined_one() -> None:
    """A step at every known score would turn rounding into other p-values."""
    known = np.sort(GENERATOR(0).normal(size=500))
    tail = Tail(known)
    nearby = [tail.log_p(known + by) for by in (-1e-9, 1e-9)]
    np.testing.assert_allclose(*nearby, atol=1e-5)


def test_a_part_that_says_nothing_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    fit = measured()
    fit.tables["values"].values[:, 1] = 3.0
    with caplog.at_level(logging.WARNING):
        joined = Joined.fit([Part("values"), Part("expected_norms")], fit, EPS)
    assert [part.kind for part in joined.parts] == ["expected_norms"]
    assert "goes without its part 'values'" in caplog.text
    with pytest.raises(ValueError, match="Expected at least 2 columns that vary"):
        Joined.fit([Part("values")], fit, EPS)


def test_a_part_takes_a_density_of_one_s_own() -> None:
    joined = Joined.fit([Part("expected_norms", DiagonalGaussian())], measured(), EPS)
    assert isinstance(joined.parts[0].density, DiagonalGaussian)


def test_parts_that_are_fitted_are_left_as_they_were() -> None:
    part = Part("expected_norms")
    part.fit(measured(), EPS)
    assert not hasattr(part.density, "_mean")


def test_joined_parts_take_more_samples() -> None:
    assert minimum_samples([Part("values")]) == 3
    assert minimum_samples([Part("values"), Part("expected_norms")]) == 10
    assert minimum_samples([Part("values"), Part("gradient_norms")]) == 19


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a part of .*, got 'norms'"):
        Part("norms")  # type: ignore[arg-type]


def test_a_floor_is_of_sums_of_squares_alone() -> None:
    with pytest.raises(ValueError, match="Expected no floor of 'values'"):
        Part("values", floor="mean")
