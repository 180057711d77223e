"""The baselines against their formulas."""

import numpy as np
import pytest

from ood_monitor.baselines import LowLikelihood, TotalNorm, Typicality

VALUES = np.array([-10.0, -12.0, -20.0, -2.0])


def test_low_likelihood_is_anomalous() -> None:
    score = LowLikelihood().fit(VALUES).score(VALUES)
    assert score.tolist() == [10.0, 12.0, 20.0, 2.0]


def test_typicality_is_the_distance_from_the_mean_of_the_fit() -> None:
    assert Typicality().fit(VALUES).score(VALUES - 1.0).tolist() == [0.0, 2.0, 10.0, 8.0]


@pytest.mark.parametrize("size", [3.0, -1000.0, 1000.0], ids="log norm {:+.0f}".format)
def test_total_norm_is_the_log_of_the_sum(size: float) -> None:
    squared_norms = np.random.default_rng(0).uniform(0.1, 5.0, (7, 4))
    score = TotalNorm().fit(squared_norms).score(np.log(squared_norms) + size)
    np.testing.assert_allclose(score, [np.log(sum(row)) + size for row in squared_norms])


@pytest.mark.parametrize("baseline", [LowLikelihood, Typicality])
def test_score_is_one_number_a_sample(baseline: type) -> None:
    given = VALUES.copy()
    assert baseline().fit(VALUES).score(VALUES[:3]).shape == (3,)
    assert np.array_equal(VALUES, given)


def test_typicality_must_be_fitted() -> None:
    with pytest.raises(RuntimeError, match="fitted"):
        Typicality().score(VALUES)
