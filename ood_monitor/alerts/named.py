"""Sinks as a dispatcher takes them: callable, not asynchronous, and each with a name of its own."""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from ood_monitor.alerts.sink import Sink
from ood_monitor.checks import items, text

__all__ = ["named"]

_LAMBDA = "<lambda>"

#: What is called of a sink, beside the sink itself.
_METHODS = ("summarise", "measure", "close")


def named(sinks: Iterable[Sink], *, has_spool: bool) -> list[tuple[str, Sink]]:
    """Sinks with names that tell them apart, and that stay what they are.

    A sink's name is its ``name``, or a function's own; else its class's, numbered from the second
    on. With a spool, which owes by name, it must be of the first two kinds: by a class's name a new
    receiver would get what was owed to the one before.

    Raises:
        TypeError: One is no sink, or an asynchronous one.
        ValueError: Two have the same name, or one has none and there is a spool.
    """
    found: dict[str, Sink] = {}
    for sink in items("sinks", sinks):
        _check(sink)
        said = _said(sink)
        if said is None and has_spool:
            raise ValueError(
                f"Expected a sink with a name, by which the spool owes it alerts, got {sink!r}: "
                "set its `name`, or wrap it in a function of a name that this receiver alone has."
            )
        name = _numbered(_default(sink), found) if said is None else said
        if name in found:
            raise ValueError(
                f"Expected sinks of different names, got two of {name!r}: give one another `name`."
            )
        found[name] = sink
    return list(found.items())


def _said(sink: Any) -> str | None:
    """The name that a sink was given, if it was."""
    name = getattr(sink, "name", None)
    if name is None and inspect.isfunction(sink) and sink.__name__ != _LAMBDA:
        name = sink.__name__
    return None if name is None else text("a sink's name", name)


def _default(sink: Any) -> str:
    return str(getattr(sink, "__qualname__", type(sink).__qualname__))


def _numbered(name: str, taken: dict[str, Sink]) -> str:
    names = (name if number == 1 else f"{name} {number}" for number in range(1, len(taken) + 2))
    return next(free for free in names if free not in taken)


def _check(sink: Any) -> None:
    if not callable(sink):
        raise TypeError(f"Expected a sink that can be called with an alert, got {sink!r}.")
    for call in (sink, *(getattr(sink, name, None) for name in _METHODS)):
        if _is_asynchronous(call):
            raise TypeError(
                f"Expected a sink that has delivered when it returns, got {sink!r}, which is "
                "asynchronous: wrap it, as in `def sink(alert): asyncio.run(send(alert))`."
            )


def _is_asynchronous(call: Any) -> bool:
    """Whether a call gives a coroutine or a generator, and does nothing."""
    while isinstance(call, functools.partial):
        call = call.func
    if not callable(call):
        return False
    each = (call, type(call).__call__)
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    return any(is_of(one) for one in each for is_of in kinds)
