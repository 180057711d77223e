"""Models that keep something of a call: norms are exact, and they keep nothing of scoring."""

import copy
import functools
import gc
import io
import threading
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.model_case import Gaussian
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms
from ood_monitor.modules import scored, scoring_view

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


# Layers that keep a weight which they computed


class Cache:
    """Of one weight."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None


class Cached(nn.Module):
    """A linear map whose weight is computed from its parameter, once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def train(self, mode: bool = True) -> "Cached":
        if mode:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        raise NotImplementedError

    def kept(self) -> Tensor | None:
        raise NotImplementedError

    def keep(self, weight: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.training else self.kept()
        if weight is None:
            weight = self.raw.tanh()
            if not self.training:
                self.keep(weight)
        return F.linear(x, weight)


class InAnObject(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    def forget(self) -> None:
        self.cache.weight = None

    def kept(self) -> Tensor | None:
        return self.cache.weight

    def keep(self, weight: Tensor) -> None:
        self.cache.weight = weight


class InADictionary(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forget(self) -> None:
        self.cache.clear()

    def kept(self) -> Tensor | None:
        return self.cache.get("weight")

    def keep(self, weight: Tensor) -> None:
        self.cache["weight"] = weight


class InAnAttribute(Cached):
    computed: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.computed = None

    def forget(self) -> None:
        self.computed = None

    def kept(self) -> Tensor | None:
        return self.computed

    def keep(self, weight: Tensor) -> None:
        self.computed = weight


class InAProperty(nn.Module):
    """Without a way to forget, but known to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    @functools.cached_property
    def weight(self) -> Tensor:
        return self.raw.tanh()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class InAMemo(nn.Module):
    """As gpytorch names it."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self._memoize_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "weight" not in self._memoize_cache:
            self._memoize_cache["weight"] = self.raw.tanh()
        return F.linear(x, self._memoize_cache["weight"])


class BesideALock(InAnObject):
    def __init__(self) -> None:
        super().__init__()
        self.cache.lock = threading.Lock()  # type: ignore[attr-defined]


class OfAThread(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.cache = threading.local()

    def forget(self) -> None:
        self.cache.weight = None

    def kept(self) -> Tensor | None:
        return getattr(self.cache, "weight", None)

    def keep(self, weight: Tensor) -> None:
        self.cache.weight = weight


class InABuffer(InAnAttribute):
    def begin(self) -> None:
        self.register_buffer("computed", None, persistent=False)


class ComputedWithTheMode(nn.Module):
    """When eval mode begins, and so never in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def train(self, mode: bool = True) -> "ComputedWithTheMode":
        self.weight = None if mode else self.raw.tanh()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.raw.tanh() if self.weight is None else self.weight)


class Part(nn.Module):
    """Keeps a weight that what it belongs to throws away."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            self.weight = self.raw.tanh()
        return F.linear(x, self.weight)


class OfAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def train(self, mode: bool = True) -> "OfAPart":
        self.part.weight = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


CACHING = [
    *(InAnObject, InADictionary, InAnAttribute, InAProperty, InAMemo, BesideALock, OfAThread),
    *(InABuffer, ComputedWithTheMode, OfAPart),
]


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), kind(), nn.Tanh(), nn.Linear(3, 2))
    return net.double()


def reference(kind: Callable[[], nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Plain autograd of a new model for each sample."""
    rows: dict[str, list[Tensor]] = {}
    for sample in x.split(1):
        adapter = Gaussian(made(kind).eval())
        (value,) = dict(checked_terms(adapter, sample)).values()
        named = dict(adapter.module.named_parameters())
        for name, g in zip(named, torch.autograd.grad(value.sum(), [*named.values()]), strict=True):
            rows.setdefault(f"log_likelihood/{name}", []).append(g.square().sum())
    return {key: torch.stack(values) for key, values in rows.items()}


def values_of(value: Any) -> Any:
    """What an attribute holds, comparable by ==."""
    if isinstance(value, Tensor):
        return id(value), value.detach().tolist()
    if isinstance(value, Cache):
        return values_of(value.weight)
    if isinstance(value, dict):
        return {key: values_of(item) for key, item in value.items()}
    if isinstance(value, threading.local):
        return values_of(vars(value))
    return id(value)


def python_state(net: nn.Module) -> dict[str, Any]:
    return {name: {k: values_of(v) for k, v in vars(m).items()} for name, m in net.named_modules()}


@pytest.mark.parametrize("kind", CACHING)
@pytest.mark.parametrize("before", ["unused", "evaluated", "evaluated with gradients"])
def test_norms_are_exact_and_the_modules_state_is_as_it_was(
    kind: Callable[[], nn.Module], before: str
) -> None:
    net = made(kind)
    if before != "unused":
        with torch.set_grad_enabled("gradients" in before):
            net.eval()(X)
    state = python_state(net)
    found = om.gradient_norms(Gaussian(net), X)
    assert python_state(net) == state
    for key, norms in reference(kind, X).items():
        torch.testing.assert_close(found[key], norms, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("kind", CACHING)
def test_the_users_own_evaluation_uses_nothing_that_scoring_kept(
    kind: Callable[[], nn.Module],
) -> None:
    nets = made(kind), made(kind)
    om.gradient_norms(Gaussian(nets[0]), X)
    for net in nets:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)  # an optimiser's step
    assert torch.equal(*(net.eval()(X) for net in nets))


class Merging(nn.Module):
    """Adds an adapter to its weight in eval mode, as loralib does, and keeps a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.added = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 3)
        self.scale, self.merged = torch.tensor(0.7), False

    def train(self, mode: bool = True) -> "Merging":
        if self.merged == mode:
            self.weight.data += self.scale * self.added.data * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight if self.merged else self.weight + self.scale * self.added
        return F.linear(x, whole)


@pytest.mark.parametrize("training", [True, False])
def test_what_writes_into_its_weights_when_it_changes_mode_is_left_in_its_mode(
    training: bool,
) -> None:
    net = made(Merging).train(training)
    weights = copy.deepcopy(net.state_dict())
    om.gradient_norms(Gaussian(net), X)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert net[2].merged != training


class Initialising(nn.Linear):
    """Sets its bias from the first data that it sees, as activation norms do."""

    is_set = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set:
            self.bias.data.copy_(x.mean(0).sum().expand_as(self.bias) + 7)
            self.is_set = True
        return super().forward(x)


def test_a_model_that_writes_into_its_parameters_is_refused_before_it_does() -> None:
    net = made(lambda: Initialising(3, 3))
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"got a write into \['2.bias'\]"):
        om.gradient_norms(Gaussian(net), X)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    net(X)
    om.gradient_norms(Gaussian(net), X)


def test_an_embedding_that_renormalises_its_rows_keeps_them() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2)).double()
    rows = net[0].weight.detach().clone()
    for _ in range(2):
        om.gradient_norms(Gaussian(net), torch.randint(5, (4, 2)))
        assert torch.equal(net[0].weight, rows)


