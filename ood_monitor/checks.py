"""Options are checked where they are given: never at the hundredth sample."""

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "batches",
    "flag",
    "function",
    "having",
    "items",
    "meant",
    "number",
    "path_of",
    "range_of",
    "seed_of",
    "text",
    "whole",
    "word",
]

_T = TypeVar("_T")

#: One more than the largest seed that PyTorch's generators take.
_SEEDS = 2**64


def whole(name: str, value: Any, low: int | None = 0) -> int:
    """Returns an option that counts something, as Python's own whole number.

    Args:
        name: What the option is called.
        value: What was given.
        low: The least that it may be, if anything.

    Raises:
        TypeError: It is no whole number; True and 10.0 are none.
        ValueError: It is less.
    """
    found = _index(value)
    if found is None:
        raise TypeError(f"Expected {name} as a whole number, got {value!r}.")
    if low is not None and found < low:
        raise ValueError(f"Expected {name} of at least {low}, got {value!r}.")
    return found


def seed_of(name: str, value: Any, below: int = _SEEDS) -> int:
    """Returns an option that is a seed, as Python's own whole number.

    Args:
        name: What the option is called.
        value: What was given.
        below: One more than the largest that the generator takes.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 0, or too large.
    """
    found = whole(name, value)
    if found >= below:
        raise ValueError(f"Expected {name} below {below}, got {value!r}.")
    return found


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, ends: str = "[]"
) -> float:
    """Returns an option that measures something, as Python's own number; nan is none.

    Args:
        name: What the option is called.
        value: What was given.
        low: The least that it may be.
        high: The most.
        ends: Whether it may be these: brackets of an interval, such as ``"(]"``.

    Raises:
        TypeError: It is no number.
        ValueError: It is nan, less or more.
    """
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError(f"Expected {name} as a number, got {value!r}.")
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"Expected {name} as a number, got {value!r}.") from error
    at_end = (found == low and ends[0] == "(") or (found == high and ends[1] == ")")
    if at_end or not low <= found <= high:
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"Expected {name} in {interval}, got {value!r}.")
    return found


def text(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """Returns an option that is a name.

    Args:
        name: What the option is called.
        value: What was given.
        may_be_empty: Whether it may say nothing.

    Raises:
        TypeError: It is no text.
        ValueError: It is empty.
    """
    if not isinstance(value, str):
        raise TypeError(f"Expected {name} as text, got {value!r}.")
    if not may_be_empty and not value.strip():
        raise ValueError(f"Expected {name} as text, got an empty one: {value!r}.")
    return value


def path_of(name: str, value: Any) -> Path:
    """Returns an option that is a file or a folder; an empty one would be where we happen to be.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It is neither text nor a path.
        ValueError: It is empty.
    """
    found = value.__fspath__() if isinstance(value, PathLike) else value
    if not isinstance(found, str):
        raise TypeError(f"Expected {name} as a path, got {value!r}.")
    if not found.strip():
        raise ValueError(f"Expected {name} as a path, got an empty one: {value!r}.")
    return Path(found)


def word(name: str, value: _T, of: Iterable[str]) -> _T:
    """Returns an option that is one of a few words.

    Args:
        name: What the option is called.
        value: What was given.
        of: The words.

    Raises:
        ValueError: It is none of them.
    """
    words = tuple(of)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"Expected {name} of {words}, got {value!r}.{meant(value, words)}")
    return value


def meant(value: Any, words: Iterable[str]) -> str:
    """A question after a word that is none of these, " Did you mean 'x'?"; empty if none is near.

    Args:
        value: What was given.
        words: What could have been.
    """
    given, known = str(value).lower(), list(words)
    near = [each for each in known if given and each.startswith((given, given[:3]))]
    near = difflib.get_close_matches(given, known, n=1) or near
    return f" Did you mean {near[0]!r}?" if near else ""


def flag(name: str, value: Any) -> bool:
    """Returns an option that is true or false.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It is neither; 1 and ``"no"`` are neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"Expected {name} as True or False, got {value!r}.")
    return bool(value)


def function(name: str, value: _T) -> _T:
    """Returns an option that is called.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It cannot be.
    """
    if not callable(value):
        raise TypeError(f"Expected {name} as a function, got {value!r}.")
    return value


def items(name: str, value: Any) -> list[Any]:
    """Returns an option that has several items; text, which would be its letters, has none.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It has no items.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        remedy = f" For one alone give [{value!r}]." if isinstance(value, str) else ""
        raise TypeError(f"Expected {name} as several items, got {value!r}.{remedy}")
    return list(value)


def batches(name: str, value: _T) -> _T:
    """Returns an option that gives batches, one after the other, as a loader does.

    A tensor can be gone through too, but by its samples, and text by its letters.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It is a tensor, an array, a mapping, text, or cannot be gone through.
    """
    gives = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if isinstance(value, (str, bytes, type)) or not gives:
        raise TypeError(f"Expected {name} as an iterable of batches, got {value!r}.")
    # A tensor is an array; alerts, which check their options here, do without torch.
    if isinstance(value, Mapping) or hasattr(value, "__array__"):
        raise TypeError(
            f"Expected {name} as an iterable of batches, got a {type(value).__name__}, which is "
            "one batch: give [batch], or a loader."
        )
    return value


def having(name: str, value: _T, *methods: str) -> _T:
    """Returns an option of which some methods are called.

    Args:
        name: What the option is called.
        value: What was given.
        methods: Their names.

    Raises:
        TypeError: It lacks one, or is a class, which has them for its instances.
    """
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if missing or isinstance(value, type):
        raise TypeError(f"Expected {name} with methods {', '.join(methods)}, got {value!r}.")
    return value


def range_of(name: str, value: Any) -> tuple[float, float]:
    """Returns an option that says between which finite numbers values are.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: They are no numbers.
        ValueError: They are not two, one is not finite, or the first is not below the second.
    """
    ends = items(name, value)
    if len(ends) != 2:
        raise ValueError(f"Expected {name} as a range (low, high), got {value!r}.")
    low, high = (number(name, end, ends="()") for end in ends)
    if not low < high:
        raise ValueError(f"Expected {name} as a range (low, high) with low < high, got {value!r}.")
    return low, high


def _index(value: Any) -> int | None:
    """Python's whole number of it, if it is one."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
