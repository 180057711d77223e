"""Contractions of a parameter with data against autograd, one sample at a time."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from support.model_case import Function
from support.reference import gradients
from torch import Tensor

import ood_monitor as om
from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.factors import Granularity, norms_of_gradient
from ood_monitor.gradients.fast import Recorded, recorded_norms
from ood_monitor.gradients.views import order_of
from ood_monitor.modules import scored

B, T, H, D, E = 6, 3, 2, 4, 5

#: Forms of (w, x) with the parameter's shape and that of a batch.
Form = tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]

FORMS: dict[str, Form] = {
    "x @ W": (lambda w, x: x @ w, (D, E), (B, T, D)),
    "x @ v": (lambda w, x: x @ w, (D,), (B, T, D)),
    "x @ v, a row": (lambda w, x: torch.mv(x, w), (D,), (B, D)),
    "x @ heads": (lambda w, x: x.unsqueeze(1) @ w, (H, D, E), (B, T, D)),
    "x @ W, of one row": (lambda w, x: x @ w, (1, E), (B, 1)),
    "x @ W, of one column": (lambda w, x: x @ w, (D, 1), (B, T, D)),
    "W @ x": (lambda w, x: w @ x, (E, T), (B, T, D)),
    "W @ x, samples last": (lambda w, x: (w @ x.T).T, (E, D), (B, D)),
    "heads @ x": (lambda w, x: torch.matmul(w, x), (H, E, T), (B, H, T, D)),
    "a head for all": (lambda w, x: torch.matmul(w, x), (1, E, T), (B, H, T, D)),
    "v @ x": (lambda w, x: w @ x, (T,), (B, T, D)),
    "reflected": (lambda w, x: Tensor.__rmatmul__(w, x), (D, E), (B, D)),
    "bmm": (lambda w, x: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (T, D, E), (B, T, D)),
    "bmm, left": (lambda w, x: w.bmm(x.permute(1, 2, 0)).permute(2, 0, 1), (T, E, D), (B, T, D)),
    "mm": (lambda w, x: torch.mm(x, w), (D, E), (B, D)),
    "addmm, data": (lambda w, x: torch.addmm(x, x, w), (D, D), (B, D)),
    "addmm, the addend": (
        lambda w, x: torch.addmm(w, x, x.detach().T[:, :1] * 0 + 1),
        (1,),
        (B, B),
    ),
    "addmm, both": (lambda w, x: torch.addmm(w[0], x, w, beta=2, alpha=0.5), (D, D), (B, D)),
    "baddbmm": (
        lambda w, x: torch.baddbmm(w[:, :1], x.transpose(0, 1), w, beta=3).transpose(0, 1),
        *((T, D, D), (B, T, D)),
    ),
    "outer": (lambda w, x: torch.outer(x[:, 0], w), (E,), (B, D)),
    "tensordot": (lambda w, x: torch.tensordot(x, w, 1), (D, E), (B, T, D)),
    "tensordot, two": (lambda w, x: torch.tensordot(x, w, 2), (T, D, E), (B, T, D)),
    "tensordot, named": (
        lambda w, x: torch.tensordot(x, w, ([2, 1], [0, 2])),
        (D, E, T),
        (B, T, D),
    ),
    "tensordot, left": (
        lambda w, x: torch.tensordot(w, x, dims=([1], [-1])).movedim(-2, 0),
        *((E, D), (B, T, D)),
    ),
    "einsum": (lambda w, x: torch.einsum("btd,de->bte", x, w), (D, E), (B, T, D)),
    "einsum, heads": (lambda w, x: torch.einsum("bthd,hde->bhte", x, w), (H, D, E), (B, T, H, D)),
    "einsum, heads last": (
        lambda w, x: torch.einsum("bthd,edh->bthe", x, w),
        *((E, D, H), (B, T, H, D)),
    ),
    "einsum, projected out": (
        lambda w, x: torch.einsum("b t h d , h d e -> b t e", x, w),
        *((H, D, E), (B, T, H, D)),
    ),
    "einsum, dots": (lambda w, x: torch.einsum("...d,ed->...e", x, w), (E, D), (B, T, D)),
    "einsum, implicit": (lambda w, x: torch.einsum("btd,de", x, w), (D, E), (B, T, D)),
    "einsum, a list": (lambda w, x: torch.einsum("btd,de->bte", [x, w]), (D, E), (B, T, D)),
    "einsum, a scale": (lambda w, x: torch.einsum("bd,d->bd", x, w), (D,), (B, D)),
    "einsum, rows alone": (lambda w, x: torch.einsum("bd,ef->bdef", x, w), (E, H), (B, D)),
    "einsum, summed data": (lambda w, x: torch.einsum("btd,d->bd", x, w), (D,), (B, T, D)),
    "einsum, of three": (
        lambda w, x: torch.einsum("bd,bt,dte->be", x[:, 0], x[..., 0], w),
        *((D, T, E), (B, T, D)),
    ),
    "einsum, twice": (lambda w, x: torch.einsum("bd,de,fe->bf", x, w, w), (D, D), (B, D)),
    "einsum, of size one": (lambda w, x: torch.einsum("bd,dek->bek", x, w), (D, 1, E), (B, D)),
    "einsum, broadcast": (lambda w, x: torch.einsum("btd,td->bt", x, w), (1, D), (B, T, D)),
}

#: Of two operands that are parameters, whose rows are others, so that no row's owner is both's.
APART = ("baddbmm", "einsum, twice")


def adapter(form: Form, moved: bool = False) -> om.Adapter:
    """With rows in an order that the data give, of which nothing is known, if they are moved."""
    operation, shape, _ = form
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = (m.first * x).tanh()
        if not moved:
            return operation(m.w, h).tanh()
        order = x.flatten(1)[:, 0].sin().argsort()
        return operation(m.w, h[order])[order.argsort()].tanh()

    module = Function(forward, w=torch.rand(shape) + 0.1, first=torch.rand(())).double()
    return om.LogLikelihood(module, lambda m, x: -(m(x) - 1).square().reshape(len(x), -1).sum(1))


def drawn(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64)


def exact(adapter: om.Adapter, x: Tensor, n: int, granularity: Granularity) -> dict[str, Tensor]:
    return {
        key: torch.stack([norms_of_gradient(granularity, own) for own in each])
        for key, each in gradients(adapter, x, len(x) // n).items()
    }


def recorded(adapter: om.Adapter, x: Tensor, n: int, granularity: Granularity) -> Recorded:
    return scored(
        lambda passes: recorded_norms(passes, x, n, lambda name: True, lambda name: granularity),
        adapter,
        adapter.module,
    )


@pytest.mark.parametrize("moved", [False, True], ids=["in order", "in another order"])
@pytest.mark.parametrize("name", FORMS)
def test_norms_are_those_of_a_loop(name: str, moved: bool) -> None:
    form = FORMS[name]
    model, x = adapter(form, moved), drawn(form[2])
    for granularity in get_args(Granularity):
        for n in (B, 2, 1) if not moved else (B, 1):
            if form[2] == (B, B) and n < B:
                continue  # of which the form's own width is the batch's
            found = recorded(model, x, n, granularity)
            if moved and n > 1 and name in APART:
                assert found.left_over.keys() == {"w"}
                continue
            assert not found.left_over
            for key, norms in exact(model, x, n, granularity).items():
                torch.testing.assert_close(found.norms[key], norms, rtol=1e-9, atol=1e-14)
    of_all = gradient_norms(model, x)
    for key, norms in exact(model, x, B, "tensor").items():
        torch.testing.assert_close(of_all[key], norms, rtol=1e-9, atol=1e-14)


# A parameter in two places of one call


@pytest.mark.parametrize(
    "operation",
    [
        lambda w, x: torch.addcmul(x[:, None], w, w).sum(1) + torch.addcmul(x, w[0], w[0]),
        lambda w, x: torch.nn.functional.linear(x, w, w[0]),
        lambda w, x: x @ w + torch.outer(x[:, 0], w[1]),
    ],
    ids=["pointwise", "linear", "two calls"],
)
def test_a_parameter_that_a_call_takes_twice(operation: Callable[..., Tensor]) -> None:
    model, x = adapter((operation, (D, D), (B, D))), drawn((B, D))
    found = recorded(model, x, B, "row")
    for key, norms in exact(model, x, B, "row").items():
        torch.testing.assert_close(found.norms[key], norms, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "operation",
    [
        lambda w, x: torch.nn.functional.linear(input=x, weight=w),
        lambda w, x: torch.matmul(input=x, other=w),
        lambda w, x: torch.add(input=x, other=w[0]),
        lambda w, x: torch.cat(tensors=[x, torch.broadcast_to(w[0], x.shape)], dim=1),
        lambda w, x: x + torch.broadcast_to(input=w[:1], size=x.shape).sin(),
        lambda w, x: x + torch.repeat_interleave(input=w[:1], repeats=len(x), dim=0).sin(),
    ],
    ids=["linear", "matmul", "add", "cat", "broadcast", "repeated"],
)
def test_calls_whose_arguments_are_all_named(operation: Callable[..., Tensor]) -> None:
    model, x = adapter((operation, (D, D), (B, D))), drawn((B, D))
    found = gradient_norms(model, x)
    for key, norms in exact(model, x, B, "tensor").items():
        torch.testing.assert_close(found[key], norms, rtol=1e-9, atol=1e-14)


def test_a_parameter_that_is_summed_up_first_is_left_to_the_loop() -> None:
    model, x = (
        adapter((lambda w, x: torch.einsum("bd,ef->bd", x, w), (D, E), (B, D))),
        drawn((B, D)),
    )
    assert recorded(model, x, B, "tensor").left_over.keys() == {"w"}
    of_all = gradient_norms(model, x)
    for key, norms in exact(model, x, B, "tensor").items():
        torch.testing.assert_close(of_all[key], norms, rtol=1e-9, atol=1e-14)


# Experts


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch 2.6 has none")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [8, 4, 1])
def test_grouped_products(n: int, transposed: bool) -> None:
    """Rows of samples by an expert each; one expert has no row, and the last rows have none."""
    width, out, count = 8, 16, 4

    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = (4 * x.detach().sum(2).sigmoid()).long().flatten()
        chosen = torch.where(chosen == 1, 2, chosen)
        order = chosen.argsort(stable=True)
        ends = torch.nn.functional.one_hot(chosen, count).sum(0).cumsum(0).to(torch.int32)
        matrices = m.w.transpose(1, 2) if transposed else m.w
        h = torch.nn.functional.grouped_mm((m.first * x).flatten(0, 1)[order], matrices, offs=ends)
        return h[order.argsort()].reshape(len(x), -1).tanh()

    torch.manual_seed(0)
    shape = (count, out, width) if transposed else (count, width, out)
    module = Function(forward, w=torch.rand(shape) - 0.5, first=torch.rand(()))
    model = om.LogLikelihood(module, lambda m, x: -(m(x) - 1).square().sum(1))
    x = drawn((8, 5, width)).float()
    for granularity in get_args(Granularity):
        found = recorded(model, x, n, granularity)
        assert not found.left_over
        for key, norms in exact(model, x, n, granularity).items():
            torch.testing.assert_close(found.norms[key], norms, rtol=1e-3, atol=1e-6)


# Views of a parameter with its dimensions in another order

VIEWS: dict[str, Form] = {
    "x @ W.T": (lambda w, x: x @ w.T, (E, D), (B, T, D)),
    "linear of W.t()": (lambda w, x: torch.nn.functional.linear(x, w.t()), (D, E), (B, T, D)),
    "heads": (lambda w, x: x.unsqueeze(1) @ w.mT, (H, E, D), (B, T, D)),
    "all moved": (lambda w, x: x.unsqueeze(1) @ w.permute(1, 2, 0), (E, H, D), (B, T, D)),
    "of size one": (lambda w, x: x @ w.transpose(0, 2), (E, D, 1), (B, T, D)),
    "a scale": (lambda w, x: x * w.T, (D, T), (B, T, D)),
    "a kernel": (lambda w, x: torch.conv1d(x, w.transpose(0, 1)), (T, E, 2), (B, T, D)),
    "twice": (lambda w, x: (x @ w.T) @ w, (E, D), (B, T, D)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_norms_of_a_view_are_those_of_the_parameter(name: str) -> None:
    model, x = adapter(VIEWS[name]), drawn(VIEWS[name][2])
    for granularity in get_args(Granularity):
        found = recorded(model, x, B, granularity)
        assert not found.left_over
        for key, norms in exact(model, x, B, granularity).items():
            torch.testing.assert_close(found.norms[key], norms, rtol=1e-9, atol=1e-14)


def test_an_order_is_that_of_the_dimensions() -> None:
    base = torch.rand(2, 3, 3, requires_grad=True)
    assert order_of(base.permute(2, 0, 1), base) == (2, 0, 1)
    assert order_of(base.mT, base) == (0, 2, 1)
    others = (base[:1], base.flatten(), base.exp(), base[:, ::2], base.flip(0), base.mT[1:])
    assert all(order_of(other, base) is None for other in others)