def test_scoring_inside_cached_parametrizations_is_refused() -> None:
    net = made(lambda: parametrizations.orthogonal(nn.Linear(3, 3)))
    cached = torch.nn.utils.parametrize.cached()
    with cached, pytest.raises(ValueError, match=r"outside `torch.nn.utils.parametrize.cached"):
        om.gradient_norms(Gaussian(net), X)
    om.gradient_norms(Gaussian(net), X)


# Hooks


def recording(calls: list[Any]) -> Callable[..., None]:
    return lambda *_: calls.append(1)


def clamping(net: nn.Module, calls: list[Any]) -> None:
    for parameter in net.parameters():
        parameter.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        parameter.register_hook(recording(calls))


def scaling(net: nn.Module, calls: list[Any]) -> None:
    for module in net:
        module.register_full_backward_hook(lambda m, inputs, _: tuple(3 * g for g in inputs))
        module.register_full_backward_pre_hook(recording(calls))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("hook", [clamping, scaling])
def test_hooks_on_gradients_are_not_called_and_change_nothing(
    hook: Callable[[nn.Module, list[Any]], None],
) -> None:
    def kind() -> nn.Module:
        return nn.Linear(3, 3)

    net, calls = made(kind), list[Any]()
    hook(net, calls)
    found = om.gradient_norms(Gaussian(net), X)
    assert calls == []
    for key, norms in reference(kind, X).items():
        torch.testing.assert_close(found[key], norms, rtol=1e-9, atol=1e-12, msg=key)


