"""Options are checked where they are given: never at the hundredth sample."""

import math
import operator
from typing import Any

__all__ = ["number", "text", "whole"]


def whole(name: str, value: Any, low: int = 0) -> int:
    """Returns an option that counts something, as Python's own whole number.

    Args:
        name: What the option is called.
        value: What was given.
        low: The least that it may be.

    Raises:
        TypeError: It is no whole number; True and 10.0 are none.
        ValueError: It is less.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"Expected {name} as a whole number, got {value!r}.")
    if found < low:
        raise ValueError(f"Expected {name} of at least {low}, got {value!r}.")
    return found


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns an option that measures something, as Python's own number; nan is none.

    Args:
        name: What the option is called.
        value: What was given.
        low: The least that it may be.
        high: The most.

    Raises:
        TypeError: It is no number.
        ValueError: It is nan, less or more.
    """
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"Expected {name} as a number, got {value!r}.")
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of a tensor of several
        raise TypeError(f"Expected {name} as a number, got {value!r}.") from error
    if not low <= found <= high:
        raise ValueError(f"Expected {name} in [{low:g}, {high:g}], got {value!r}.")
    return found


def text(name: str, value: Any) -> str:
    """Returns an option that is a name.

    Args:
        name: What the option is called.
        value: What was given.

    Raises:
        TypeError: It is no text.
        ValueError: It is empty.
    """
    if not isinstance(value, str):
        raise TypeError(f"Expected {name} as text, got {value!r}.")
    if not value.strip():
        raise ValueError(f"Expected {name} as text, got an empty one: {value!r}.")
    return value
