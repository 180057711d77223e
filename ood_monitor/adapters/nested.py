"""Nested batches: lists, tuples, mappings and dataclasses of tensors, and what is beside them."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ood_monitor.adapters.left_out import LeftOut

__all__ = ["map_parts", "map_tensors", "parts_of", "tensors_in"]

_Nested: TypeAlias = Any


def map_tensors(function: Callable[[Tensor], Tensor], batch: _Nested) -> _Nested:
    """Apply ``function`` to every tensor of a nested batch; anything else stays as it is."""
    if type(batch) is LeftOut:
        return batch
    if isinstance(batch, Tensor):
        return function(batch)
    if not isinstance(batch, Mapping | list | tuple) and not tensors_in(batch):
        return batch
    return map_parts(lambda part, name: map_tensors(function, part), batch)


def tensors_in(batch: _Nested) -> list[Tensor]:
    """All tensors of a nested batch, in order."""
    if type(batch) is not LeftOut and isinstance(batch, Tensor):
        return [batch]
    return [tensor for _, part in parts_of(batch) for tensor in tensors_in(part)]


def map_parts(function: Callable[[Any, Any], Any], batch: _Nested) -> _Nested:
    """Apply ``function(part, name)`` to each of :func:`parts_of`; what has none stays as it is."""
    if type(batch) is LeftOut:
        return batch
    if isinstance(batch, Mapping):
        return {name: function(part, name) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        values = [function(part, i) for i, part in enumerate(batch)]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return _with_attributes(batch, {n: function(part, n) for n, part in _attributes(batch)})


def parts_of(batch: _Nested) -> Iterator[tuple[Any, Any]]:
    """What a mapping, a list, a tuple or a dataclass holds, with its key, index or name."""
    if type(batch) is LeftOut:
        return iter(())
    if isinstance(batch, Mapping):
        return iter(batch.items())
    return enumerate(batch) if isinstance(batch, list | tuple) else _attributes(batch)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Of a dataclass: its fields, and what else was put into it, but for what it computes."""
    if not is_dataclass(value) or isinstance(value, type):
        return
    names = dict.fromkeys(
        [*(field.name for field in fields(value)), *getattr(value, "__dict__", ())]
    )
    for name in names:
        if hasattr(value, name) and not _is_computed(value, name):
            yield name, getattr(value, name)


def _with_attributes(value: Any, attributes: Mapping[str, Any]) -> Any:
    """A copy with other attributes, past a constructor; the object itself if all are the same."""
    if all(part is getattr(value, name) for name, part in attributes.items()):
        return value
    copied = copy.copy(value)
    for name in [name for name in getattr(copied, "__dict__", ()) if _is_computed(value, name)]:
        del copied.__dict__[name]  # to be computed again, of other tensors
    for name, part in attributes.items():
        object.__setattr__(copied, name, part)  # also of a frozen one
    return copied


def _is_computed(value: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(value), name, None), functools.cached_property)
