"""What the recorder knows of a call's arguments and results."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, strided

__all__ = ["Data", "DataMarks", "map_arguments", "tensors_of"]


class Data(NamedTuple):
    """What is known of a tensor that depends on the batch.

    Attributes:
        dimension: Along which the samples lie, in order; None where that is not known.
        anchored: A backward pass to the anchors goes through it.
        created: It depends on the batch's shape alone: its rows are those of the samples only as
            long as what they meet is in order.
    """

    dimension: int | None
    anchored: bool
    created: bool = False


class DataMarks:
    """What is known of data tensors, while they live.

    By identity, with a weak reference to tell a tensor from a later one at its address. This is
    asked for every argument of every call, for which `WeakTensorKeyDictionary` makes, hashes and
    compares a reference object. Of a tensor that was written through another, a view of it or its
    base, it is not known any more where the samples lie.
    """

    def __init__(self) -> None:
        self._marks: dict[int, tuple[weakref.ref[Tensor], Data, int]] = {}
        # What `.data` gave of a tensor, whose writes it does not count.
        self._aliases: dict[int, list[tuple[Tensor, int]]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        found = self._marks.get(id(tensor))
        return found is not None and found[0]() is tensor

    def get(self, tensor: Tensor) -> Data | None:
        """What is known of it; None if it is no data."""
        found = self._marks.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        _, known, version = found
        aliases = self._aliases.get(id(tensor), ()) if self._aliases else ()
        written = tensor._version != version or any(a._version != v for a, v in aliases)
        return known._replace(dimension=None) if written else known

    def follow(self, tensor: Tensor, alias: Tensor) -> None:
        """Take writes into what `.data` gave of a data tensor for writes into it."""
        self._aliases.setdefault(id(tensor), []).append((alias, alias._version))

    def lose(self, tensor: Tensor) -> None:
        """It is not known any more where its samples lie: what has it may write without a word."""
        known = self.get(tensor)
        if known is not None:
            self.set(tensor, known._replace(dimension=None))

    def lose_memory_of(self, tensor: Tensor) -> None:
        """Likewise of all tensors that are in the same memory, as of one that was detached."""
        place = tensor.untyped_storage().data_ptr()
        for other in [reference() for reference, _, _ in self._marks.values()]:
            # Tensors of other kinds have no memory of their own.
            is_plain = type(other) is Tensor and other.layout == strided
            if other is not None and is_plain and other.untyped_storage().data_ptr() == place:
                self.lose(other)

    def set(self, tensor: Tensor, known: Data) -> None:
        """Remember a data tensor, or what is now known of it."""
        self._marks[id(tensor)] = weakref.ref(tensor), known, tensor._version


def tensors_of(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among a call's arguments or results, also in lists, tuples and dictionaries."""
    found: list[Tensor] = []
    for value in arguments:
        if type(value) is Tensor or isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
        elif isinstance(value, dict):
            found += tensors_of(value.values())
    return found


def map_arguments(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Apply ``function`` to the tensors in a call's arguments; other objects stay themselves."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if type(arguments) in (list, tuple):
        return type(arguments)(map_arguments(function, value) for value in arguments)
    if type(arguments) is dict:
        return {key: map_arguments(function, value) for key, value in arguments.items()}
    return arguments
