"""Columns against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from ood_monitor.adapters.elements import Elements
from ood_monitor.statistics.surprise import surprise_map, value_columns

X = torch.rand(5, 1, 6, 8).round()
LOGITS = 3 * torch.randn(5, 1, 6, 8, dtype=torch.float64)
P = LOGITS.sigmoid()


def bernoulli(counted: Tensor | None = None, *, mean: bool = False) -> Elements:
    log_prob = X.double() * P.log() + (1 - X.double()) * (1 - P).log()
    entropy = -(P * P.log() + (1 - P) * (1 - P).log())
    # Of both values: || onehot - p ||^2 is twice (x - p)^2.
    pair = 2 * (X - P).square(), 2 * P * (1 - P)
    return Elements(log_prob, lambda: -entropy, lambda: pair, counted, mean, axes=(2, 3))


def test_columns_of_an_image_are_sums() -> None:
    found = value_columns({"x": bernoulli(), "kl": torch.arange(5.0)}, by_element=False)
    entropy = -(P * P.log() + (1 - P) * (1 - P).log()).flatten(1).sum(1)
    surprise = ((X - P) * LOGITS).flatten(1).sum(1)
    expected = {
        "x.expected": -entropy,
        "x.surprise": surprise,
        "x.quadratic": (2 * (X - P) ** 2).flatten(1).sum(1).log(),
        "x.expected_quadratic": (2 * P * (1 - P)).flatten(1).sum(1).log(),
        "kl": torch.arange(5.0).double(),
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, msg=name)
    total = bernoulli().total()
    torch.testing.assert_close(found["x.expected"] + found["x.surprise"], total)


@pytest.mark.parametrize("mean", [False, True])
def test_columns_of_a_sequence_are_means_over_what_counts(mean: bool) -> None:
    counted = torch.rand(5, 1, 6, 8) < 0.5
    counted[1] = False
    counted[1, 0, 0, :3] = True
    number = counted.flatten(1).sum(1)
    whole = value_columns({"x": bernoulli(counted)}, by_element=False)
    found = value_columns({"x": bernoulli(counted, mean=mean), "y": number}, by_element=True)
    torch.testing.assert_close(found["log_length"], number.double().log())
    assert found["log_length"][1] == math.log(3)
    for name in ("x.expected", "x.surprise"):
        torch.testing.assert_close(found[name], whole[name] / number)
    for name in ("x.quadratic", "x.expected_quadratic"):
        torch.testing.assert_close(found[name], whole[name] - number.log())


def test_a_term_that_is_a_mean_has_columns_that_add_up_to_it() -> None:
    value = bernoulli(torch.rand(5, 1, 6, 8) < 0.5, mean=True)
    found = value_columns({"x": value}, by_element=False)
    torch.testing.assert_close(found["x.expected"] + found["x.surprise"], value.total())


def test_what_does_not_count_may_be_anything() -> None:
    counted = torch.ones(5, 4, dtype=torch.bool)
    counted[2, 1:] = False
    log_prob = torch.where(counted, -1.0, torch.nan)
    expected = torch.where(counted, -2.0, -torch.inf)
    found = value_columns({"x": Elements(log_prob, expected, counted=counted)}, by_element=False)
    assert found["x.expected"].tolist() == [-8, -8, -2, -8, -8]
    assert found["x.surprise"].tolist() == [4, 4, 1, 4, 4]


def test_elements_without_an_expectation_are_their_sum() -> None:
    value = Elements(torch.arange(6.0).view(2, 3))
    assert {k: v.tolist() for k, v in value_columns({"x": value}, by_element=False).items()} == {
        "x": [3, 12]
    }


def test_elements_apart_have_a_column_each() -> None:
    value = Elements(torch.arange(6.0).view(2, 3), apart=True)
    found = value_columns({"log_det": value}, by_element=True)
    assert {name: v.tolist() for name, v in found.items()} == {
        "log_det[0]": [0, 3],
        "log_det[1]": [1, 4],
        "log_det[2]": [2, 5],
    }


def test_a_sum_of_zero_has_a_logarithm() -> None:
    zero = torch.zeros(2, 3)
    value = Elements(zero, zero, lambda: (zero, zero))
    found = value_columns({"x": value}, by_element=False)
    assert found["x.quadratic"].isfinite().all()
    assert (found["x.quadratic"] < -700).all()


def test_sums_are_taken_in_double_precision() -> None:
    log_prob = torch.full((1, 10_000), -0.1)
    found = value_columns({"x": Elements(log_prob, log_prob)}, by_element=False)
    exact = log_prob.double().sum(1)
    assert torch.equal(found["x.expected"], exact)
    assert found["x.surprise"].item() == 0


ONES = torch.ones(5, 3)


def test_a_sample_that_is_not_finite_has_columns_that_are_not() -> None:
    log_prob, expected = ONES.clone(), ONES.clone()
    log_prob[2, 1] = expected[2, 1] = torch.nan
    found = value_columns({"x": Elements(log_prob, expected)}, by_element=False)
    assert found["x.expected"].isfinite().tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("shape", [(6, 8), (4, 4), (5, 7), (2, 9), (16, 16)])
@pytest.mark.parametrize("axes", [(2, 3), (1, 2)])
def test_the_map_is_a_sum_over_places(shape: tuple[int, int], axes: tuple[int, int]) -> None:
    h, w = shape
    expected = torch.randn(5, 3, h, w)
    given = expected if axes == (2, 3) else expected.permute(0, 2, 3, 1)
    found = surprise_map({"x": Elements(torch.zeros_like(given), lambda: given, axes=axes)})
    rows, columns = min(4, h), min(4, w)
    assert len(found) == rows * columns
    sums = torch.zeros(5, rows, columns, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            sums[:, i * rows // h, j * columns // w] += expected[:, :, i, j].double().sum(1)
    for i in range(rows):
        for j in range(columns):
            torch.testing.assert_close(found[f"x.expected[{i},{j}]"], sums[:, i, j])


def test_terms_without_places_have_no_map() -> None:
    terms = {
        "sum": ONES.sum(1),
        "row": Elements(ONES, ONES),
        "sequence": Elements(ONES, ONES, axes=(1,)),
        "constant": Elements(ONES[:, None], axes=(1, 2)),
    }
    assert surprise_map(terms) == {}
