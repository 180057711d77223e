"""Models that do for later samples what the comparison on first use did not see."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Function
from support.reference import looped
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.gradients import gradient_norms

SEEN = torch.linspace(-1, 1, 24).double().reshape(4, 2, 3)
LATER = torch.cat([SEEN[:2], 3 + SEEN[2:]])

Branch = Callable[[Any, Tensor], Tensor]


class Multiply(torch.autograd.Function):
    """x W, written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.flatten(0, -2).T @ x.flatten(0, -2)


class ThroughNumPy(torch.autograd.Function):
    """Twice x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def twice(x: Tensor) -> Tensor:
    return 2 * x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(twice)


def filled(write: Callable[[Tensor, Tensor], object]) -> Branch:
    """Rows put one by one, in another order, into a tensor that was empty."""

    def branch(m: Any, h: Tensor) -> Tensor:
        out = torch.zeros(h.shape, dtype=h.dtype)
        write(out, 2 * h)
        return F.linear(out, m.between.weight)

    return branch


def each_row(out: Tensor, h: Tensor) -> None:
    for i in reversed(range(len(h))):
        out[i].add_(h[i])


def slope(m: Any, h: Tensor) -> Tensor:
    """A gradient by the input inside the forward pass."""
    energy = m.between(h).square().sum()
    (found,) = torch.autograd.grad(energy, h, create_graph=True)
    return found


def directional(m: Any, h: Tensor) -> Tensor:
    value, change = torch.func.jvp(lambda y: m.between(y).tanh(), (h,), (torch.ones_like(h),))
    return value + change


def pulled_back(m: Any, h: Tensor) -> Tensor:
    value, pull = torch.func.vjp(lambda y: m.between(y).tanh(), h)
    return pull(value)[0]


def jacobians(m: Any, h: Tensor) -> Tensor:
    """Of each position."""
    jacobian = torch.func.jacfwd(lambda y: m.between(y).tanh())
    return torch.func.vmap(jacobian)(h.flatten(0, 1)).sum(2).view_as(h)


BRANCHES: dict[str, Branch] = {
    "set through a view": filled(
        lambda out, h: out.view(-1, 3).__setitem__(slice(None), h.view(-1, 3))
    ),
    "copied into a view": filled(lambda out, h: out[:].copy_(h)),
    "added to a view": filled(lambda out, h: out.narrow(0, 0, len(h)).add_(h)),
    "added by an index": filled(
        lambda out, h: out.view(-1, 3).index_add_(0, torch.arange(2 * len(h)), h.view(-1, 3))
    ),
    "each row added": filled(each_row),
    "a function with a weight": lambda m, h: Multiply.apply(h, m.between.weight),
    "a function through numpy": lambda m, h: m.between(ThroughNumPy.apply(h)),
    "a scripted function": lambda m, h: m.between(scripted(h)),
    "a gradient inside": slope,
    "a directional derivative": directional,
    "a product with a Jacobian": pulled_back,
    "Jacobians": jacobians,
}


def model(branch: Branch) -> om.Adapter:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.before(x).tanh()
        h = branch(m, h) if x.max() > 2 else m.between(h)
        return m.after(h.tanh())

    torch.manual_seed(0)
    parts = {name: nn.Linear(3, 3) for name in ("before", "between", "after")}
    net = Function(forward, **parts).double()
    return om.LogLikelihood(net, lambda m, x: -0.5 * m(x).square().flatten(1).sum(1))


@pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_that_the_first_samples_did_not_take_has_exact_norms(branch: Branch) -> None:
    adapter = model(branch)
    for batch in (SEEN, LATER, SEEN, LATER):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


class Product(torch.autograd.Function):
    """x W, of one call without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    backward = Multiply.backward


#: Of the samples themselves, so that nothing shows a gradient that the recorder does not know of.
FIRST: dict[str, Branch] = {
    "a function": lambda m, x: Product.apply(x, m.before.weight),
    "a value beside a gradient": lambda m, x: torch.func.vjp(m.before, x)[0],
    "Jacobians": lambda m, x: torch.func.vmap(torch.func.jacrev(m.before))(x.flatten(0, 1)).sum(2),
}


