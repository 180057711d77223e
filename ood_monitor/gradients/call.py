"""A call of an operation on data, and where the samples lie in its arguments."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OWNERS", "Call", "Found", "functions", "in_order", "listed", "numbers"]

#: Where PyTorch's operations are.
OWNERS: tuple[Any, ...] = (torch, Tensor, F, torch.special)

#: For each result the sample dimension, or one for all; None where nothing is known.
Found: TypeAlias = int | list[int | None] | None


class Call(NamedTuple):
    """A call, and the sample dimensions of those of its arguments that are data."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    data: list[tuple[Tensor, int]]
    result: Tensor  # the first
    n: int

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """By position, or by one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def integers(self) -> list[int]:
        """What follows the first argument, given one by one or as a sequence."""
        rest = self.args[1:] or tuple(self.kwargs.values())
        return list(rest if isinstance(rest[0], int) else rest[0])

    def dimension_of(self, tensor: Any) -> int | None:
        """The sample dimension of an argument, if it has one."""
        return next((d for known, d in self.data if known is tensor), None)

    def only(self, tensor: Any) -> int | None:
        """Its sample dimension, if no other argument has one."""
        return self.dimension_of(tensor) if all(t is tensor for t, _ in self.data) else None

    def common(self) -> int | None:
        """The sample dimension of all data arguments, if it is one, of as many dimensions."""
        found = {(t.ndim, t.shape[d], d) for t, d in self.data}
        return next(iter(found))[2] if len(found) == 1 else None


def functions(names: str, owners: tuple[Any, ...] = OWNERS) -> Iterator[Any]:
    """The functions, methods and getters of these names."""
    found = (getattr(owner, name, None) for name in names.split() for owner in owners)
    for each in found:
        function = each if callable(each) else getattr(each, "__get__", None)
        if function is not None and not isinstance(each, type):
            yield function


def numbers(shape: list[int], d: int, n: int) -> Tensor:
    """Which of n equal parts along d an element is in; takes no memory for other dimensions."""
    rows = torch.arange(shape[d], device="cpu") // (shape[d] // n)
    return rows.reshape([-1 if i == d else 1 for i in range(len(shape))]).expand(shape)


def in_order(parts: Tensor, d: int, n: int) -> bool:
    """Whether the parts' numbers are those of :func:`numbers` along d."""
    size = parts.shape[d]
    return size > 1 and size % n == 0 and bool((parts == numbers([*parts.shape], d, n)).all())


def listed(value: Any) -> list[Tensor]:
    """A tensor, or a sequence of them, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)