def test_forward_hooks_run_with_state_of_their_own() -> None:
    net, seen = made(lambda: nn.Linear(3, 3)), list[Any]()
    net[0].register_forward_hook(lambda m, inputs, output: seen.append(output) or 2 * output)
    expected = om.gradient_norms(Gaussian(made(lambda: nn.Linear(3, 3))), X)
    found = om.gradient_norms(Gaussian(net), X)
    assert seen == []
    key = "log_likelihood/0.weight"
    assert not torch.allclose(found[key], expected[key])


def test_the_older_weight_normalisation_by_hooks_is_followed() -> None:
    with pytest.warns(FutureWarning):
        net = made(lambda: weight_norm(nn.Linear(3, 3)))
    net(X)
    found = om.gradient_norms(Gaussian(net), X)
    assert (found["log_likelihood/2.weight_g"] > 0).all()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("in_place", [True, False], ids=["compiled in place", "wrapped"])
def test_layers_of_a_compiled_model_can_be_hooked(in_place: bool) -> None:
    torch._dynamo.reset()
    net: Any = made(lambda: nn.Linear(3, 3)).eval()
    compiled: Any = net
    if in_place:
        net.compile(backend="eager")
    else:
        compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(X)
    calls: list[int] = []
    with scoring_view(compiled) as view:
        layer = next(m for m in view.modules() if isinstance(m, nn.Linear))
        layer.register_forward_pre_hook(recording(calls))
        assert torch.equal(view(X), net(X))
    assert calls == [1]
    assert [name for name, _ in view.named_parameters()] == [
        name for name, _ in compiled.named_parameters()
    ]
    assert not net[0]._forward_pre_hooks


# What a copy is made of


@dataclass
class Pieces:
    net: nn.Module
    others: tuple[nn.Module, ...] = ()


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


Pair = namedtuple("Pair", ["name", "net"])

#: Ways to hold a module, each with how it is found in there.
HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "list": (lambda m: [1, m], lambda h: h[1]),
    "tuple": (lambda m: (1, (m,)), lambda h: h[1][0]),
    "named tuple": (lambda m: Pair("a", m), lambda h: h.net),
    "dict": (lambda m: {"a": {"b": m}}, lambda h: h["a"]["b"]),
    "dict's key": (lambda m: {m: 1}, lambda h: next(iter(h))),
    "ordered": (lambda m: OrderedDict(a=m), lambda h: h["a"]),
    "default": (lambda m: defaultdict(list, a=m), lambda h: h["a"]),
    "deque": (lambda m: deque([m], maxlen=3), lambda h: h[0]),
    "set": (lambda m: {m}, lambda h: next(iter(h))),
    "dataclass": (lambda m: Pieces(nn.Identity(), (m,)), lambda h: h.others[0]),
    "slots": (Slotted, lambda h: h.net),
    "namespace": (lambda m: SimpleNamespace(a=[m]), lambda h: h.a[0]),
    "bound method": (lambda m: m.forward, lambda h: h.__self__),
    "partial": (lambda m: functools.partial(lambda a, b: a, m, b=[m]), lambda h: h()),
    "closure": (lambda m: lambda: m, lambda h: h()),
    "default argument": (lambda m: lambda m=m: m, lambda h: h()),
    "weak reference": (weakref.ref, lambda h: h()),
    "beside a lock": (lambda m: {"a": threading.RLock(), "b": m}, lambda h: h["b"]),
    "beside a file": (lambda m: [io.StringIO(), m], lambda h: h[1]),
    "memoised": (lambda m: functools.lru_cache(lambda: m), lambda h: h()),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_the_module_holds_its_view(name: str) -> None:
    hold, found_in = HOLDERS[name]

    class Holding(om.Adapter):
        def __init__(self, net: nn.Module) -> None:
            self.module, self.held = net, hold(net)

        def log_likelihood(self, batch: Tensor) -> Any:
            raise AssertionError

    adapter = Holding(made(lambda: nn.Dropout(0.5)))
    view, in_place = scored(lambda p: (p.fresh(), p.in_place), adapter, adapter.module)
    assert not in_place
    assert found_in(view.held) is view.module is not adapter.module
    assert found_in(adapter.held) is adapter.module
    assert adapter.module.training
    assert not view.module.training


