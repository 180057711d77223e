"""Scoring leaves no trace: on success, and when the model fails midway."""

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import MODELS, Function, Gaussian, Model, model, slow_if_heavy
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, tensors_in
from ood_monitor.gradients import gradient_norms
from ood_monitor.modules import device_of, leaf_parameters, precision_of, scoring_view

pytestmark = pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
models = pytest.mark.parametrize("case", [*map(slow_if_heavy, MODELS)])


class Failing(om.Adapter):
    """Another adapter until the given term is due, counted over all passes from 0."""

    class Error(Exception):
        pass

    def __init__(self, adapter: om.Adapter, due: int) -> None:
        self.module, self._adapter = adapter.module, adapter
        self._due, self._count = due, count()

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        for item in self._adapter.log_likelihood(batch):
            if next(self._count) == self._due:
                raise self.Error
            yield item


def mixed(module: nn.Module) -> nn.Module:
    """With flags set here and not there, and gradients from an earlier training step."""
    for i, parameter in enumerate(module.parameters()):
        parameter.grad = torch.ones_like(parameter) if i % 2 else None
        parameter.requires_grad_(i % 3 > 0)
    for i, submodule in enumerate(module.modules()):
        submodule.training = i % 2 == 0
    return module


def of_tensor(tensor: Tensor | None) -> Any:
    """What a tensor is, and holds, comparable by ==."""
    if tensor is None:
        return None
    values = tensor.detach().numpy().tobytes()
    return id(tensor), tensor.requires_grad, values, of_tensor(tensor.grad)


def of_submodule(submodule: nn.Module) -> dict[str, Any]:
    attributes = vars(submodule)
    tensors = attributes["_parameters"] | attributes["_buffers"]
    return {
        "training": submodule.training,
        "dropout": attributes.get("dropout"),
        "attributes": list(attributes),
        "hooks": {k: list(v) for k, v in attributes.items() if "hooks" in k},
        "tensors": {name: of_tensor(tensor) for name, tensor in tensors.items()},
        "versions": {
            name: p._version for name, p in submodule._parameters.items() if p is not None
        },
    }


def state(module: nn.Module, batch: Batch) -> dict[str, Any]:
    return {
        "random": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "function modes": torch._C._len_torch_function_stack(),
        "batch": [of_tensor(tensor) for tensor in tensors_in(batch)],
        **{name: of_submodule(submodule) for name, submodule in module.named_modules()},
    }


# Over all models


@models
def test_no_trace(case: Model) -> None:
    adapter, batch = case(torch.float32)
    before = state(mixed(adapter.module), batch)
    gradient_norms(adapter, batch)
    assert state(adapter.module, batch) == before


@models
@pytest.mark.parametrize("due", [0, 1], ids=["recorded", "looped"])
def test_no_trace_of_a_failure(case: Model, due: int) -> None:
    adapter, batch = case(torch.float32)
    before = state(mixed(adapter.module), batch)
    with pytest.raises(Failing.Error):
        gradient_norms(Failing(adapter, due), batch)
    assert state(adapter.module, batch) == before


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.float16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("due", [0, 3, 1000])
def test_no_trace_on_the_callers_mode(mode: Callable[[], Any], due: int) -> None:
    adapter, batch = model("glow")(torch.float32)
    with mode():
        before = state(adapter.module, batch)
        with suppress(Failing.Error):
            gradient_norms(Failing(adapter, due), batch)
        assert state(adapter.module, batch) == before


def test_no_trace_on_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    before = {name: of_tensor(p) for name, p in net.named_parameters()}
    gradient_norms(Gaussian(net), torch.randn(4, 3))
    assert {name: of_tensor(p) for name, p in net.named_parameters()} == before


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.slow
def test_a_thousand_scores_leave_state_and_memory_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    net[0].register_forward_hook(lambda *_: None)
    adapter, batch = Gaussian(net), torch.randn(2, 3)
    gradient_norms(adapter, batch)
    before, tensors = state(net, batch), live_tensors()
    for _ in range(1000):
        gradient_norms(adapter, batch)
    assert state(net, batch) == before
    assert live_tensors() == tensors


# Models that change themselves


