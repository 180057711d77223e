"""Functions that a text names, as "package.module:function"; one gate for all that is run so.

A folder or a server says which function makes a model. So none is run that was not written for it:
it must say what it returns, and is no part of Python itself.
"""

import importlib
import keyword
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["check_name", "importable_here", "imported", "is_name"]


def is_name(text: object) -> bool:
    """Whether it can name a function, "package.module:function"; no path can."""
    if not isinstance(text, str):
        return False
    module, _, function = text.partition(":")
    parts = [*module.split("."), function]
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)


def check_name(text: object) -> str:
    """A name that may be imported; nothing is yet.

    Raises:
        ValueError: It names no function, one of the program that is running, or one of Python's own
            library.
    """
    if not is_name(text):
        raise ValueError(f"Expected a function as 'package.module:function', got {text!r}.")
    name = str(text)
    top = name.partition(":")[0].partition(".")[0]
    if top == "__main__" or top in sys.stdlib_module_names:
        what = "the program that is running" if top == "__main__" else "Python's own library"
        raise ValueError(f"Expected a function of an importable module, got {name!r} of {what}.")
    return name


def imported(name: object, *returns: type) -> Callable[..., Any]:
    """The function of a name, which says that it returns one of some types.

    Args:
        name: "package.module:function".
        *returns: Classes, of which its annotation must name one or a subclass; a class is its own.

    Raises:
        ValueError: As :func:`check_name`, or nothing of that name can be imported.
        TypeError: It is no function, or does not say that it returns one of these.
    """
    checked = check_name(name)
    module, _, attribute = checked.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected {checked!r} to be importable, got: {error}.") from error
    if not callable(found):
        raise TypeError(f"Expected {checked!r} to be a function, got {type(found).__name__}.")
    _check_returns(checked, found, returns)
    return typing.cast(Callable[..., Any], found)


@contextmanager
def importable_here() -> Iterator[None]:
    """The current directory among those that modules are found in."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _check_returns(name: str, function: Any, returns: tuple[type, ...]) -> None:
    said = [function] if isinstance(function, type) else _returned(function)
    if said and all(isinstance(kind, type) and issubclass(kind, returns) for kind in said):
        return
    short, wanted = name.partition(":")[2], " | ".join(map(_told, returns))
    got = " | ".join(map(_told, said)) or "none said"
    raise TypeError(
        f"Expected {name} to say what it returns, `def {short}(...) -> {wanted}:`, got {got}."
    )


def _returned(function: Any) -> list[Any]:
    """The classes that its annotation names, ``list`` for ``list[str]``; none if there is none."""
    try:
        returned = typing.get_type_hints(function).get("return")
    except (NameError, TypeError):
        return []
    is_union = typing.get_origin(returned) in (typing.Union, types.UnionType)
    kinds = typing.get_args(returned) if is_union else (returned,)
    return [typing.get_origin(kind) or kind for kind in kinds if kind is not None]


def _told(kind: Any) -> str:
    module = getattr(kind, "__module__", "builtins")
    name = getattr(kind, "__qualname__", str(kind))
    if module == "builtins":
        return name
    ours = module.partition(".")[0] == "ood_monitor"  # whose names are all in one place
    return f"{'ood_monitor' if ours else module}.{name}"