class Unlike(nn.Module):
    """What a forward pass can write into, other than buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.count, self.seen = 0, {"rows": [0]}
        self.tensor, self.array = torch.zeros(3), np.zeros(3)
        self.generator = torch.Generator().manual_seed(3)
        self.nested = (SimpleNamespace(calls=0), [torch.zeros(1)])

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen["rows"].append(len(x))
        self.seen[str(self.count)] = [0]
        self.tensor += 1
        self.array += 1
        self.nested[0].calls += 1
        self.nested[1][0].add_(1)
        torch.rand(1, generator=self.generator)
        assert self.count == self.tensor[0] == self.array[0] == self.nested[1][0] == 1
        return self.linear(x)


def test_each_pass_finds_and_leaves_a_model_as_its_user_left_it() -> None:
    net = Unlike()
    expected = Unlike()
    om.gradient_norms(Gaussian(net), X.float())
    assert (net.count, net.seen, net.nested[0].calls) == (0, {"rows": [0]}, 0)
    assert torch.equal(net.tensor, expected.tensor)
    assert (net.array == 0).all()
    assert net.nested[1][0] == 0
    assert torch.equal(net.generator.get_state(), expected.generator.get_state())


def test_parameters_share_their_storage_and_buffers_do_not() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.GRU(3, 3, dropout=0.5, num_layers=2))
    with scoring_view(net) as view:  # the first use is of copies
        assert next(view.parameters()).data_ptr() != next(net.parameters()).data_ptr()
    with scoring_view(net) as view:
        for own, original in zip(view.parameters(), net.parameters(), strict=True):
            assert own is not original
            assert own.data_ptr() == original.data_ptr()
        for own, original in zip(view.buffers(), net.buffers(), strict=True):
            assert own.data_ptr() != original.data_ptr()
            assert torch.equal(own, original)
        assert all(a is b for a, b in zip(view[1]._flat_weights, view[1].parameters(), strict=True))


def test_tensors_that_share_a_storage_share_one_in_a_view() -> None:
    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("whole", torch.zeros(2, 3))
            self.register_buffer("last", self.whole[1])

        def forward(self, x: Tensor) -> Tensor:
            self.whole[1] = 2.0
            return self.linear(x) * self.last

    net = Window().double()
    net.last = net.whole[1]  # `double` parts them
    adapter = om.LogLikelihood(net, lambda m, x: -0.5 * m(x).square().sum(1))
    found = om.gradient_norms(adapter, X)["log_likelihood/linear.bias"]
    assert (net.whole == 0).all()
    expected = (2 * net.linear(X) * 2).square().sum(1)
    torch.testing.assert_close(found, expected.detach())


def test_what_owns_a_resource_ends_with_its_user() -> None:
    ended = list[str]()

    class Owner:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            ended.append(self.name)

    class Module(nn.Linear):
        def __del__(self) -> None:
            ended.append("module")

    net = nn.Sequential(Module(3, 3), nn.Linear(3, 2)).double()
    net.held = Owner("held")
    om.gradient_norms(Gaussian(net), X)
    gc.collect()
    assert ended == []


class Slots:
    __slots__ = ("__weakref__", "scale")


class Slotted3(nn.Linear, Slots):
    """With an attribute in a slot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_attributes_in_slots_and_proxies_are_there() -> None:
    net = nn.Sequential(Slotted3(3, 3), nn.Linear(3, 2)).double()
    net[0].scale, net.held = 3.0, [weakref.proxy(net[0])]
    assert (om.gradient_norms(Gaussian(net), X)["log_likelihood/0.weight"] > 0).all()


@pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
def test_a_tensor_made_of_parameters_beforehand_has_its_gradient() -> None:
    """As a distribution has that is made once, of expanded parameters."""

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.prior = torch.distributions.Normal(self.loc, torch.ones(3, dtype=torch.float64))

        def log_prob(self, x: Tensor) -> Tensor:
            return self.prior.log_prob(x).sum(1)

    norms = om.gradient_norms(om.LogLikelihood(Prior()), X)
    torch.testing.assert_close(norms["log_likelihood/loc"], X.sum(1).square())