class Restless(nn.Module):
    """Draws random numbers, writes into one buffer, replaces another and fails when told to."""

    def __init__(self, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.linear, self._error = nn.Linear(3, 3), error
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        self.written += 1
        self.replaced = self.replaced + 1
        if self._error:
            raise self._error
        return self.linear(x) + 0 * self.written


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_buffers_and_random_state_are_put_back(error: type[Exception] | None) -> None:
    net, batch = Restless(error), torch.randn(4, 3)
    before = state(net, batch)
    with pytest.raises(error) if error else nullcontext():
        gradient_norms(Gaussian(net), batch)
    assert state(net, batch) == before


def test_a_model_that_writes_into_its_input_does_not_change_the_batch() -> None:
    adapter = Gaussian(Function(lambda m, x: m.f(x.mul_(2)), f=nn.Linear(3, 2)))
    batch, kept = torch.ones(4, 3), torch.ones(4, 3)
    gradient_norms(adapter, batch)
    assert torch.equal(batch, kept)


# The pieces


@pytest.mark.parametrize("uses", [1, 3])
def test_what_another_thread_draws_meanwhile_is_not_rolled_back(uses: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.rand, 1).result()
        return m.f(x)

    adapter, batch = Gaussian(Function(forward, f=nn.Linear(3, 2))), torch.ones(4, 3)
    for _ in range(uses):
        before = torch.get_rng_state()
        gradient_norms(adapter, batch)
        assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize("generator", [None, torch.default_generator], ids=["none", "global"])
def test_what_a_model_draws_itself_is_rolled_back_each_time(
    uses: int, generator: torch.Generator | None
) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        torch.rand(1, generator=generator)
        return m.f(x)

    adapter, batch = Gaussian(Function(forward, f=nn.Linear(3, 2))), torch.ones(4, 3)
    for _ in range(uses):
        before = torch.get_rng_state()
        gradient_norms(adapter, batch)
        assert torch.equal(torch.get_rng_state(), before)


def test_leaf_parameters_are_the_floating_ones_in_order_and_require_gradients() -> None:
    net = Function(lambda m, x: x, a=torch.ones(2), b=nn.Linear(2, 2))
    net.c = nn.Parameter(torch.ones(2).long(), requires_grad=False)
    net.requires_grad_(False)
    with leaf_parameters(net) as leaves:
        assert list(leaves) == ["a", "b.weight", "b.bias"]
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in leaves.values())
        assert leaves["a"] is net.a
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_tied_parameters_made_in_inference_mode_stay_tied_in_a_view() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        net[1].weight = net[0].weight
    with scoring_view(net) as view:
        assert view[0].weight is view[1].weight is not net[0].weight
        assert view[0].weight.requires_grad


def test_device_of_a_module_without_parameters_is_the_cpu() -> None:
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")


#: Torch before 2.9 has one setting for all products, and none of TF32 for the CPU.
HAS_ONE_SETTING = not hasattr(torch.backends.cuda.matmul, "fp32_precision")
LATER = pytest.mark.skipif(HAS_ONE_SETTING, reason="torch has no such setting for the CPU")


@contextmanager
def multiplying_as(setting: str) -> Iterator[None]:
    """The CPU may round float32 so, where it is faster."""
    if HAS_ONE_SETTING:
        torch.set_float32_matmul_precision({"ieee": "highest", "bf16": "medium"}[setting])
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
        return
    backends: Any = torch.backends
    before = backends.mkldnn.matmul.fp32_precision
    try:
        backends.mkldnn.matmul.fp32_precision = setting
        yield
    finally:
        backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ieee", torch.float32),
        pytest.param(
            "tf32", torch.float16, marks=pytest.mark.skipif(HAS_ONE_SETTING, reason="torch 2.6")
        ),
        ("bf16", torch.bfloat16),
    ],
)
def test_precision_is_what_products_are_rounded_to(setting: str, expected: torch.dtype) -> None:
    with multiplying_as(setting):
        assert precision_of(torch.ones(1)) == expected
        for dtype in (torch.float64, torch.bfloat16, torch.int64):
            assert precision_of(torch.ones(1, dtype=dtype)) == dtype


def test_a_model_may_differ_alone_and_in_a_batch_by_the_rounding_of_its_products() -> None:
    def rounded(module: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = module(x)
        return output + 1e-3 * (len(x) == 1)

    adapter, batch = Gaussian(nn.Linear(3, 2), rounded), torch.rand(4, 3)
    with pytest.raises(ValueError, match="same alone and in a batch"):
        gradient_norms(adapter, batch)
    with multiplying_as("bf16"):
        gradient_norms(adapter, batch)
