"""Modules that newcomers met the scoring view with: exact values and norms, and nothing changed."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import ood_monitor as om
from ood_monitor.adapters.base import term_values
from ood_monitor.testing import check_adapter

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()


class Scored(nn.Module):
    """log_prob of what `output` gives."""

    def output(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * (self.output(x) - x).square().sum(1)


class SpectralLSTM(Scored):
    """Power iterations in train mode, by the older hook, which asks the layer for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.utils.spectral_norm(nn.LSTM(4, 4, batch_first=True), "weight_hh_l0")

    def output(self, x: Tensor) -> Tensor:
        found: Tensor = self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1]
        return found


class OwnGRU(nn.GRU):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(2 * x if self.training else x)


class WithOwnGRU(Scored):
    def __init__(self) -> None:
        super().__init__()
        self.gru = OwnGRU(4, 4, batch_first=True)

    def output(self, x: Tensor) -> Tensor:
        found: Tensor = self.gru(x[:, None])[0][:, -1]
        return found


class ResetByTrain(Scored):
    """Forgets in train mode what it has counted."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.ones(4))

    def train(self, mode: bool = True) -> Any:
        if mode and "seen" in self._buffers:
            self.seen.zero_()
        return super().train(mode)

    def output(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.seen  # type: ignore[no-any-return]


class AveragedInEval(Scored):
    """Averaged weights in eval mode, its own ones in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.own, self.average = (self.layer.weight.detach().clone() * f for f in (1.0, 0.5))
        self.is_average = False

    def train(self, mode: bool = True) -> Any:
        if hasattr(self, "is_average") and self.is_average == mode:
            with torch.no_grad():
                self.layer.weight.copy_(self.own if mode else self.average)
            self.is_average = not mode
        return super().train(mode)

    def output(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Doubling(nn.DataParallel):
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return 2 * self.module(*inputs, **kwargs)


class InAWrapper(Scored):
    def __init__(self) -> None:
        super().__init__()
        self.parallel: Any = Doubling(nn.Linear(4, 4))

    def output(self, x: Tensor) -> Tensor:
        found: Tensor = self.parallel(x)
        return found


class Child(nn.Module):
    def __init__(self, parent: "OfAParent") -> None:
        super().__init__()
        self.parent = weakref.ref(parent)
        self.layer = nn.Linear(4, 4)

    def log_prob(self, x: Tensor) -> Tensor:
        parent = self.parent()
        scale = 1.0 if parent is None else parent.scale
        return -0.5 * (scale * self.layer(x) - x).square().sum(1)


class OfAParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25
        self.child = Child(self)


KEPT = OfAParent()  # which holds the parent of a child that is scored


class Masked(Scored):
    """Its weight is masked in place whenever it is called, as in many a PixelCNN and MADE."""

    def __init__(self, write: Callable[[nn.Linear, Tensor], None]) -> None:
        super().__init__()
        self.layer, self.write = nn.Linear(4, 4), write
        self.mask = torch.ones(4, 4).tril(-1).double()

    def output(self, x: Tensor) -> Tensor:
        self.write(self.layer, self.mask)
        found: Tensor = self.layer(x)
        return found


def by_data(layer: nn.Linear, mask: Tensor) -> None:
    layer.weight.data *= mask


def without_gradients(layer: nn.Linear, mask: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(mask)


def by_items(layer: nn.Linear, mask: Tensor) -> None:
    layer.weight.data[mask == 0] = 0


class MovedRows(Scored):
    """Sorts its rows past PyTorch's count of writes, and puts them back in order at the end."""

    def __init__(self, move: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.layer, self.move = nn.Linear(4, 4), move

    def output(self, x: Tensor) -> Tensor:
        order, h = x[:, 0].argsort(), x.clone()
        self.move(h, order)
        found: Tensor = self.layer(h)[order.argsort()]
        return found


def copied(h: Tensor, order: Tensor) -> None:
    h.data.copy_(h.data[order])


def put(h: Tensor, order: Tensor) -> None:
    h.data[:] = h.data[order]


def in_numpy(h: Tensor, order: Tensor) -> None:
    h.numpy()[:] = h.numpy()[order.numpy()]


class OfALayer(Scored):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def output(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "spectral norm of an LSTM": SpectralLSTM,
    "a GRU with a mode of its own": WithOwnGRU,
    "reset by train()": ResetByTrain,
    "averaged in eval mode": lambda: AveragedInEval().eval(),
    "a wrapper that does more": InAWrapper,
    "a weak reference to a parent": lambda: KEPT.child,
    "masked by .data": lambda: Masked(by_data),
    "masked in place": lambda: Masked(without_gradients),
    "masked by items": lambda: Masked(by_items),
    "rows copied": lambda: MovedRows(copied),
    "rows put": lambda: MovedRows(put),
    "rows moved in NumPy": lambda: MovedRows(in_numpy),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    module: Any = FOREIGN[name]().double().eval()
    module.log_prob(X)
    return module


def state(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def by_the_loop(module: Any) -> dict[str, list[float]]:
    """Of each parameter, squared norms sample by sample, of the module itself."""
    found: dict[str, list[float]] = {name: [] for name, _ in module.named_parameters()}
    for i in range(len(X)):
        module.zero_grad()
        module.log_prob(X[i : i + 1]).sum().backward()
        for name, parameter in module.named_parameters():
            grad = parameter.grad
            found[name].append(0.0 if grad is None else float(grad.square().sum()))
    module.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:The fast path disagrees")
@pytest.mark.parametrize("name", FOREIGN)
def test_values_and_norms_are_the_users_and_the_weights_too(name: str) -> None:
    module = made(name)
    adapter = om.LogLikelihood(module, sample="row")
    om.gradient_norms(adapter, X[:2])
    with torch.no_grad():  # a training step
        next(p for key, p in module.named_parameters() if "weight" in key).add_(0.1)
    before = state(module)
    for _ in range(2):
        norms = om.gradient_norms(adapter, X)
        values = term_values(adapter, X)["log_likelihood"]
    after = state(module)
    assert all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(values, module.log_prob(X).detach())
    for key, wanted in by_the_loop(module).items():
        torch.testing.assert_close(norms[f"log_likelihood/{key}"].tolist(), wanted)


def test_backward_hooks_of_the_process_are_not_called_and_change_nothing() -> None:
    class Two(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.register_forward_pre_hook(lambda m, args: (2 * args[0],))
            self.a.register_forward_hook(lambda m, args, out: out + 1)
            self.b.register_forward_pre_hook(lambda m, a, k: (a, k), with_kwargs=True)
            self.b.register_forward_hook(lambda m, a, k, out: 3 * out, with_kwargs=True)

        def output(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(self.a(x).tanh())
            return found

    module = Two().double()
    wanted, calls = om.gradient_norms(om.LogLikelihood(module), X), []

    def scaled(module: nn.Module, came: Any, out: Any) -> Any:
        calls.append(module)
        return tuple(None if g is None else 0.1 * g for g in came)

    handle = torch_module.register_module_full_backward_hook(scaled)
    try:
        found = om.gradient_norms(om.LogLikelihood(module), X)
    finally:
        handle.remove()
    assert not calls
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])


def test_a_hook_that_removes_itself_is_still_there_for_its_user() -> None:
    layer = nn.Linear(4, 4).double()

    def once(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()

    handle = layer.register_forward_pre_hook(once, with_kwargs=True)
    om.gradient_norms(om.LogLikelihood(OfALayer(layer)), X)
    assert len(layer._forward_pre_hooks) == len(layer._forward_pre_hooks_with_kwargs) == 1
    layer(X)  # the user's own first call
    assert len(layer._forward_pre_hooks) == len(layer._forward_pre_hooks_with_kwargs) == 0


class Counting(Scored):
    """Remembers its calls wherever one can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.nested = {"a": {"b": [0]}}
        self.tensor, self.queue, self.seen = torch.zeros(()), deque([0], maxlen=9), {0}
        self.held = type("Held", (), {})()
        self.held.calls = []

    def output(self, x: Tensor) -> Tensor:
        self.nested["a"]["b"].append(1)
        self.tensor.add_(1)
        self.queue.append(1)
        self.seen.add(len(self.seen))
        self.held.calls.append(1)
        found: Tensor = self.layer(x)
        return found

    def told(self) -> tuple[Any, ...]:
        held = self.held.calls
        return self.nested["a"]["b"], float(self.tensor), list(self.queue), self.seen, held


GLOBAL: dict[str, Counting] = {}


class ByAGlobal(om.Adapter):
    """Scored in place, since it runs the user's own module."""

    def __init__(self) -> None:
        self.module = GLOBAL["module"] = Counting().double()

    def log_likelihood(self, batch: Tensor) -> Any:
        yield "log_likelihood", GLOBAL["module"].log_prob(batch)


def test_what_is_scored_in_place_remembers_nothing() -> None:
    adapter = ByAGlobal()
    before = repr(GLOBAL["module"].told())
    for _ in range(2):
        om.gradient_norms(adapter, X)
    assert repr(GLOBAL["module"].told()) == before


def test_what_a_training_shares_is_left_to_its_threads() -> None:
    class Trainer:
        steps = 0

    adapter = ByAGlobal()
    trainer = adapter.module._trainer = Trainer()

    class Stepping(ByAGlobal):
        def __init__(self) -> None:
            self.module = adapter.module

        def log_likelihood(self, batch: Tensor) -> Any:
            trainer.steps += 1  # as another thread would
            return super().log_likelihood(batch)

    om.gradient_norms(Stepping(), X)
    assert trainer.steps > 0


def test_check_adapter_leaves_caches_flags_and_attributes() -> None:
    class CachedInEval(nn.Linear):
        cache: Tensor | None = None

        def train(self, mode: bool = True) -> Any:
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return super().forward(x)
            self.cache = 2 * self.weight if self.cache is None else self.cache
            return nn.functional.linear(x, self.cache / 2, self.bias)

    class Careless(om.LogLikelihood):
        calls = 0

        def log_likelihood(self, batch: Tensor) -> Any:
            self.calls += 1
            return super().log_likelihood(batch)

    layer = CachedInEval(4, 4).double()
    module = OfALayer(layer).train()
    adapter = Careless(module)
    check_adapter(adapter, X)
    assert layer.cache is None
    assert module.training
    assert adapter.calls == 0


def test_check_adapter_names_a_model_that_is_another_in_a_copy() -> None:
    class Registered(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            SCALES[self] = 0.25

        def output(self, x: Tensor) -> Tensor:
            return SCALES.get(self, 1.0) * self.layer(x)  # type: ignore[no-any-return]

    with pytest.raises(AssertionError, match="the same by the copy that scoring makes"):
        check_adapter(om.LogLikelihood(Registered().double()), X)


SCALES: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()


def test_samples_that_meet_only_in_larger_batches_are_refused() -> None:
    class Capacity(Scored):
        """An expert that takes four samples of a batch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def output(self, x: Tensor) -> Tensor:
            return self.layer(x) * (torch.arange(len(x)) < 4)[:, None]  # type: ignore[no-any-return]

    adapter = om.LogLikelihood(Capacity().double())
    om.gradient_norms(adapter, X[:2])
    with pytest.raises(ValueError, match="the same alone and in a batch"):
        om.gradient_norms(adapter, X)
    assert om.gradient_norms(om.LogLikelihood(Capacity().double()), X, chunk_size=3)


@pytest.mark.parametrize("weights", [[1.0] * 6, (1.0,) * 6, torch.ones(6).numpy()])
def test_what_is_not_cut_with_a_batch_is_refused_where_one_is_cut(weights: Any) -> None:
    class Weighted(om.Adapter):
        def __init__(self) -> None:
            self.module = nn.Linear(4, 4).double()

        def log_likelihood(self, batch: Any) -> Any:
            value = -self.module(batch["x"]).square().sum(1)
            yield "log_likelihood", value * torch.as_tensor(batch["w"])[: len(value)]

    batch = {"x": X, "w": weights}
    assert om.gradient_norms(Weighted(), {"x": X, "w": torch.as_tensor(weights)}, chunk_size=4)
    with pytest.raises(ValueError, match=r"Expected Weighted to use .* got a use of batch\['w'\]"):
        om.gradient_norms(Weighted(), batch, chunk_size=4)
