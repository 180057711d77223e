"""Calls and steps, watched in place and for the calling thread only, which a context variable says.

Every other user of a shared denoiser or scheduler pays a look at that variable.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from ood_monitor.processes import Lock
from ood_monitor_integrations.diffusers.capture import Capture

__all__ = ["capturing", "hooked", "stepping"]

#: What a scheduler's step is given, by diffusers' names.
_OF_STEP = ("timestep", "model_output", "sample")

_active: ContextVar[Capture | None] = ContextVar("ood_monitor_capture", default=None)
#: Taken again where the interpreter collects, within it, a block that was never left.
_lock = Lock()


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
            _drop_copied_hooks(module)
            shared.put = (
                module.register_forward_pre_hook(_before_forward, with_kwargs=True),
                module.register_forward_hook(_after_forward),
            )
    try:
        yield
    finally:
        with _lock:
            if shared.left(_hooks, id(module)):
                for handle in shared.put:
                    handle.remove()


def _drop_copied_hooks(module: nn.Module) -> None:
    """Take off what a copy of a watched module has of its original: each call would count twice."""
    tables = [module._forward_pre_hooks, module._forward_hooks]
    for table, hook in zip(tables, (_before_forward, _after_forward), strict=True):
        for key in [key for key, each in table.items() if each is hook]:
            del table[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # of a module that is compiled in place, whose hooks would be too
def _before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
    # Without keywords when the hook is removed while another thread is about to call it.
    capture = _active.get()
    if capture is not None and kwargs is not None:
        with capture.recording():
            capture.begin(module, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    capture = _active.get()
    if capture is not None:
        with capture.recording():
            capture.end(module, output)


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
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = (own or functools.partial(original, self))(*args, **kwargs)
        capture = _active.get()
        if capture is not None:
            with capture.recording():
                given = signature.bind(self, *args, **kwargs).arguments
                previous = output[0] if isinstance(output, tuple) else output.prev_sample
                capture.step(self, *_taken(given), previous)
        return output

    return step


def _taken(given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Of a scheduler's step the time, the prediction and the sample.

    Raises:
        ValueError: It has other names for them.
    """
    if not set(_OF_STEP) <= given.keys():
        raise ValueError(
            f"Expected a scheduler whose step takes {', '.join(_OF_STEP)}, got one that takes "
            f"{', '.join(list(given)[1:])}."
        )
    time, prediction, sample = (given[name] for name in _OF_STEP)
    return time, prediction, sample
