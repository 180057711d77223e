"""Selected layers have the norms that they have among all, for less."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import Function, Gaussian, model
from support.model_case import Case
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ood_monitor.gradients import gradient_norms, last_layers
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
        (["norm.*", "bias"], None),
        (lambda name: False, None),
    ],
    ids=[
        "all",
        "pattern",
        "case",
        "patterns",
        "name",
        "glob",
        "predicate",
        "empty",
        "one of two",
        "none",
    ],
)
def test_selection(layers: Layers, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(
            ValueError, match=r"to match a parameter name, got no match of \[.* among 6"
        ):
            selection(block(), layers)
    else:
        names = [name for name, _ in block().named_parameters()]
        assert list(filter(selection(block(), layers), names)) == expected


@functools.cache
def kept(name: str) -> Case:
    """A model whose fast path is compared with the loop once."""
    return model(name)()


@pytest.mark.parametrize("name", ["ddpm", "gpt2"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_selected_norms_are_those_among_all(name: str, granularity: Any) -> None:
    adapter, batch = kept(name)
    every = gradient_norms(adapter, batch, granularity=granularity)
    for layers in ("*.bias", ["*weight", "*.1.*"], lambda name: "att" in name or "conv" in name):
        chosen = selection(adapter.module, layers)
        expected = {key: norms for key, norms in every.items() if chosen(key.split("/")[1])}
        actual = gradient_norms(adapter, batch, layers=layers, granularity=granularity)
        assert list(actual) == list(expected)
        for key, norms in expected.items():
            torch.testing.assert_close(actual[key], norms, rtol=1e-9, atol=1e-20, msg=key)


def test_selection_does_not_depend_on_what_was_scored_before() -> None:
    adapter, batch = model("ddpm")()
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


# What autograd gives no gradient of


def holding(values: Tensor) -> nn.Module:
    """A linear layer beside a parameter of these values."""
    module = Function(lambda m, x: m.f(x), f=nn.Linear(3, 2))
    module.odd = nn.Parameter(values, requires_grad=False)
    return module


def partitioned() -> nn.Module:
    """What DeepSpeed leaves of a parameter: no elements, and an identity."""
    module = holding(torch.zeros(0))
    module.odd.ds_id = 7
    return module


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "integers": (lambda: holding(torch.ones(2).to(torch.int8)), "quantised.*torch.int8"),
    "fp8": (lambda: holding(torch.ones(2).to(torch.float8_e4m3fn)), "quantised.*float8_e4m3fn"),
    "zero-3": (partitioned, "a shard by DeepSpeed ZeRO-3"),
}


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_has_no_gradient_is_refused_by_name(
    make: Callable[[], nn.Module], reason: str
) -> None:
    adapter, batch = Gaussian(make()), torch.randn(4, 3)
    with pytest.raises(ValueError, match=rf"Expected whole parameters.*'odd', .*{reason}.*layers="):
        gradient_norms(adapter, batch)
    norms = gradient_norms(adapter, batch, layers="f.*")
    assert all(values.all() for values in norms.values())


def test_a_layer_without_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'weight', which is not initialised: run a batch"):
        gradient_norms(Gaussian(nn.LazyLinear(2)), torch.randn(4, 3))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def flat(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (fully_shard, "that FSDP has sharded"),
        (flat(use_orig_params=False), "that FSDP has sharded"),
        (flat(use_orig_params=True), "that FSDP has sharded"),
    ],
    ids=["fsdp2", "fsdp1-flat", "fsdp1-original"],
)
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_shards_are_refused(shard: Callable[[nn.Module], nn.Module], message: str) -> None:
    adapter = Gaussian(shard(nn.Sequential(nn.Linear(3, 2))))
    with pytest.raises(ValueError, match=message):
        gradient_norms(adapter, torch.randn(4, 3))


# The end of a network


def test_last_layers_are_the_end_of_a_forward_pass() -> None:
    # Registered first, used last; and a layer used twice counts where it is first.
    parts = {name: nn.Linear(3, 3) for name in ("last", "first", "twice", "unused")}
    net = Function(lambda m, x: m.last(m.twice(m.twice(m.first(x)).tanh()).tanh()), **parts)
    adapter, batch = Gaussian(net), torch.randn(4, 3)
    assert last_layers(adapter, batch, 2) == ["last.weight", "last.bias"]
    assert last_layers(adapter, batch, 4)[:2] == ["twice.weight", "twice.bias"]
    assert len(last_layers(adapter, batch, 6)) == 6
    with pytest.raises(ValueError, match="k from 1 to the 6 parameters used, got 7"):
        last_layers(adapter, batch, 7)


def test_last_layers_of_a_unet_end_with_its_output() -> None:
    adapter, batch = model("ddpm")()
    names = last_layers(adapter, batch, 4)
    ends = ["conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias"]
    assert names == ends
    every = gradient_norms(adapter, batch)
    for key, norms in gradient_norms(adapter, batch, layers=names).items():
        torch.testing.assert_close(norms, every[key], rtol=1e-9, atol=1e-20)


def test_an_order_kept_as_a_parameter_is_no_weight() -> None:
    """As FrEIA's permutations are."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    net.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
    adapter = Gaussian(net, lambda m, x: m[1](m[0](x)[:, m.order]))
    found = gradient_norms(adapter, torch.randn(4, 3).double())
    assert [key.split("/")[1] for key in found] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all((norms > 0).all() for norms in found.values())
