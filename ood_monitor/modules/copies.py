"""Structural copies: other objects of the same structure, which share the weights.

A copy of a module is another module of the same class, with hooks, buffers and Python attributes of
its own, in eval mode and not compiled. Its parameters are other objects that share the storage of
the original ones. So what a forward pass of the copy changes is the copy's alone, and what hooks on
the original's parameters do to gradients does not happen here. What holds a module is copied with
it: an adapter, a bound method, a function that closes over it.

Left as they are: functions' globals, objects that own a resource (an open file, a thread, what has
a `__del__`), and what is far larger than a part of a model.
"""

import copy
import copyreg
import functools
import io
import logging
import socket
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.modules.calls import call_of
from ood_monitor.modules.substitutes import Unwrapped, settle, wrapped_in
from ood_monitor.modules.tensors import Tensors, TensorsOfAPass

__all__ = ["SHARED", "Structure"]

T = TypeVar("T")

#: What never changes, and is its own copy.
_ATOMS = frozenset(
    {
        *(bool, bytes, complex, float, int, range, slice, str, type(None), type(Ellipsis)),
        *(torch.Size, torch.device, torch.dtype, torch.layout, torch.memory_format),
        *(types.BuiltinFunctionType, types.ModuleType, type, types.CodeType),
    }
)

#: Containers that can be made empty.
_CONTAINERS = frozenset({dict, list, set, OrderedDict})

#: What has no copy: its state is the process's.
_OPAQUE = (
    *(threading.Thread, io.IOBase, socket.socket),
    *(types.GeneratorType, types.CoroutineType, types.FrameType),
)
_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())

#: Objects below one attribute, after which it is taken for no part of a model.
_MOST_OBJECTS = 2_000

#: Attributes of a module that its copy begins without: hooks of the backward pass, which change
#: gradients, and values that gpytorch and linear_operator have computed from weights.
_EMPTIED = frozenset({"_backward_hooks", "_backward_pre_hooks", "_memoize_cache"})

