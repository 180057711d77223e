"""The comparison with the loop says nothing of gradients that are zero, and is made again."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import Scale, model
from support.model_case import Function, Gaussian
from support.reference import counted, looped
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.gradients import check, gradient_norms
from ood_monitor.gradients.rules import RULES, Materialised, Rule
from ood_monitor.testing import check_adapter

X = torch.linspace(-1, 1, 12).double().reshape(4, 3)
DISAGREES = "The fast path disagrees with the loop"

pytestmark = pytest.mark.filterwarnings(f"ignore:{DISAGREES}")


def exact(adapter: om.Adapter, batch: Tensor) -> dict[str, Tensor]:
    return {key: rows.sum(1) for key, rows in looped(adapter, batch)[1].items()}


def assert_exact(adapter: om.Adapter, batch: Tensor) -> None:
    expected = exact(adapter, batch)
    for key, norms in gradient_norms(adapter, batch).items():
        torch.testing.assert_close(norms, expected[key], rtol=1e-9, atol=1e-14, msg=key)


def zero_output() -> om.Adapter:
    """A scale that only the loop gets right, before an output layer that starts at zero."""
    torch.manual_seed(0)
    parts = {"f": nn.Linear(3, 3), "out": nn.Linear(3, 2), "w": torch.linspace(1, 2, 3)}
    net = Function(lambda m, x: m.out(Scale.apply(m.f(x).tanh(), m.w)), **parts).double()
    nn.init.zeros_(net.out.weight)
    return Gaussian(net)


def train(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(X) - 1).square().sum().backward()
        optimizer.step()


def load(module: nn.Module) -> None:
    state = module.state_dict()
    module.load_state_dict(state | {"out.weight": torch.ones_like(state["out.weight"])})


def replace(module: nn.Module) -> None:
    module.out.weight = nn.Parameter(torch.ones_like(module.out.weight))


@pytest.mark.parametrize("uses", [1, 2, 3, 7])
@pytest.mark.parametrize("change", [train, load, replace])
def test_an_adapter_used_before_training_is_compared_after_it(
    change: Callable[[nn.Module], None], uses: int
) -> None:
    adapter = zero_output()
    for _ in range(uses):
        gradient_norms(adapter, X)
    change(adapter.module)
    assert_exact(adapter, X)
    assert "w" in check._known[adapter].looped


def doubled(rule: Rule) -> Rule:
    def factors(n: int, g: Tensor, arguments: Mapping[str, Any]) -> dict[str, Materialised]:
        found = rule.factors(n, g, arguments)
        return {k: Materialised(2 * factor.gradients(0, n)) for k, factor in found.items()}

    return Rule(rule.arguments, factors)


def test_the_first_gradient_that_is_not_zero_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as they are: a part of the network that only some samples reach."""
    monkeypatch.setitem(RULES, F.linear, doubled(RULES[F.linear]))
    torch.manual_seed(0)
    parts = {"f": nn.Linear(3, 3), "shift": torch.zeros(3)}
    forward = Function(lambda m, x: m.f(x) * (x[:, :1] > 2) + (x + m.shift).sin(), **parts).double()
    adapter = Gaussian(forward)
    for _ in range(5):
        gradient_norms(adapter, X)
    far = X.clone()
    far[2] += 5
    assert_exact(adapter, far)
    assert check._known[adapter].looped == {"f.weight", "f.bias"}


def test_a_norm_that_is_not_finite_gives_no_verdict() -> None:
    torch.manual_seed(0)
    net = Function(
        lambda m, x: (
            (m.f(x).sum(1, keepdim=True) - m.f(x).sum(1, keepdim=True)).abs().sqrt()
            * (x[:, :1] < 0)
            + m.g(x)
        ),
        f=nn.Linear(3, 3),
        g=nn.Linear(3, 2),
    )
    adapter = Gaussian(net.double())
    gradient_norms(adapter, X)
    assert "f.weight" not in check._known[adapter].looped
    assert "log_likelihood/f.weight" in check._open[adapter].keys


def passes(adapter: om.Adapter, uses: int) -> int:
    """Forward passes that so many uses take."""
    with counted(adapter.module) as calls:
        for _ in range(uses):
            gradient_norms(adapter, X)
    return len(calls)


def test_a_gradient_that_is_always_zero_is_compared_less_and_less() -> None:
    net = Function(lambda m, x: m.f(x) + 0 * m.never, f=nn.Linear(3, 2), never=torch.ones(2))
    assert (
        passes(Gaussian(net.double()), 64) == 64 + 1 + 3 * 7
    )  # the last sample alone; on uses 1, 2, 4, ... 64


def test_what_is_compared_is_not_compared_again() -> None:
    adapter, _ = model("linear-2d")()
    assert passes(adapter, 8) == 8 + 3 + 1  # the first two samples, and the last, alone
    train_once = torch.optim.SGD(adapter.module.parameters(), 0.1)
    gradient_norms(adapter, X)
    train_once.step()
    assert passes(adapter, 8) == 8


def test_check_adapter_compares_norms_alone_and_in_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = RULES[F.linear]

    def swapped(n: int, g: Tensor, arguments: Mapping[str, Any]) -> dict[str, Materialised]:
        found = rule.factors(n, g, arguments)
        order = [0, 1, *range(n - 1, 1, -1)][:n]  # right for the two that are compared
        return {k: Materialised(f.gradients(0, n)[order]) for k, f in found.items()}

    monkeypatch.setitem(RULES, F.linear, Rule(rule.arguments, swapped))
    adapter = Gaussian(nn.Linear(3, 2).double())
    with pytest.raises(AssertionError, match=r"norms of a sample to be the same alone.*'weight'"):
        check_adapter(adapter, X)
