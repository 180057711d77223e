"""Temporary state for scoring, and its restoration: a monitor leaves no trace."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["device_of", "dtype_of", "leaf_parameters", "precision_of", "undisturbed"]

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()

#: Whether what uses a model has ever drawn from a global generator.
_draws: WeakIdKeyDictionary = WeakIdKeyDictionary()


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a module without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of the first floating-point parameter; the default for a module without any."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, default)


def precision_of(tensor: Tensor) -> torch.dtype:
    """The type that has the bits of a tensor's products, which may be fewer than its own.

    CUDA convolves float32 as TF32, of float16's ten bits, unless told otherwise, and both it and
    the CPU may be told to multiply so, or as bfloat16.
    """
    if tensor.dtype != torch.float32:
        return tensor.dtype
    backends: Any = torch.backends
    settings = {
        "cuda": (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        "cpu": (backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    }
    chosen = {setting.fp32_precision for setting in settings.get(tensor.device.type, ())}
    if "bf16" in chosen:
        return torch.bfloat16
    return torch.float16 if "tf32" in chosen else torch.float32


@contextmanager
def undisturbed(module: nn.Module, by: object = None) -> Iterator[None]:
    """Eval mode, gradients on, inference mode and autocast off; all as before afterwards.

    Restored on success and on any exception: the train flag of every submodule, buffers (values
    and identity), the random state of the CPU and of the module's device. Scorers of one module in
    several threads take turns. What draws nothing on its first use is not looked at again: another
    thread's draws are its own, and never rolled back.

    Args:
        module: The model.
        by: What uses it, if one model is used in several ways; the model itself by default.
    """
    device = device_of(module)
    with ExitStack() as stack:
        stack.enter_context(_lock_of(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_random_state(device, module if by is None else by))
        stack.enter_context(_buffers(module))
        stack.enter_context(_usable_parameters(module))
        stack.enter_context(_eval_mode(module))
        yield


@contextmanager
def leaf_parameters(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The parameters as leaves that require gradients, by name, in module order.

    The floating-point and the complex ones, that is.
    """
    parameters = module.named_parameters()
    named = {name: p for name, p in parameters if p.is_floating_point() or p.is_complex()}
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
    recurrent = {m: m.dropout for m in module.modules() if isinstance(m, nn.RNNBase)}
    try:
        for submodule in training:
            submodule.training = False
        # CUDA gives these no gradient in eval mode. In train mode they do the same, but dropout.
        for layer in recurrent:
            layer.training, layer.dropout = True, 0.0
        yield
    finally:
        for layer, dropout in recurrent.items():
            layer.training, layer.dropout = False, dropout
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


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether this thread draws from a global generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags and _draws_globally(
            func._schema.arguments, args, kwargs
        )
        return func(*args, **kwargs)


def _draws_globally(parameters: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    values = defaults | given
    # Attention could draw for its dropout.
    return values.get("generator") is None and values.get("dropout_p") != 0


@contextmanager
def _random_state(device: torch.device, by: object) -> Iterator[None]:
    known = by in _draws
    if known and not _draws[by]:
        yield
        return
    states, draws = _states(device), _Draws()
    try:
        with draws:
            yield
        _draws[by] = known or draws.seen
    finally:
        if draws.seen:
            for set_, state in states:
                set_(state)


def _states(device: torch.device) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Random states, each with what sets it."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = []
    states.append((torch.set_rng_state, torch.get_rng_state()))
    if device.type not in ("cpu", "meta"):
        backend = torch.get_device_module(device)
        states.append((partial(_set_on, backend, device), backend.get_rng_state(device)))
    return states


def _set_on(backend: ModuleType, device: torch.device, state: Tensor) -> None:
    backend.set_rng_state(state, device)
