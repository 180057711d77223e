"""The boundary: nested batches, the checks of terms, and the messages for what is neither."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.foreign_cases import small_autoencoder
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import (
    Batch,
    batch_size,
    checked_range,
    checked_terms,
    describe,
    first_tensor,
    map_tensors,
    pieces,
    tensors_in,
)

Pair = namedtuple("Pair", ["image", "label"])

X, Y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
BATCHES: dict[str, Batch] = {
    "tensor": X,
    "list": [X, Y],
    "tuple": (X, Y),
    "dict": {"image": X, "label": Y},
    "ordered dict": OrderedDict(image=X, label=Y),
    "named tuple": Pair(X, Y),
    "nested": {"inputs": (X, [Y, {"mask": Y > 2}]), "text": "not a tensor", "scale": None},
}
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


class Yields(om.Adapter):
    """Yields what it was given."""

    def __init__(self, *terms: tuple[str, Any]) -> None:
        self.module, self._terms = nn.Linear(1, 1), terms

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        yield from self._terms


# Nested batches


@every_batch
def test_batch_size_is_the_leading_dimension(batch: Batch) -> None:
    assert batch_size(batch) == 5


@every_batch
def test_map_reaches_every_tensor_and_nothing_else(batch: Batch) -> None:
    mapped = map_tensors(lambda t: t[1:], batch)
    assert [t.tolist() for t in tensors_in(mapped)] == [t[1:].tolist() for t in tensors_in(batch)]
    assert isinstance(mapped, dict) or type(mapped) is type(batch)


def test_map_keeps_what_is_no_tensor() -> None:
    mapped = map_tensors(torch.zeros_like, BATCHES["nested"])
    assert (mapped["text"], mapped["scale"]) == ("not a tensor", None)


@every_batch
def test_map_leaves_the_batch_as_it_was(batch: Batch) -> None:
    before = [id(t) for t in tensors_in(batch)]
    map_tensors(torch.zeros_like, batch)
    assert [id(t) for t in tensors_in(batch)] == before


@every_batch
@pytest.mark.parametrize(("size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5)])
def test_pieces_are_consecutive(batch: Batch, size: int, sizes: list[int]) -> None:
    parts = list(pieces(batch, size))
    assert [batch_size(part) for part in parts] == sizes
    joined = [torch.cat(tensors) for tensors in zip(*map(tensors_in, parts), strict=True)]
    assert all(map(torch.equal, joined, tensors_in(batch)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.tensor(1.0),
            r"shape \(B, ...\), got a tensor of shape \(\) and dtype torch.float32",
        ),
        ([], r"got a list of 0 items"),
        ({"text": "a"}, r"got a mapping with keys \['text'\]"),
        ("text", "got str"),
        (None, "got NoneType"),
        ([X, torch.tensor(1.0)], "got a list of 2 items"),
        ((X, Y[:4]), r"one batch size in all tensors, got shapes \[\(5, 2\), \(4,\)\]"),
    ],
    ids=str,
)
def test_what_is_no_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_size(batch)


@pytest.mark.parametrize("batch", [X, [X, Y], (X, "label"), [X]], ids=describe)
def test_the_sample_is_what_a_batch_begins_with(batch: Batch) -> None:
    assert first_tensor(batch) is X


@pytest.mark.parametrize("batch", [{"image": X}, [], (), [[X]], "text"], ids=describe)
def test_a_batch_without_a_first_tensor_needs_inputs(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"Pass `inputs=` to say where the sample is\."):
        first_tensor(batch)


# Terms


def test_terms_come_through_in_order() -> None:
    terms = ("b", torch.ones(5)), ("a", torch.zeros(5))
    assert list(checked_terms(Yields(*terms), X)) == list(terms)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.tensor(1.0), r"\(\)"),
        (torch.ones(4), r"\(4,\)"),
        (torch.ones(5, 1), r"\(5, 1\)"),
        (1.0, "float"),
    ],
    ids=["sum", "other size", "column", "number"],
)
def test_a_term_must_be_one_value_a_sample(value: Any, got: str) -> None:
    adapter = Yields(("fine", torch.ones(5)), ("wrong", value))
    message = rf"'wrong' of Yields to be of shape \(5,\).*{got}.* for a batch of 5 samples\."
    with pytest.raises(ValueError, match=message):
        list(checked_terms(adapter, X))


def test_no_term_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected Yields to yield a term, got none"):
        list(checked_terms(Yields(), X))


def test_terms_of_one_name_are_refused() -> None:
    adapter = Yields(("twice", torch.ones(5)), ("twice", torch.zeros(5)))
    with pytest.raises(ValueError, match="twice"):
        list(checked_terms(adapter, X))


def test_a_slash_in_a_terms_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name without '/', got 'latent/1'"):
        list(checked_terms(Yields(("latent/1", torch.ones(5))), X))


def test_terms_are_asked_for_one_by_one() -> None:
    asked = []

    class Lazy(om.Adapter):
        module = nn.Linear(1, 1)

        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
            for term in "ab":
                asked.append(term)
                yield term, torch.ones(5)

    terms = checked_terms(Lazy(), X)
    next(terms)
    assert asked == ["a"]


def test_an_adapter_is_a_module_and_a_method() -> None:
    assert om.Adapter.__abstractmethods__ == {"log_likelihood"}
    with pytest.raises(TypeError, match="abstract"):
        om.Adapter()  # type: ignore[abstract]


MAKE: dict[str, Callable[[], om.Adapter]] = {
    "likelihood": lambda: om.LogLikelihood(Module()),
    "elbo": lambda: om.ELBO(Module()),
    "denoising": lambda: om.DenoisingBound(Module(), torch.linspace(0.9, 0.1, 9), levels=[1]),
    "sequence": lambda: om.SequenceLikelihood(Module()),
}


class Module(nn.Module):
    """All that the four adapters ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.linear(x).square().sum(1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.zeros_like(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.linear(z)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.linear(x) if x.is_floating_point() else self.linear.weight[x]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_values_and_the_random_state_do_not_depend_on_each_other(
    make: Callable[[], om.Adapter],
) -> None:
    adapter = make()
    batch = (X > 4).long() if isinstance(adapter, om.SequenceLikelihood) else X
    before = torch.get_rng_state()
    first = [value.tolist() for _, value in checked_terms(adapter, batch)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert [value.tolist() for _, value in checked_terms(adapter, batch)] == first


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_samples_come_from_anywhere_in_a_batch(make: Callable[[], om.Adapter]) -> None:
    adapter = make()
    batch = (X > 4).long() if isinstance(adapter, om.SequenceLikelihood) else X
    expected = dict(checked_terms(adapter, batch))
    adapter._inputs = lambda batch: batch["deep"][1]  # type: ignore[attr-defined]
    found = dict(checked_terms(adapter, {"deep": ["text", batch]}))
    assert all(torch.equal(found[term], expected[term]) for term in expected)


def network_of_images() -> nn.Module:
    network = nn.Conv2d(1, 1, 1)
    network.forward = lambda x, t: network._conv_forward(x, network.weight, None)  # type: ignore[method-assign]
    return network


#: Every adapter that takes real numbers.
OF_REAL_NUMBERS: dict[str, Callable[[], om.Adapter]] = {
    "flow": lambda: om.LogLikelihood(om.models.Glow(1, 4, levels=1, steps=1, hidden=4)),
    "bytes of a flow": lambda: om.LogLikelihood(
        om.models.Glow(1, 4, levels=1, steps=1, hidden=4), bins=256
    ),
    "autoencoder": lambda: om.ELBO(small_autoencoder()),
    "denoiser": lambda: om.DenoisingBound(
        network_of_images(), torch.linspace(0.9, 0.1, 10), levels=[1]
    ),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("name", OF_REAL_NUMBERS)
def test_whole_numbers_are_refused_with_what_to_do(name: str, dtype: torch.dtype) -> None:
    batch = torch.ones(2, 1, 4, 4, dtype=dtype)
    with pytest.raises(ValueError, match=r"Expected floating-point samples, got .* / 255"):
        list(checked_terms(OF_REAL_NUMBERS[name](), batch))


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.5, 1.01)])
def test_a_value_outside_a_range_is_found_beside_one_that_is_no_number(
    low: float, high: float
) -> None:
    x = torch.tensor([low, torch.nan, high])
    with pytest.raises(ValueError, match=f"got values from {low:.4g} to {high:.4g}"):
        checked_range(x, 0, 1, "a test")
    assert checked_range(torch.tensor([0.0, torch.nan, 1.0]), 0, 1, "a test") is not None
