"""Parameters and operations of other kinds: sparse gradients, complex numbers, `torch.func`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.model_case import Case, Function, Gaussian
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms
from ood_monitor.gradients import gradient_norms, last_layers

TOKENS = torch.tensor([[0, 1, 1], [2, 4, 2], [3, 3, 3], [4, 0, 1]])
X = torch.linspace(-1, 1, 12).double().reshape(4, 3)


def looked_up(make: Callable[..., nn.Module], **options: Any) -> Case:
    net = nn.Sequential(make(5, 4, sparse=True, **options), nn.Tanh(), nn.Linear(4, 2))
    return Gaussian(net.double()), TOKENS


def function(forward: Callable[..., Tensor], **parts: Any) -> Case:
    net = Function(forward, f=nn.Linear(3, 3), out=nn.Linear(3, 2), **parts)
    return Gaussian(net.double()), X


def tied(m: Any, tokens: Tensor) -> Tensor:
    return m.table(tokens).tanh() @ m.table.weight.T


def spectral(m: Any, x: Tensor) -> Tensor:
    """As in Fourier neural operators: weights of frequencies."""
    return m.out(torch.fft.irfft(torch.fft.rfft(m.f(x).tanh()) * m.w, n=3))


def composed(m: Any, x: Tensor) -> Tensor:
    """A complex weight made of two real ones."""
    weight = torch.complex(m.a, m.b)
    return m.out(torch.view_as_real(m.f(x).tanh().to(weight.dtype) @ weight).sum(2))


def complex_linear(m: Any, x: Tensor) -> Tensor:
    return m.out(nn.functional.linear(m.f(x).to(m.w.dtype), m.w).abs())


def directional(m: Any, x: Tensor) -> Tensor:
    value, slope = torch.func.jvp(lambda y: m.f(y).tanh(), (x,), (torch.ones_like(x),))
    return m.out(value + slope)


def dual(m: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = m.f(forward_ad.make_dual(x, torch.ones_like(x))).tanh()
        value, slope = forward_ad.unpack_dual(y)
    return m.out(value + slope)


def vjp(m: Any, x: Tensor) -> Tensor:
    value, pull = torch.func.vjp(lambda y: m.f(y).tanh(), x)
    return m.out(pull(value)[0])


def jacobian(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.func.vmap(torch.func.jacfwd(lambda y: m.f(y).tanh()))(x).sum(2))


def weights(*shape: int) -> Tensor:
    numbers = torch.linspace(0.1, 1, 2 * torch.Size(shape).numel(), dtype=torch.float64)
    return numbers.reshape(*shape, 2)


CASES: dict[str, Callable[[], Case]] = {
    "a sparse embedding": lambda: looked_up(nn.Embedding),
    "a sparse embedding with padding": lambda: looked_up(nn.Embedding, padding_idx=1),
    "a sparse bag": lambda: looked_up(nn.EmbeddingBag, mode="sum"),
    "a sparse table used twice": lambda: (
        Gaussian(Function(tied, table=nn.Embedding(5, 4, sparse=True)).double()),
        TOKENS,
    ),
    "complex weights of frequencies": lambda: function(
        spectral, w=torch.view_as_complex(weights(2))
    ),
    "a complex weight that is not used": lambda: function(
        lambda m, x: m.out(m.f(x)), w=torch.view_as_complex(weights(2))
    ),
    "a complex linear map": lambda: function(
        complex_linear, w=torch.view_as_complex(weights(3, 3))
    ),
    "a complex weight of two real ones": lambda: function(
        composed, a=weights(3, 3)[..., 0], b=weights(3, 3)[..., 1]
    ),
    "jvp": lambda: function(directional),
    "dual numbers": lambda: function(dual),
    "vjp": lambda: function(vjp),
    "jacfwd": lambda: function(jacobian),
}


def alone(adapter: om.Adapter, batch: Any, granularity: str) -> dict[str, Tensor]:
    """By plain autograd, one sample at a time."""
    named, found = dict(adapter.module.named_parameters()), {}
    for i in range(len(batch)):
        ((term, value),) = checked_terms(adapter, batch[i : i + 1])
        gradients = torch.autograd.grad(value.sum(), list(named.values()), allow_unused=True)
        for (name, leaf), gradient in zip(named.items(), gradients, strict=True):
            dense = torch.zeros_like(leaf) if gradient is None else gradient.to_dense()
            squares = (dense.abs() if dense.is_complex() else dense).square()
            kept = {"tensor": (), "row": (0,), "column": (1,)}[granularity]
            rest = [d for d in range(squares.ndim) if d not in kept]
            norms = squares.sum(rest) if rest else squares
            is_one = granularity != "tensor" and not norms.ndim
            found.setdefault(f"{term}/{name}", []).append(norms[None] if is_one else norms)
    return {key: torch.stack(norms) for key, norms in found.items()}


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
# By forward-mode differentiation, of itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_norms_are_those_of_single_samples(make: Callable[[], Case], granularity: Any) -> None:
    torch.manual_seed(0)
    adapter, batch = make()
    expected = alone(adapter, batch, granularity)
    for _ in range(2):
        found = gradient_norms(adapter, batch, granularity=granularity)
        assert found.keys() == expected.keys()
        for key, norms in expected.items():
            torch.testing.assert_close(found[key], norms, rtol=1e-9, atol=1e-14, msg=key)


def test_complex_parameters_are_layers() -> None:
    adapter, batch = CASES["complex weights of frequencies"]()
    assert list(gradient_norms(adapter, batch, layers="w")) == ["log_likelihood/w"]
    assert last_layers(adapter, batch, 3) == ["w", "out.weight", "out.bias"]
