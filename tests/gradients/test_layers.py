"""Selected layers have the norms that they have among all, for less."""

from typing import Any

import pytest
import torch
from cases import Function, Gaussian, model
from torch import Tensor, nn

from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.layers import Layers, selection


def block() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["up.weight", "up.bias", "down.weight", "down.bias", "norm.weight", "norm.bias"]),
        ("up.*", ["up.weight", "up.bias"]),
        ("UP.*", None),
        (["norm.*", "*.bias"], ["up.bias", "down.bias", "norm.weight", "norm.bias"]),
        (("up.weight",), ["up.weight"]),
        ("[ud]*.b???", ["up.bias", "down.bias"]),
        (lambda name: "o" in name, ["down.weight", "down.bias", "norm.weight", "norm.bias"]),
        ([], None),
        (lambda name: False, None),
    ],
    ids=["all", "pattern", "case", "patterns", "name", "glob", "predicate", "empty", "none"],
)
def test_selection(layers: Layers, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"to match a parameter name, got no match among 6"):
            selection(block(), layers)
    else:
        names = [name for name, _ in block().named_parameters()]
        assert list(filter(selection(block(), layers), names)) == expected


@pytest.mark.parametrize("name", ["unet", "gpt2"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_selected_norms_are_those_among_all(name: str, granularity: Any) -> None:
    adapter, batch = model(name)()
    every = gradient_norms(adapter, batch, granularity=granularity)
    for layers in ("*.bias", ["*mid*", "*.1.*"], lambda name: "att" in name or "conv" in name):
        chosen = selection(adapter.module, layers)
        expected = {key: norms for key, norms in every.items() if chosen(key.split("/")[1])}
        actual = gradient_norms(adapter, batch, layers=layers, granularity=granularity)
        assert list(actual) == list(expected)
        for key, norms in expected.items():
            torch.testing.assert_close(actual[key], norms, rtol=1e-9, atol=1e-20, msg=key)


def test_selection_does_not_depend_on_what_was_scored_before() -> None:
    adapter, batch = model("unet")()
    first = gradient_norms(adapter, batch, layers="conv_in.*")
    every = gradient_norms(adapter, batch)
    for key, norms in first.items():
        torch.testing.assert_close(every[key], norms)


def test_a_layer_after_the_models_own_graph_is_scored_without_the_layers_before() -> None:
    def with_a_score(m: Any, x: Tensor) -> Tensor:
        h = m.before(x)
        point = h.detach().requires_grad_()
        (score,) = torch.autograd.grad(point.pow(3).sum(), point, create_graph=True)
        return m.after(h + score)

    net = Function(with_a_score, before=nn.Linear(3, 3), after=nn.Linear(3, 2))
    adapter, batch = Gaussian(net), torch.randn(4, 3)
    every = gradient_norms(adapter, batch)
    for key, norms in gradient_norms(adapter, batch, layers="after.*").items():
        torch.testing.assert_close(norms, every[key])


class Counted(torch.autograd.Function):
    """The identity; counts its backward passes."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counted.backwards += 1
        return g


def counted() -> Gaussian:
    return Gaussian(
        Function(
            lambda m, x: m.late(Counted.apply(m.early(x)).tanh()),
            early=nn.Linear(3, 3),
            late=nn.Linear(3, 2),
        )
    )


@pytest.mark.parametrize(("layers", "passes"), [(None, 1), ("early.*", 1), ("late.*", 0)])
def test_the_backward_pass_ends_at_the_first_selected_layer(layers: Layers, passes: int) -> None:
    adapter, batch = counted(), torch.randn(4, 3)
    gradient_norms(adapter, batch)  # the first call compares the fast path with the loop
    Counted.backwards = 0
    gradient_norms(adapter, batch, layers=layers)
    assert Counted.backwards == passes
