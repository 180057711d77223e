"""Columns of a forward pass: which are live, on which scale."""

import math

import numpy as np
import pytest

from ood_monitor.densities import Array
from ood_monitor.densities.columns import Columns, Floor, clipped
from ood_monitor.densities.measurements import Measurements, Table

EPS = float(np.finfo(np.float32).eps)


def normal(n: int = 1001, f: int = 3) -> Array:
    return np.random.default_rng(0).normal(size=(n, f)) * [1.0, 5.0, 0.1] + [0.0, 100.0, -3.0]


def of(values: Array) -> Measurements:
    table = Table(tuple("abcdefg"[: values.shape[1]]), values)
    return Measurements(("t",), values[:, :1], {"values": table})


def fitted(values: Array, rule: Floor | None = None) -> Columns:
    return Columns.fit("values", of(values).tables["values"], EPS, rule)


def scale_of(x: Array) -> float:
    """By the definition."""
    ordered, centre = sorted(x), np.median(x)
    deviation = 1.4826 * float(np.median([abs(v - centre) for v in x]))
    low, high = math.ceil(0.01 * (len(x) - 1)), math.floor(0.99 * (len(x) - 1))
    return max(deviation, (ordered[high] - ordered[low]) / 4.6527)


def test_a_column_is_centred_by_its_median_and_has_a_robust_scale() -> None:
    values = np.column_stack([normal(), np.random.default_rng(1).standard_t(2, size=1001)])
    found = fitted(values)(of(values))
    for column, x in zip(found.T, values.T, strict=True):
        np.testing.assert_allclose(column, (x - np.median(x)) / scale_of(x))


def test_one_broken_sample_of_few_moves_no_scale() -> None:
    values, broken = normal(40), normal(40)
    broken[7, 0] = 1e6
    sound, other = fitted(values), fitted(broken)
    np.testing.assert_allclose(other.scale, sound.scale, rtol=0.2)


def test_one_broken_sample_moves_no_scale() -> None:
    values, broken = normal(), normal()
    broken[7, 0] = 1e6
    sound, other = fitted(values), fitted(broken)
    np.testing.assert_allclose(other.scale, sound.scale, rtol=0.01)
    assert clipped(other(of(broken)))[7, 0] == 10
    assert other(of(broken))[7, 0] > 1e5  # it is scored as it is


def test_a_column_of_which_most_values_are_one_is_scaled_by_its_standard_deviation() -> None:
    values = np.zeros((100, 1))
    values[:1] = 3.0
    assert fitted(values).scale == pytest.approx(values.std())


@pytest.mark.parametrize(
    ("rule", "added"),
    [("median", lambda s: 0.01 * np.median(s)), ("mean", lambda s: 0.1 * np.mean(s))],
)
def test_sums_of_squares_become_logarithms_above_a_floor(rule: Floor, added: object) -> None:
    sums = np.random.default_rng(0).chisquare(1, size=(500, 2)) * [1.0, 1e-6]
    columns = fitted(sums, rule)
    logs = np.log(sums + [added(s) for s in sums.T])  # type: ignore[operator]
    expected = (logs - np.median(logs, 0)) / [scale_of(x) for x in logs.T]
    np.testing.assert_allclose(columns(of(sums)), expected)


def test_a_dead_channel_says_nothing_loud() -> None:
    """Without the floor, a sum that is zero in a sample would be infinitely far."""
    sums = np.random.default_rng(0).chisquare(3, size=(500, 1))
    columns = fitted(sums, "median")
    assert abs(columns(of(np.zeros((1, 1))))[0, 0]) < 10


def test_what_says_nothing_is_left_out_and_told() -> None:
    values = np.column_stack([normal(f=3)[:, 0], np.full(1001, 4.0), np.zeros(1001)])
    values = np.column_stack([values, normal()[:, 0]])
    values[3, 3] = np.inf
    columns = fitted(np.abs(values), "median")
    assert columns.dropped == {"b": "constant", "c": "not called", "d": "not finite"}
    assert columns.names == ("a",)
    assert columns(of(np.abs(values))).shape == (1001, 1)


def test_a_layer_that_few_samples_call_has_a_floor() -> None:
    sums = np.where(np.arange(100)[:, None] < 20, 5.0 + np.arange(100)[:, None], 0.0)
    found = fitted(sums, "median")(of(sums))
    assert np.isfinite(found).all()
    assert (found[:20] > found[20:].max()).all()


def test_no_column_that_varies_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected columns that vary, got none: .*'constant': 1"):
        fitted(np.ones((10, 1)))


def test_other_columns_than_fitted_are_refused() -> None:
    columns = fitted(normal())
    with pytest.raises(ValueError, match="Expected the 3 columns that the detector was fitted on"):
        columns(of(normal()[:, :2]))


def test_infinite_values_count_as_far_and_nan_stays() -> None:
    columns = fitted(normal())
    row = np.array([[np.inf, -np.inf, np.nan]])
    found = columns(of(row))[0]
    assert found[0] == 1e100
    assert found[1] == -1e100
    assert np.isnan(found[2])
