"""Whose row it is, from the gradients of two passes."""

import pytest
import torch
from torch import Tensor

from ood_monitor.gradients.owners import Owners, Weighted, weights_of

N = 8


def passes(parts: Tensor, count: int = 1) -> tuple[Tensor, list[Weighted]]:
    """What passes bring to rows of which each sample asks ``parts``, shape (U, n, width)."""
    every = [weights_of(parts.shape[1], number).to(parts) for number in range(1, count + 1)]
    weighted = [Weighted(torch.einsum("n,und->ud", w, parts), w) for w in every]
    return parts.sum(1), weighted


def of_one(own: list[int], width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    parts = torch.zeros(len(own), N, width, dtype=torch.float64)
    for row, i in enumerate(own):
        parts[row, i] = torch.randn(width, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, ())
    return parts.to(dtype)


OWN = [5, 0, 0, 7, 3, 3, 3, 1]


@pytest.mark.parametrize("n", [2, 3, 32, 1000])
def test_weights_are_apart_and_between_one_and_two(n: int) -> None:
    for number in (1, 2):
        weights = weights_of(n, number)
        assert weights.min() >= 1
        assert weights.max() <= 2
        assert weights.sort().values.diff().min() >= 0.5 / n
        assert (weights - weights.mean()).abs().min() > 0.1 / n
        assert torch.equal(weights, weights_of(n, number))
    assert not torch.allclose(weights_of(n, 1), weights_of(n, 2))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_one_sample_each(width: int, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    found = Owners.found(*passes(of_one(OWN, width, dtype), count))
    assert found is not None
    assert found.of_row.tolist() == OWN


def test_rows_without_a_gradient_are_anyones() -> None:
    parts = of_one(OWN)
    parts[2] = 0
    for count in (1, 2):
        found = Owners.found(*passes(parts, count))
        assert found is not None
        assert [o for i, o in enumerate(found.of_row.tolist()) if i != 2] == [5, 0, 7, 3, 3, 3, 1]
    assert Owners.found(*passes(torch.zeros_like(parts))) is not None


def shared(*shares: float) -> Tensor:
    """A further row, of as many samples, whose parts are parallel."""
    parts = torch.zeros(1, N, 3, dtype=torch.float64)
    for i, share in enumerate(shares):
        parts[0, i] = share * torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    return parts


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, torch.float64), (1e-9, torch.float64), (1.0, torch.float32), (1e-4, torch.float32)],
)
@pytest.mark.parametrize(
    "row",
    [shared(1, 1), shared(1, 0.01), shared(1, -1), shared(*[1] * N), shared(2, -1), shared(3, 1)],
    ids=["equal", "unequal", "cancelling", "of all", "of other signs", "in parts"],
)
def test_a_row_of_several_samples_is_refused(row: Tensor, scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rest = of_one(OWN).sign()
    for count in (1, 2):
        assert Owners.found(*passes(torch.cat([rest, scale * row]).to(dtype), count)) is None


def test_the_mean_of_two_weights_may_be_a_third_in_single_precision() -> None:
    parts = torch.zeros(1, 32, 1)
    parts[0, [4, 15]] = 1
    g, weighted = passes(parts, 2)
    once = Owners.found(g, weighted[:1])
    assert once is not None
    assert once.of_row.tolist() == [30]
    assert not once.certain
    assert Owners.found(g, weighted) is None


def test_weights_that_rounding_put_together_tell_no_owner() -> None:
    parts = torch.eye(200)[:, :, None]
    g, (weighted,) = passes(parts)
    assert Owners.found(g, [weighted]) is not None
    rounded = weighted.weights.bfloat16().float()
    assert Owners.found(g, [Weighted(rounded[:, None], rounded)]) is None


def test_what_is_not_finite_has_no_owner() -> None:
    for value in (torch.nan, torch.inf):
        parts = of_one(OWN)
        parts[1, 0] = value
        assert Owners.found(*passes(parts)) is None


def test_rows_that_rounding_has_reached_need_another_pass() -> None:
    torch.manual_seed(0)
    g, (first, *others) = passes(of_one(OWN).sign().float(), 3)
    rounded = Weighted(first.g * (1 + 1e-4 * torch.rand_like(first.g)), first.weights)
    once = Owners.found(g, [rounded])
    twice = Owners.found(g, [rounded, *others[:1]])
    thrice = Owners.found(g, [rounded, *others])
    assert once is not None
    assert twice is not None
    assert thrice is not None
    assert (once.certain, twice.certain, thrice.certain) == (False, False, True)
    further = Weighted(first.g * (1 + 1e-1 * torch.rand_like(first.g)), first.weights)
    assert Owners.found(g, [further]) is None


def test_rows_of_rounding_alone_do_not_matter() -> None:
    torch.manual_seed(0)
    rest, noise = of_one(list(range(N))).sign(), 1e-15 * shared(1, 1)
    assert Owners.found(*passes(torch.cat([rest, noise]))) is not None
    least = rest.clone()
    least[3] *= 1e-15  # all that sample 3 has: beside it nothing is rounding
    assert Owners.found(*passes(torch.cat([least, noise]))) is None
    assert Owners.found(*passes(torch.cat([rest[2:], noise]))) is None  # all that two of them have


def test_half_precision_tells_no_owner() -> None:
    assert Owners.found(*passes(of_one(OWN).bfloat16())) is None
