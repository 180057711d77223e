"""A model that another thread trains is scored beside it, and what cannot be is refused."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from support.forks import child
from support.model_case import Gaussian
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.modules import scoring_in_place
from ood_monitor.modules.in_place import restored

X = torch.randn(8, 3)


class Observed(nn.Sequential):
    """Counts forward passes, and those in which some layer is not in train mode."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.modes: dict[int, list[bool]] = {}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
            self.modes.setdefault(threading.get_ident(), []).append(layer.training)
        return x


def net() -> Observed:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2)
    return Observed(*layers, nn.BatchNorm1d(2))


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Another thread that does the same again and again."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(loop)
        try:
            yield
        finally:
            stop.set()
        done.result()


@pytest.mark.parametrize("training", [1, 2])
def test_forward_passes_in_train_mode_of_other_threads_stay_in_train_mode(training: int) -> None:
    model, alone = net(), net()
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(i)) for i in range(100)]
    adapter = Gaussian(model)
    with ThreadPoolExecutor(training) as pool, beside(lambda: om.gradient_norms(adapter, X)):
        trained = [pool.submit(lambda: [model(x) for x in batches]) for _ in range(training)]
        for future in trained:
            future.result()
    assert all(all(modes) for modes in model.modes.values())
    assert sum(map(len, model.modes.values())) == training * 5 * len(batches)
    for _ in range(training):
        for x in batches:
            alone(x)
    if training == 1:  # every update of the statistics is there, and in its order
        assert torch.equal(model[1].running_mean, alone[1].running_mean)
    assert model[1].num_batches_tracked == alone[1].num_batches_tracked


def test_scores_of_a_model_are_the_same_while_it_runs_in_train_mode() -> None:
    model = net().requires_grad_(False)
    for layer in (model[1], model[4]):
        layer.momentum = 0.0  # statistics that stay as they are
    adapter = Gaussian(model)
    expected = om.gradient_norms(adapter, X)
    with beside(lambda: model(torch.randn(8, 3))):
        for _ in range(20):
            found = om.gradient_norms(adapter, X)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_threads_score_one_model_at_once() -> None:
    adapter = Gaussian(net())
    expected = om.gradient_norms(adapter, X)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: om.gradient_norms(adapter, X), range(20)):
            assert all(torch.equal(found[key], expected[key]) for key in expected)


GLOBAL = net()


class OfAGlobal(om.Adapter):
    """An adapter that reaches its model by a global variable."""

    def __init__(self) -> None:
        self.module = GLOBAL

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "log_likelihood", -0.5 * GLOBAL(batch).square().sum(1)


def test_what_reaches_its_model_by_a_global_is_scored_in_place_and_put_back() -> None:
    expected = om.gradient_norms(Gaussian(GLOBAL, lambda m, x: m(x)), X)
    before = {name: value.clone() for name, value in GLOBAL.state_dict().items()}
    for _ in range(2):
        found = om.gradient_norms(OfAGlobal(), X)
        assert all(layer.training for layer in GLOBAL.modules())
        assert all(torch.equal(v, before[k]) for k, v in GLOBAL.state_dict().items())
        assert not any(layer._forward_pre_hooks for layer in GLOBAL.modules())
    assert found.keys() == expected.keys()
    assert not torch.equal(found["log_likelihood/0.weight"], torch.zeros(8))


class Keeping(nn.Module):
    """Keeps a weight that it has computed, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.cache = nn.Parameter(torch.ones(3, 3)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.raw.tanh()
        if "weight" not in self.cache:
            self.cache["weight"] = self.raw.tanh()
        return x @ self.cache["weight"]


KEEPING = Keeping()


def test_what_a_model_in_place_keeps_of_a_pass_is_gone_for_the_next() -> None:
    class OfKeeping(om.Adapter):
        module = KEEPING

        def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
            yield "log_likelihood", -0.5 * KEEPING(batch).square().sum(1)

    found = om.gradient_norms(OfKeeping(), X)["log_likelihood/raw"]
    exact = om.gradient_norms(Gaussian(Keeping(), lambda m, x: m(x)), X)
    assert (found > 0).all()
    assert KEEPING.cache == {}
    assert found.shape == exact["log_likelihood/raw"].shape


def test_a_model_in_place_refuses_other_threads_train_mode_and_only_that() -> None:
    model = net()
    with restored(model), ThreadPoolExecutor(1) as pool:
        model(X)
        with pytest.raises(RuntimeError, match="another thread scores it"):
            pool.submit(model, X).result()
    model(X)
    model.eval()
    with restored(model), ThreadPoolExecutor(1) as pool:
        pool.submit(model, X).result()


def test_a_model_in_place_keeps_its_parameters_hooks_out() -> None:
    model, calls = net(), list[int]()
    for parameter in model.parameters():
        parameter.register_hook(lambda g: calls.append(1))
    with restored(model):
        model(X).sum().backward()
    assert calls == []
    assert all(parameter.grad is None for parameter in model.parameters())
    model(X).sum().backward()
    assert calls


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_process_forked_meanwhile_has_the_model_as_it_was() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    entered, leave = threading.Event(), threading.Event()

    def score() -> None:
        with scoring_in_place(model, model):
            model.modes["kept"] = []  # type: ignore[index]
            model[0].weight.requires_grad_(True)
            entered.set()
            leave.wait()

    def is_as_it_was() -> bool:
        model(X)
        with restored(model):
            model(X)
        flags = [layer.training for layer in (model, *model)]
        return all(flags) and not model[0].weight.requires_grad and "kept" not in model.modes

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(score)
        entered.wait()
        found = child(is_as_it_was), not model[1].training
        leave.set()
        done.result()
    assert found == (True, True)
    assert is_as_it_was()
