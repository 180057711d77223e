"""What is a layer, and what is none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Function, Gaussian
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ood_monitor as om
from ood_monitor.statistics import expected_layers, forward_statistics, input_dimensions


class Attend(nn.Module):
    """Attention without weights of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


class SelfAttend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class Norm(nn.Module):
    """A norm that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.weight


class WithActivation(nn.Linear):
    """A layer with a part that has no parameters."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class LowRank(nn.Linear):
    """A layer whose weight is a sum, as an adapted one's."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clone(), self.weight + self.up @ self.down, self.bias)


class Quantising(nn.Linear):
    """A layer that rounds what it is given, by rows."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / scale).round() * scale, self.weight, self.bias)


class Hyper(nn.Module):
    """A map whose weights are an argument."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


def weights_as_argument(m: Any, x: Tensor) -> Tensor:
    return m.out(m.part(x, m.w))  # type: ignore[no-any-return]


def only(make: Callable[[], nn.Module]) -> Any:
    return lambda: (Function(lambda m, x: m.part(x), part=make()), ["part"])


def none_of(make: Callable[[], nn.Module], times: int = 1) -> Any:
    """The part is none, what comes before it is one."""
    parts = {"before": nn.Linear(4, 4)}
    return lambda: (
        Function(lambda m, x: m.part(*[m.before(x)] * times), part=make(), **parts),
        ["before"],
    )


CASES: dict[str, Callable[[], tuple[nn.Module, list[str]]]] = {
    "linear": only(lambda: nn.Linear(4, 4)),
    "with-activation": only(WithActivation),
    "low-rank": only(LowRank),
    "quantising": only(lambda: Quantising(4, 4)),
    "bilinear-of-one": none_of(lambda: nn.Bilinear(4, 4, 4), 2),
    "attention": none_of(Attend, 3),
    "self-attention": none_of(SelfAttend),
    "norm": none_of(Norm),
    "layer-norm": none_of(lambda: nn.LayerNorm(4)),
    "heads": lambda: (
        Function(
            lambda m, x: m.out(m.part(x, x, x, need_weights=False)[0]),
            part=nn.MultiheadAttention(4, 2, batch_first=True),
            out=nn.Linear(4, 4),
        ),
        ["out"],
    ),
    "weights-as-argument": lambda: (
        Function(weights_as_argument, part=Hyper(), out=nn.Linear(4, 4), w=torch.ones(4, 4)),
        ["out"],
    ),
    "shared-module": lambda: (
        nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer),
        ["0"],
    ),
    "upsampling": none_of(lambda: nn.Upsample(scale_factor=2, mode="linear")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_are_found_by_what_they_compute(case: str) -> None:
    torch.manual_seed(0)
    module, expected = CASES[case]()
    found = expected_layers(Gaussian(module.eval()), torch.randn(3, 5, 4))
    assert list(found) == expected


def test_an_embedding_is_none() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    assert expected_layers(Gaussian(module), torch.randint(7, (3, 5))) == {"1": 4}


def test_a_convolution_of_a_single_image_without_a_batch_is_none() -> None:
    module = Function(
        lambda m, x: m.out(torch.stack([m.conv(image) for image in x]).flatten(1)),
        conv=nn.Conv2d(3, 3, 1),
        out=nn.Linear(12, 2),
    )
    assert expected_layers(Gaussian(module), torch.randn(3, 3, 2, 2)) == {"out": 12}


def test_layers_come_in_module_order_with_at_most_32_groups() -> None:
    module = Function(
        lambda m, x: m.a(m.b(x)), a=nn.Linear(100, 4), b=nn.Linear(4, 100), c=nn.Linear(4, 4)
    )
    assert list(expected_layers(Gaussian(module), torch.randn(3, 4)).items()) == [
        ("a", 32),
        ("b", 4),
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # by the compiler, of itself
def test_a_compiled_function_in_a_pass_changes_nothing() -> None:
    def forward(m: Any, x: Tensor, *, middle: Any) -> Tensor:
        return m.out(middle(m.before(x)))

    def middle(h: Tensor) -> Tensor:
        return 2 * h.tanh() + h

    parts = {"before": nn.Linear(6, 8), "out": nn.Linear(8, 6)}
    compiled = torch.compile(middle, backend="eager")
    plain, other = (
        Gaussian(Function(partial(forward, middle=each), **parts).double())
        for each in (middle, compiled)
    )
    x = torch.randn(3, 6).double()
    assert expected_layers(plain, x) == expected_layers(other, x) == {"before": 6, "out": 8}
    found, expected = (forward_statistics(a, x, sample="row") for a in (other, plain))
    torch.testing.assert_close(found.expected_norms, expected.expected_norms)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


DIMENSIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5), {"weight": 1}),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), {"weight": 0}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), (4, 5, 5), {"weight": 0}),
    "scaled": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        (4,),
        {
            "parametrizations.weight.original0": 1,
            "parametrizations.weight.original1": 1,
        },
    ),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_input_channels_are_where_the_weight_has_them(name: str) -> None:
    make, shape, dimensions = DIMENSIONS[name]
    adapter = Gaussian(nn.Sequential(make(), nn.Flatten()))
    found = input_dimensions(adapter, torch.randn(2, *shape))
    assert {key.split("0.", 1)[1]: value for key, value in found.items()} == dimensions


@pytest.mark.parametrize("first", ["head", "embedding"])
def test_a_tied_weight_has_its_first_name(first: str) -> None:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embedding.weight
    parts = {"embedding": embedding, "head": head}
    ordered = dict(sorted(parts.items(), key=lambda item: item[0] != first))
    network = Function(lambda m, x: m.head(m.embedding(x).tanh()), **ordered)
    found = input_dimensions(om.SequenceLikelihood(network), torch.randint(9, (3, 4)))
    assert [name.split(".")[-2] for name in found] == [first]
    assert set(found.values()) == {1}