@pytest.mark.parametrize("branch", FIRST.values(), ids=FIRST)
def test_a_branch_on_the_samples_themselves_has_exact_norms(branch: Branch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = branch(m, x).view_as(x) if x.max() > 2 else m.before(x)
        return m.after(h.tanh())

    torch.manual_seed(0)
    net = Function(forward, before=nn.Linear(3, 3, bias=False), after=nn.Linear(3, 3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x).square().flatten(1).sum(1))
    for batch in (SEEN, 3 + SEEN):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


def test_rows_moved_by_other_data_of_a_tensor_keep_their_gradients() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort(stable=True)
        h = m.before(x).tanh() * 1
        h.data = h.data[order]
        return m.after(h).flatten(1).square().sum(1)[order.argsort()]

    torch.manual_seed(0)
    net = Function(forward, before=nn.Linear(3, 3), after=nn.Linear(3, 3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x))
    for batch in (SEEN, SEEN[[2, 0, 3, 1]]):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


def write_data(h: Tensor, order: Tensor) -> None:
    h.data.copy_(h.data[order])


def write_in_numpy(h: Tensor, order: Tensor) -> None:
    values = h.numpy()
    values[:] = values[order.numpy()]


def write_detached_in_numpy(h: Tensor, order: Tensor) -> None:
    write_in_numpy(h.detach(), order)


def write_data_in_numpy(h: Tensor, order: Tensor) -> None:
    write_in_numpy(h.data, order)


@pytest.mark.parametrize(
    "move", [write_data, write_in_numpy, write_detached_in_numpy, write_data_in_numpy]
)
def test_samples_moved_past_their_version_keep_their_gradients(
    move: Callable[[Tensor, Tensor], None],
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort(stable=True)
        h = x.clone()
        move(h, order)
        return m.after(h).flatten(1).square().sum(1)[order.argsort()]

    torch.manual_seed(0)
    net = Function(forward, after=nn.Linear(3, 3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x))
    for batch in (SEEN, SEEN[[2, 0, 3, 1]]):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


def bag(m: Any, table: Tensor, x: Tensor) -> Tensor:
    return F.embedding_bag((x[..., 0] > 3.2).long() + 2 * (x[..., 1] > 3).long(), table, mode="sum")


def inner_lookup(m: Any, table: Tensor, x: Tensor) -> Tensor:
    """A constant order of what is not the samples', and then theirs."""
    rows = torch.embedding(table, torch.tensor([2, 0, 3, 1]))
    return (x[:, 0, :1] - rows[:, 0]).square().sum(1, keepdim=True)


def normalised(m: Any, table: Tensor, x: Tensor) -> Tensor:
    channels = m.between(x).flatten(1)[:, :4, None] * torch.tensor([1.0, 4.0, 9.0])
    return F.instance_norm(channels, weight=table[:, 0]).sin().flatten(1)


def rectified(m: Any, table: Tensor, x: Tensor) -> Tensor:
    return F.prelu(m.between(x).flatten(1)[:, :4], table[:, 0])


@pytest.mark.parametrize("use", [bag, inner_lookup, normalised, rectified])
def test_a_table_with_as_many_rows_as_the_batch_has_not_its_samples(
    use: Callable[[Any, Tensor, Tensor], Tensor],
) -> None:
    """It is taken for theirs, as by a start state, until an operation shows that it is not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if x.max() < 2:
            return m.between(x + m.start).flatten(1)
        return use(m, m.start.expand(4, 3) * torch.tensor([[1.0], [-2.0], [3.0], [-5.0]]), x)

    torch.manual_seed(0)
    net = Function(forward, between=nn.Linear(3, 3), start=torch.randn(3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x).square().flatten(1).sum(1))
    for batch in (SEEN, 3 + SEEN, 3 + SEEN[[2, 0, 3, 1]]):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


def test_equal_samples_that_are_computed_once_are_told_from_others() -> None:
    """Where the mean of two weights is a third one's in single precision."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows, inverse = torch.unique(x, dim=0, return_inverse=True)
        return m.after(m.before(rows).tanh())[inverse]

    torch.manual_seed(0)
    net = Function(forward, before=nn.Linear(3, 3), after=nn.Linear(3, 1))
    adapter = om.LogLikelihood(net, lambda m, x: m(x)[:, 0])
    x = torch.randn(32, 3)
    again = x.clone()
    again[15] = again[4]
    for batch in (x, again):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-4, atol=1e-6, msg=key)


def cell(m: Any, start: Tensor, x: Tensor) -> Tensor:
    return m.cell(x[:, 0], start)


def layer(m: Any, start: Tensor, x: Tensor) -> Tensor:
    return m.layer(x, start[None])[0].flatten(1)


def layer_from_samples(m: Any, start: Tensor, x: Tensor) -> Tensor:
    """The input is the same for all, and the states are the samples'."""
    return m.layer(start[:, None], x[:, 0][None])[0].flatten(1)


@pytest.mark.parametrize("use", [cell, layer, layer_from_samples])
def test_a_learned_start_beside_sorted_samples_is_theirs(
    use: Callable[[Any, Tensor, Tensor], Tensor],
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort(stable=True)
        return use(m, m.start.expand(len(x), 3).contiguous(), x[order])[order.argsort()]

    torch.manual_seed(0)
    parts = {"cell": nn.GRUCell(3, 3), "layer": nn.GRU(3, 3, batch_first=True)}
    net = Function(forward, **parts, start=torch.randn(3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x).square().flatten(1).sum(1))
    for batch in (SEEN, SEEN[[2, 0, 3, 1]]):
        found = gradient_norms(adapter, batch)
        for key, rows in looped(adapter, batch)[1].items():
            torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)
