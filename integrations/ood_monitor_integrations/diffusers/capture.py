"""What a call does, seen from outside: its denoiser's arguments, its scheduler's steps.

Pipelines differ in everything but this: they call a denoiser, and step a scheduler with what it
predicts. Both are watched in place and for the calling thread only, which a context variable says;
every other user of a shared denoiser or scheduler pays a look at that variable.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.processes import Lock

__all__ = ["Capture", "DenoiserCall", "capturing", "hooked", "sample_argument", "stepping"]

_active: ContextVar["Capture | None"] = ContextVar("ood_monitor_capture", default=None)
#: Taken again where the interpreter collects, within it, a block that was never left.
_lock = Lock()


@dataclass(frozen=True)
class DenoiserCall:
    """What is needed of a pipeline's call to replay its denoiser elsewhere.

    Attributes:
        sample: What the scheduler's last step gave, shape (S, ...), in the denoiser's own layout.
        stepped: What that step was given, of the same shape.
        noisy: The denoiser's input at that step, shape (N, ...).
        arguments: The denoiser's further arguments, by name.
        control: The arguments of a ControlNet's call, by name; None without one.
        times: The denoiser's time and the scheduler's, at the first step.
    """

    sample: Tensor
    stepped: Tensor
    noisy: Tensor
    arguments: Mapping[str, Any]
    control: Mapping[str, Any] | None
    times: tuple[float, float]


@dataclass
class Capture:
    """Records one call as it runs; of all its steps the last is kept.

    Of several denoiser calls within a step the first counts: guidance in two calls begins with the
    conditional one, and guidance by skipped layers comes after it.
    """

    denoiser: nn.Module
    controlnet: nn.Module | None = None
    _pending: dict[int, dict[str, Any]] = field(default_factory=dict)
    _kept: dict[int, dict[str, Any]] = field(default_factory=dict)
    _step: tuple[Tensor, Tensor] | None = None
    _times: tuple[float, float] | None = None

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take a call of a watched module."""
        if id(module) not in self._pending:
            self._pending[id(module)] = _bound(module, args, kwargs)

    def step(self, time: Any, sample: Tensor, previous: Tensor) -> None:
        """Take a step of the scheduler."""
        if self._pending:
            self._kept, self._pending = self._pending, {}
        # A copy, since what follows may write into it.
        self._step = sample.detach(), previous.detach().clone()
        called = self._kept.get(id(self.denoiser))
        if self._times is None and called is not None:
            self._times = _number(called["timestep"]), _number(time)

    def call(self) -> DenoiserCall:
        """What was recorded.

        Raises:
            RuntimeError: The call did not use its denoiser, or did not step its scheduler.
        """
        called = self._kept.get(id(self.denoiser))
        if called is None or self._step is None or self._times is None:
            raise RuntimeError(
                f"Expected a call that runs {type(self.denoiser).__name__} and steps its "
                "scheduler, got none."
            )
        arguments = dict(called)
        noisy = arguments.pop(sample_argument(self.denoiser))
        stepped, sample = self._step
        control = None if self.controlnet is None else self._kept.get(id(self.controlnet))
        return DenoiserCall(sample, stepped, noisy, arguments, control, self._times)


@contextmanager
def capturing(capture: Capture | None) -> Iterator[None]:
    """Record what this thread calls within the block; None stops an outer recording."""
    token = _active.set(capture)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass
class _Shared:
    """What several blocks put on one object, and how many of them there are.

    A block counts itself before all else. What the interpreter collects meanwhile, a pipeline that
    nobody detached, may end another block in the same thread and finds this one counted.
    """

    users: int = 0
    put: Any = None

    @classmethod
    def joined(cls, among: dict[int, "_Shared"], key: int) -> "_Shared":
        """The one of an object, with another user."""
        while True:
            shared = among.setdefault(key, cls())
            shared.users += 1
            if among.get(key) is shared:  # else its last user left before it was counted
                return shared

    def left(self, among: dict[int, "_Shared"], key: int) -> bool:
        """Whether that was the last user."""
        self.users -= 1
        if self.users == 0:
            del among[key]
        return self.users == 0


_hooks: dict[int, _Shared] = {}


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    """Watch a module's calls; one hook, however many watch it."""
    with _lock:
        shared = _Shared.joined(_hooks, id(module))
        if shared.put is None:
            shared.put = module.register_forward_pre_hook(_before_forward, with_kwargs=True)
    try:
        yield
    finally:
        with _lock:
            if shared.left(_hooks, id(module)):
                shared.put.remove()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # of a module that is compiled in place, whose hooks would be too
def _before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
    # Without keywords when the hook is removed while another thread is about to call it.
    capture = _active.get()
    if capture is not None and kwargs is not None:
        capture.forward(module, args, kwargs)


_stepped: dict[int, _Shared] = {}


@contextmanager
def stepping(scheduler: Any) -> Iterator[None]:
    """Watch a scheduler's steps; one patch of the instance, however many calls share it."""
    with _lock:
        shared = _Shared.joined(_stepped, id(scheduler))
        if shared.put is None:
            own = scheduler.__dict__.get("step")
            shared.put = (own,)
            # Bound, so that a deep copy of the scheduler steps itself.
            scheduler.__dict__["step"] = MethodType(_recorded(scheduler, own), scheduler)
    try:
        yield
    finally:
        with _lock:
            if shared.left(_stepped, id(scheduler)):
                [own] = shared.put
                if own is None:
                    del scheduler.__dict__["step"]
                else:
                    scheduler.__dict__["step"] = own


def _recorded(scheduler: Any, own: Callable[..., Any] | None) -> Callable[..., Any]:
    original = type(scheduler).step

    @functools.wraps(original)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *a: Any, **k: Any) -> Any:
        step = own or functools.partial(original, self)
        output = step(model_output, timestep, sample, *a, **k)
        capture = _active.get()
        if capture is not None:
            previous = output[0] if isinstance(output, tuple) else output.prev_sample
            capture.step(timestep, sample, previous)
        return output

    return step


def sample_argument(module: nn.Module) -> str:
    """The name by which a denoiser takes what it denoises.

    Raises:
        TypeError: It takes no sample with a time.
    """
    names = _signature_of(module).parameters
    found = [name for name in ("sample", "hidden_states") if name in names]
    if not found or "timestep" not in names:
        raise TypeError(
            "Expected a denoiser that takes `sample` or `hidden_states`, and `timestep`, got "
            f"{type(_original(module)).__name__}, which takes {list(names)[1:]}."
        )
    return found[0]


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature_of(module).bind(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


def _original(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def _signature_of(module: nn.Module) -> inspect.Signature:
    kind: Any = type(_original(module))
    return _signature(kind)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _number(time: Any) -> float:
    return float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