#: Attributes of a module that its copy shares: a Lightning module's Trainer, and hooks that no
#: forward pass calls.
SHARED = frozenset(
    {
        *("_trainer", "_fabric", "_state_dict_hooks", "_state_dict_pre_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)

#: What a module keeps its parts in.
_TABLES = frozenset({"_buffers", "_modules", "_parameters"})

#: Objects that could not be copied.
_left_alone: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _CannotBeCopiedError(Exception):
    pass


class Structure:
    """One structural copy of whatever is asked for, with one copy of each object that is met.

    To be made outside of inference mode, whose tensors autograd can never use.

    Args:
        tensors: Where copies of tensors come from.
        shares_weights: Whether parameters share the storage of the original ones.

    Attributes:
        originals: Identities of the parameters and buffers that were copied: a pass over the copy
            that meets one of them has left it. A tensor that was computed from parameters before,
            with its graph, is shared and one of them too: it needs the original parameters.
        has_derived: Whether there is such a tensor.
    """

    def __init__(self, tensors: Tensors, *, shares_weights: bool = True) -> None:
        self._tensors, self._shares_weights = TensorsOfAPass(tensors), shares_weights
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no identity in the memo is used again
        self._objects = 0
        self.originals: set[int] = set()
        self.has_derived = False

    def of(self, value: T) -> T:
        """The copy of a module, or of what holds one: each attribute that can be copied is."""
        if isinstance(value, nn.Module):
            return cast(T, self._of(value))
        copied = self._remember(value, object.__new__(type(value)))
        computed = _computed(cast(Any, type(value)))
        for name, held in list(vars(value).items()):
            if name not in computed:
                vars(copied)[name] = self._attribute_of(held)
        self._slots(value, copied)
        return copied

    def _attribute_of(self, value: Any) -> Any:
        """The copy of an attribute, or the attribute itself if something in it has no copy."""
        if type(value) in _ATOMS or (_left_alone and value in _left_alone):
            return value
        objects, self._objects, known = self._objects, 0, len(self._kept)
        try:
            return self._of(value)
        except (_CannotBeCopiedError, RecursionError):
            self._forget(known)
            if _is_plain(value) and hasattr(value, "__weakref__"):
                _left_alone[value] = True
            return value
        finally:
            self._objects = objects

    def _of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        copier = _copier_of(cast(Any, kind))
        if copier is not None:
            return copier(self, value)
        return self._plain(value) if _is_plain(value) else value

    def _remember(self, value: Any, copied: T) -> T:
        self._kept.append(value)
        self._memo[id(value)] = copied
        return copied

    def _forget(self, known: int) -> None:
        """Undo copies that were made since so many were known."""
        for value in self._kept[known:]:
            self._memo.pop(id(value), None)
        del self._kept[known:]

    def _count(self) -> None:
        self._objects += 1
        if self._objects > _MOST_OBJECTS:
            raise _CannotBeCopiedError("more objects than a model's attribute has")

    # Tensors and modules

    def _parameter(self, parameter: nn.Parameter) -> Tensor:
        kind = type(parameter)
        if kind is not nn.Parameter and (
            hasattr(parameter, "__tensor_flatten__") or nn.parameter.is_lazy(parameter)
        ):
            return self._remember(parameter, parameter)
        self.originals.add(id(parameter))
        value, shared = parameter.detach(), self._shares_weights
        value = value if shared and not value.is_inference() else value.clone()
        alias = torch.Tensor._make_subclass(kind, value, parameter.requires_grad)
        if own := vars(parameter):
            vars(alias).update(own)
        return self._remember(parameter, alias)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:
            self.originals.add(id(tensor))
            self.has_derived = True
            return self._remember(tensor, tensor)
        copied = self._tensors.copy(tensor)
        if tensor.requires_grad:
            copied = copied.detach().requires_grad_()
        return self._remember(tensor, copied)

    def _module(self, module: nn.Module) -> nn.Module:
        inner = wrapped_in(module)
        if inner is not None:
            return self._wrapper(module, inner)
        kind = _without_del(cast(Any, type(module)))
        view: nn.Module = self._remember(module, object.__new__(kind))
        self._fill_module(module, view)
        self.originals.update(id(b) for b in module._buffers.values() if b is not None)
        self._slots(module, view)
        settle(view)
        return view

    def _fill_module(self, module: nn.Module, view: nn.Module) -> None:
        own = vars(view)
        computed = _computed(cast(Any, type(module)))
        for name, value in list(vars(module).items()):
            kind = type(value)
            if (kind in _CONTAINERS and not value) or name in _EMPTIED:  # most of them
                own[name] = kind()
            elif (
                kind in _ATOMS
                or (kind is tuple and _ATOMS.issuperset(map(type, value)))
                or name in SHARED
            ):
                own[name] = value
            elif name in _TABLES:
                own[name] = {k: self._of(part) for k, part in list(value.items())}
            elif name not in computed:
                own[name] = self._attribute_of(value)
        own.update(training=False, _compiled_call_impl=call_of(view))

    def _wrapper(self, module: nn.Module, inner: str) -> nn.Module:
        view = self._remember(module, Unwrapped(inner))
        view._modules[inner] = self._of(module._modules[inner])
        return view.eval()

    # Containers

    def _list(self, value: Any) -> Any:
        copied = self._remember(value, copy.copy(value))
        copied.clear()
        copied.extend(self._each(value))
        return copied

    def _tuple(self, value: Any) -> Any:
        if _ATOMS.issuperset(map(type, value)):
            return value
        items = self._each(value)
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        kind = type(value)
        try:  # past a constructor of the class's own
            made = tuple.__new__(kind, items)
        except TypeError:  # one of PyTorch's results
            made = kind(items)
        return self._remember(value, made)

    def _set(self, value: Any) -> Any:
        return self._remember(value, type(value)(self._each(value)))

    def _namespace(self, value: types.SimpleNamespace) -> Any:
        copied = self._remember(value, types.SimpleNamespace())
        vars(copied).update(self._of(vars(value)))
        return copied

    def _dict(self, value: Any) -> Any:
        bases = (OrderedDict, defaultdict, dict)
        base: Any = next(kind for kind in bases if isinstance(value, kind))
        copied = base.__new__(type(value))
        if isinstance(value, defaultdict):
            copied.default_factory = value.default_factory
        self._remember(value, copied)
        # Past a class's own `__setitem__`, which may refuse (diffusers' FrozenDict).
        put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
        for key, item in list(value.items()):
            if type(item) not in _ATOMS:
                self._count()
            put(copied, self._of(key), self._of(item))
        if hasattr(value, "__dict__") and type(value) not in (OrderedDict, defaultdict):
            vars(copied).update({k: self._of(v) for k, v in list(vars(value).items())})
        return copied

    def _each(self, values: Iterable[Any]) -> list[Any]:
        values = list(values)
        self._objects += sum(type(value) not in _ATOMS for value in values)
        return [self._of(item) for item in values]

    # Callables and objects

    def _function(self, function: types.FunctionType) -> Any:
        """A function whose closure and defaults are copies; its globals are its own."""
        cells, given = function.__closure__ or (), (function.__defaults__, function.__kwdefaults__)
        if not cells and given == (None, None):
            return function
        made = tuple(self._cell(cell) for cell in cells)
        copied = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, made or None
        )
        self._remember(function, copied)
        for old, new in zip(cells, made, strict=True):
            self._fill(old, new)
        copied.__defaults__, copied.__kwdefaults__ = map(self._of, given)
        copied.__dict__.update(function.__dict__)
        copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
        copied.__annotations__ = function.__annotations__
        return copied

    def _cell(self, cell: types.CellType) -> types.CellType:
        known = self._memo.get(id(cell))
        return known if known is not None else self._remember(cell, types.CellType())

    def _fill(self, old: types.CellType, new: types.CellType) -> None:
        try:
            held = old.cell_contents
        except ValueError:  # not assigned yet
            return
        self._count()
        new.cell_contents = self._of(held)

    def _memoised(self, function: Any) -> Any:
        kept = functools.lru_cache(**function.cache_parameters())
        return self._remember(function, kept(self._of(function.__wrapped__)))

    def _method(self, method: types.MethodType) -> Any:
        owner = self._of(method.__self__)
        if owner is method.__self__:
            return method
        return self._remember(method, types.MethodType(method.__func__, owner))

    def _partial(self, value: functools.partial[Any]) -> Any:
        arguments = self._of(value.args), self._of(value.keywords)
        return self._remember(
            value, functools.partial(self._of(value.func), *arguments[0], **arguments[1])
        )

    def _reference(self, reference: "weakref.ref[Any]") -> Any:
        target = reference()
        # A handle of a hook knows the dictionaries that it is to be taken out of.
        is_copied = isinstance(target, nn.Module) or type(target) in _CONTAINERS
        known = self._of(target) if is_copied else self._memo.get(id(target))
        return reference if known is None else weakref.ref(known)

    def _generator(self, generator: torch.Generator) -> Any:
        return self._remember(generator, generator.clone_state())

    def _array(self, array: "np.ndarray[Any, Any]") -> Any:
        return self._remember(array, array.copy())

    def _lock(self, lock: Any) -> Any:
        return self._remember(lock, type(lock)() if isinstance(lock, _RLOCK) else threading.Lock())

    def _local(self, local: threading.local) -> Any:
        copied = self._remember(local, threading.local())
        vars(copied).update(self._of(vars(local)))
        return copied

    def _slots(self, value: Any, copied: Any) -> None:
        for name in _slots_of(value):
            if hasattr(value, name):
                object.__setattr__(copied, name, self._of(getattr(value, name)))

    def _plain(self, value: Any) -> Any:
        """An object of a class written in Python, by its attributes and slots."""
        self._count()
        state = dict(getattr(value, "__dict__", {}))
        if (not state and not _slots_of(value)) or hasattr(type(value), "__del__"):
            # It has nothing to change and may be known by its identity, or owns a resource.
            return value
        copied = self._remember(value, object.__new__(type(value)))
        self._slots(value, copied)
        computed = _computed(cast(Any, type(value)))
        for name, held in state.items():
            if name not in computed:
                vars(copied)[name] = type(held)() if name in _EMPTIED else self._of(held)
        return copied


def _slots_of(value: Any) -> list[str]:
    return copyreg._slotnames(type(value))  # type: ignore[attr-defined, no-any-return]


def _is_plain(value: Any) -> bool:
    """Whether `object` made it, so that its attributes are all that it is."""
    kind: Any = type(value)
    has_state = hasattr(value, "__dict__") or hasattr(kind, "__slots__")
    return has_state and kind.__new__ is object.__new__ and not isinstance(value, type)


@functools.lru_cache(maxsize=1024)
def _without_del(kind: Any) -> Any:
    """The class, or one of it whose objects end without a word: they own none of its resources."""
    if not hasattr(kind, "__del__"):
        return kind
    own = {"__del__": lambda self: None, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)


@functools.lru_cache(maxsize=1024)
def _computed(kind: Any) -> frozenset[str]:
    """The attributes that keep what a property has computed, to be computed again."""
    members = {name: member for c in reversed(kind.__mro__) for name, member in vars(c).items()}
    return frozenset(k for k, v in members.items() if isinstance(v, functools.cached_property))


_Copier = Callable[[Structure, Any], Any]


def _itself(structure: Structure, value: T) -> T:
    return value


#: By base class, the first that fits.
_COPIERS: tuple[tuple[Any, _Copier], ...] = (
    (nn.Parameter, Structure._parameter),
    (Tensor, Structure._tensor),
    (nn.Module, Structure._module),
    ((Enum, PurePath, np.dtype, np.generic, np.memmap), _itself),
    ((logging.Logger, *weakref.ProxyTypes, *_OPAQUE), _itself),
    ((_LOCK, _RLOCK), Structure._lock),
    (threading.local, Structure._local),
    ((list, deque), Structure._list),
    (dict, Structure._dict),
    (tuple, Structure._tuple),
    ((set, frozenset), Structure._set),
    (types.FunctionType, Structure._function),
    (types.MethodType, Structure._method),
    (functools._lru_cache_wrapper, Structure._memoised),
    (types.SimpleNamespace, Structure._namespace),
    (functools.partial, Structure._partial),
    (weakref.ref, Structure._reference),
    (torch.Generator, Structure._generator),
    (np.ndarray, Structure._array),
)


@functools.lru_cache(maxsize=1024)
def _copier_of(kind: Any) -> _Copier | None:
    return next((copier for base, copier in _COPIERS if issubclass(kind, base)), None)
