"""A score leaves no trace, and keeps no activation."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.model_case import Function, Gaussian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ood_monitor as om
from ood_monitor.statistics import expected_layers, forward_statistics


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)),
    )


def state_of(module: nn.Module) -> Any:
    return [
        (
            {key: id(value) for key, value in vars(part).items()},
            part.training,
            [dict(table) for table in (part._forward_pre_hooks, part._forward_hooks)],
            [(id(b), b._version, b.clone().tolist()) for b in part.buffers()],
            [(id(p), p._version, p.grad) for p in part.parameters()],
        )
        for part in module.modules()
    ]


class Own(om.Adapter):
    """Reaches the user's own module, so that it is scored in place."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.other = module, [lambda x: WHERE["it stands"](x)]

    def log_likelihood(self, batch: Tensor) -> Any:
        yield "log_likelihood", WHERE["it stands"](batch).square().sum(1)


WHERE: dict[str, nn.Module] = {}


@pytest.mark.parametrize("in_place", [False, True])
def test_the_model_is_left_as_it_was(in_place: bool) -> None:
    torch.manual_seed(0)
    module = WHERE["it stands"] = network().train()
    adapter = Own(module) if in_place else Gaussian(module)
    x = torch.randn(4, 3, 6, 6)
    before, kept = state_of(module), torch.get_rng_state()
    found = forward_statistics(adapter, x, sample=None)
    assert state_of(module) == before
    assert torch.equal(torch.get_rng_state(), kept)
    assert list(found.expected_norms) == ["0", "4", "7"]
    torch.testing.assert_close(found.expected_norms["0"], x.square().sum((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_are_taken_off_after_an_error(in_place: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        if x[0, 0] > 100:
            raise RuntimeError("of the model's own")
        return y  # type: ignore[no-any-return]

    module = WHERE["it stands"] = Function(forward, f=nn.Linear(3, 3))
    adapter = Own(module) if in_place else Gaussian(module)
    forward_statistics(adapter, torch.zeros(4, 3), sample=None)
    with pytest.raises(RuntimeError, match="of the model's own"):
        forward_statistics(adapter, torch.full((4, 3), 200.0), sample=None)
    assert not module.f._forward_pre_hooks  # type: ignore[union-attr]


def test_two_hundred_scores_leave_memory_as_it_was() -> None:
    module = network()
    adapter, x = Gaussian(module), torch.randn(4, 3, 6, 6)
    layers = expected_layers(adapter, x)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(3):
        forward_statistics(adapter, x, sample=None, layers=layers)
    before, state = tensors(), state_of(module)
    for _ in range(200):
        forward_statistics(adapter, x, sample=None, layers=layers)
    assert tensors() == before
    assert state_of(module) == state


INSIDE, DONE = threading.Event(), threading.Event()


class Slow(nn.Module):
    """Waits in the main thread until another has run."""

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            INSIDE.set()
            assert DONE.wait(30)
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_another_thread_that_runs_the_model_is_not_counted(in_place: bool) -> None:
    """One that trains it; where it is scored in place, one that runs it in eval mode."""
    torch.manual_seed(0)
    DONE.set()
    module = nn.Sequential(nn.Linear(3, 3), Slow(), nn.Linear(3, 3)).train(not in_place)
    WHERE["it stands"] = module
    adapter, x = Own(module) if in_place else Gaussian(module), torch.randn(1, 3)
    layers = expected_layers(adapter, x)
    INSIDE.clear()
    DONE.clear()

    def run() -> None:
        assert INSIDE.wait(30)
        assert module.training != in_place
        for _ in range(5):
            module(torch.randn(7, 3)).sum().backward()
        DONE.set()

    other = threading.Thread(target=run)
    other.start()
    found = forward_statistics(adapter, x, sample=None, layers=layers)
    other.join()
    torch.testing.assert_close(found.expected_norms["0"], x.square())
    hidden = module[0](x).detach()
    torch.testing.assert_close(found.expected_norms["2"], hidden.square())


class Sizes(TorchDispatchMode):
    """How large the tensors are that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.made.append(result.numel())
        return result


def sizes(run: Callable[[], object]) -> list[int]:
    with Sizes() as seen:
        run()
    return sorted(seen.made)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), (8, 800, 8)),
        (nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)), (4, 8, 20, 20)),
    ],
)
def test_a_score_makes_nothing_of_the_size_of_an_activation(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    x, adapter = torch.randn(shape), Gaussian(module.eval())
    layers = expected_layers(adapter, x)

    def score() -> None:
        forward_statistics(adapter, x, sample=None, layers=layers)

    def infer() -> None:
        with torch.no_grad():
            list(adapter.log_likelihood(x))

    score()
    inferred, scored = sizes(infer), sizes(score)
    largest = inferred[-1]
    assert largest >= 6 * x.numel()
    # Beside a copy of the input, which the model might write into.
    large = [size for size in scored if size > largest // 6]
    assert large == [size for size in inferred if size > largest // 6]
