"""Temporary state for scoring, and its restoration: a monitor leaves no trace."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

__all__ = ["device_of", "dtype_of", "leaf_parameters", "undisturbed"]

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a module without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of the first floating-point parameter; the default for a module without any."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, default)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, inference mode and autocast off; all as before afterwards.

    Restored on success and on any exception: the train flag of every submodule, buffers (values
    and identity), the random state of the CPU and of the module's device. Scorers of one module in
    several threads take turns.
    """
    device = device_of(module)
    with ExitStack() as stack:
        stack.enter_context(_lock_of(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_random_state(device))
        stack.enter_context(_buffers(module))
        stack.enter_context(_usable_parameters(module))
        stack.enter_context(_eval_mode(module))
        yield


@contextmanager
def leaf_parameters(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The floating-point parameters as leaves that require gradients, by name, in module order."""
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    flags = {name: p.requires_grad for name, p in named.items()}
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        yield dict(named)
    finally:
        for name, flag in flags.items():
            named[name].requires_grad_(flag)


@contextmanager
def _usable_parameters(module: nn.Module) -> Iterator[None]:
    """Copies of parameters made under inference mode, which autograd can never use."""
    owners = [
        (owner, key, p)
        for owner in module.modules()
        for key, p in owner._parameters.items()
        if p is not None and p.is_inference()
    ]
    copies = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for _, _, p in owners}
    try:
        # By setattr: a recurrent layer keeps a second list of its weights in step with it.
        for owner, key, p in owners:
            setattr(owner, key, copies[id(p)])
        yield
    finally:
        for owner, key, p in owners:
            setattr(owner, key, p)


def _lock_of(module: nn.Module) -> threading.RLock:
    with _locks_guard:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    # The attribute, not `eval()`: users override `train`, and frozen submodules must stay as set.
    training = [submodule for submodule in module.modules() if submodule.training]
    try:
        for submodule in training:
            submodule.training = False
        yield
    finally:
        for submodule in training:
            submodule.training = True


@contextmanager
def _buffers(module: nn.Module) -> Iterator[None]:
    slots = [
        (owner._buffers, key, buffer, buffer.clone())
        for owner in module.modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]
    versions = [None if b.is_inference() else b._version for _, _, b, _ in slots]
    try:
        for owner, key, buffer, value in slots:
            if buffer.is_inference():  # autograd cannot save it; the copy stands in
                owner[key] = value
        yield
    finally:
        for (owner, key, buffer, value), version in zip(slots, versions, strict=True):
            owner[key] = buffer
            if version is not None and buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    get, set_ = torch.get_rng_state, torch.set_rng_state
    states = [(get, set_, get())]
    if device.type not in ("cpu", "meta"):
        backend = torch.get_device_module(device)
        get, set_ = partial(backend.get_rng_state, device), partial(_set_on, backend, device)
        states.append((get, set_, get()))
    try:
        yield
    finally:
        for get, set_, state in states:
            # Written only when it moved, so that another thread's draws are not rolled back.
            if not torch.equal(get(), state):
                set_(state)


def _set_on(backend: ModuleType, device: torch.device, state: Tensor) -> None:
    backend.set_rng_state(state, device)
