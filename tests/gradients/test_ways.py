"""What is told of how norms were had."""

from typing import Any

import torch
import torch.nn.functional as F
from support.model_case import Function
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.gradients import GradientNorms, Way

X = torch.linspace(-1, 1, 30).double().reshape(10, 3)


def forward(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].sin().argsort()
    return m.out(m.moved(m.plain(x).tanh()[order])[order.argsort()].tanh())


def adapter(**parts: Any) -> om.Adapter:
    torch.manual_seed(0)
    net = Function(
        lambda m, x: parts["last"](m, forward(m, x)) if "last" in parts else forward(m, x),
        plain=nn.Linear(3, 3),
        moved=nn.Linear(3, 3),
        out=nn.Linear(3, 3),
        slope=torch.rand(2, 3, 3),
    ).double()
    return om.LogLikelihood(net, lambda m, x: -m(x).square().flatten(1).sum(1))


def bilinear(m: Any, x: Tensor) -> Tensor:
    return F.bilinear(x, x, m.slope)


def by_a_value(m: Any, x: Tensor) -> Tensor:
    """Which `vmap` cannot run."""
    return bilinear(m, x) * (1 if float(x.detach().square().sum()) >= 0 else 2)


def told(adapter: om.Adapter, x: Tensor = X, **options: Any) -> GradientNorms:
    found = om.gradient_norms(adapter, x, report=True, **options)
    plain = om.gradient_norms(adapter, x, **options)
    assert found.norms.keys() == plain.keys()
    assert all(torch.equal(found.norms[key], plain[key]) for key in plain)
    return found


def test_ways_are_told_by_parameter_in_module_order() -> None:
    found = told(adapter())
    assert list(found.log_likelihood) == ["log_likelihood"]
    assert [f"log_likelihood/{name}" for name in found.ways] == list(found.norms)
    assert {found.ways[f"{name}.weight"].name for name in ("moved", "out")} == {"rows"}
    assert found.ways["plain.weight"] == Way("rules")
    assert "order" in found.ways["moved.bias"].reason


def test_what_has_no_rule_is_told_with_its_reason() -> None:
    for last, way in ((bilinear, "vmap"), (by_a_value, "loop")):
        found = told(adapter(last=last))
        assert found.ways["slope"].name == way
        assert "bilinear" in found.ways["slope"].reason
        assert found.ways["plain.weight"] == Way("rules")
        # No further backward passes are made where the loop makes its own of everything.
        assert found.ways["moved.weight"].name == {"vmap": "rows", "loop": "loop"}[way]


def test_of_chunks_the_dearest_way_is_told() -> None:
    """Of two samples a loop is as quick as `vmap`."""
    assert told(adapter(last=bilinear), chunk_size=4).ways["slope"].name == "loop"
    assert told(adapter(last=bilinear), layers="plain.*").ways.keys() == {
        "plain.weight",
        "plain.bias",
    }
