"""Scoring a model where it stands, for what has no structural copy; put back afterwards."""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.modules.copies import SHARED
from ood_monitor.modules.shards import is_shard, is_sharded
from ood_monitor.modules.substitutes import takes_train_mode
from ood_monitor.processes import Lock, after_fork_in_child

__all__ = ["PythonState", "restored"]

#: What can be made anew by its items.
_COPIED = (dict, list, set, deque, OrderedDict)

#: How deep containers are looked into, how many of them, and the largest tensor that is kept.
_DEEPEST, _MOST_OBJECTS, _MOST_BYTES = 4, 20_000, 1 << 24

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
#: Of `_locks`, and of modules that are being changed or put back.
_guard = Lock()

#: What puts back each module that is scored now, and the thread that will.
_under_way: dict[ExitStack, int] = {}


@contextmanager
def restored(module: nn.Module) -> Iterator[ExitStack]:
    """The module itself in eval mode; flags, buffers and parameters as before afterwards.

    Scorers in several threads take turns. A forward pass of it in train mode in another thread is
    refused meanwhile, since it would run in eval mode.

    Args:
        module: The model.

    Yields:
        What is closed at the end, for more to be put back. In a process that another thread forks
        meanwhile it is closed at once: nobody would.
    """
    changes = ExitStack()
    with _lock_of(module):
        try:
            with _guard:
                _under_way[changes] = threading.get_ident()
                changes.enter_context(_buffers(module))
                changes.enter_context(_own_parameters(module))
                changes.enter_context(_refusing_others(module))
                changes.enter_context(_eval_mode(module))
            yield changes
        finally:
            with _guard:
                _under_way.pop(changes, None)
                changes.close()


def _put_back_others() -> None:
    """End, in a forked child, what the parent's other threads do with modules."""
    _locks.clear()
    for changes, thread in list(_under_way.items()):
        if thread != threading.get_ident():
            del _under_way[changes]
            changes.close()


after_fork_in_child(_put_back_others)


class PythonState:
    """Attributes of a module's parts and of its holder, to be put back after each pass.

    Containers and objects in them are looked into, and in these; so are tensors that are no
    parameter and no buffer. What the whole training shares, as Lightning's Trainer, is left alone:
    other threads change it.

    Args:
        module: The module, as it is scored.
        holder: What holds it, such as an adapter.
    """

    def __init__(self, module: nn.Module, holder: object = None) -> None:
        self._kept: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._seen: set[int] = {id(t) for t in (*module.parameters(), *module.buffers())}
        self._modules = {id(part) for part in module.modules()}
        # FSDP exchanges shards for whole weights, and keeps account of which there are.
        self._others = SHARED | {"_parameters"} if is_sharded(module) else SHARED
        for part in module.modules():
            self._keep(vars(part), 0)
        if not isinstance(holder, nn.Module) and hasattr(holder, "__dict__"):
            self._keep(vars(holder), 0)

    def _keep(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEPEST or len(self._seen) > _MOST_OBJECTS:
            return
        self._seen.add(id(value))
        if type(value) in _COPIED:
            self._kept.append((value, value.copy()))
            items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
            for key, item in list(items):
                if key not in self._others:
                    self._look_into(item, depth + 1)

    def _look_into(self, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self._seen and value.nbytes <= _MOST_BYTES and not _is_odd(value):
                self._seen.add(id(value))
                self._tensors.append((value, value._version, value.detach().clone()))
        elif type(value) in _COPIED:
            self._keep(value, depth)
        elif id(value) not in self._modules and not isinstance(value, nn.Module | type):
            if type(value).__module__.startswith("torch.distributed."):
                return
            own = getattr(value, "__dict__", None)
            if type(own) is dict and not isinstance(value, ModuleType | FunctionType):
                self._keep(own, depth)

    def put_back(self) -> None:
        """What was added is gone, and what was replaced is back."""
        for value, held in self._kept:
            if isinstance(value, dict):
                _put_back(value, held)
            elif isinstance(value, set):
                value.symmetric_difference_update(value ^ held)
            elif len(value) != len(held) or any(
                a is not b for a, b in zip(value, held, strict=True)
            ):
                value.clear()
                value.extend(held)
        with torch.no_grad():
            for tensor, version, held in self._tensors:
                if tensor._version != version:
                    tensor.copy_(held)


def _put_back(value: dict[Any, Any], held: dict[Any, Any]) -> None:
    for key in [key for key in value if key not in held]:
        del value[key]
    for key, item in held.items():
        if value.get(key) is not item:
            value[key] = item


def _is_odd(tensor: Tensor) -> bool:
    """Whether it has no version, or values that are not to be copied into."""
    return tensor.is_inference() or tensor.grad_fn is not None or tensor.is_meta


@contextmanager
def _own_parameters(module: nn.Module) -> Iterator[None]:
    """Others in place of parameters that hooks follow, or that autograd can never use."""
    owners = [
        (owner, key, p)
        for owner in module.modules()
        for key, p in owner._parameters.items()
        if p is not None and not is_shard(p) and (p.is_inference() or p._backward_hooks)
    ]
    own = {id(p): _own(p) for _, _, p in owners}
    try:
        # By setattr: a recurrent layer keeps a second list of its weights in step with it.
        for owner, key, p in owners:
            setattr(owner, key, own[id(p)])
        yield
    finally:
        for owner, key, p in owners:
            setattr(owner, key, p)


def _own(parameter: nn.Parameter) -> nn.Parameter:
    value = parameter.detach()
    return nn.Parameter(value.clone() if value.is_inference() else value, parameter.requires_grad)


def _lock_of(module: nn.Module) -> threading.RLock:
    with _guard:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def _refusing_others(module: nn.Module) -> Iterator[None]:
    refuse = partial(_refuse, threading.get_ident())
    training = [
        m
        for m in module.modules()
        if m.training and m._parameters and not isinstance(m, torch.jit.ScriptModule)
    ]
    handles = [m.register_forward_pre_hook(refuse, prepend=True) for m in training]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(thread: int, module: nn.Module, inputs: Any) -> None:
    if threading.get_ident() != thread:
        raise RuntimeError(
            f"Expected no forward pass of {type(module).__name__} in train mode while another "
            "thread scores it: it cannot be copied for scoring, and is in eval mode meanwhile. "
            "Score it in the thread that trains it."
        )


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    # The attribute, not `eval()`: users override `train`, and frozen submodules must stay as set.
    training = [submodule for submodule in module.modules() if submodule.training]
    recurrent: dict[Any, float] = {m: m.dropout for m in module.modules() if takes_train_mode(m)}  # type: ignore[misc]
    try:
        for submodule in training:
            submodule.training = False
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
