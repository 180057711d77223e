"""How a delivery fails: for now, or for good."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

from ood_monitor.alerts.alert import Alert

__all__ = ["Refused", "Undelivered", "check_answer", "described", "pause_after"]

#: Seconds that a receiver may ask to be left alone; what asks for more is tried after these.
_LONGEST_PAUSE = 3600.0


class Refused(Exception):
    """Raised by a sink for an alert that its receiver will never take, however often it is tried.

    The alert is set aside and counted, and the next one is delivered. Any other exception has the
    alert tried again, after as many seconds as its ``retry_after`` says, if it has one.
    """


@dataclass(frozen=True)
class Undelivered:
    """An alert that a sink did not get.

    Attributes:
        alert: The alert.
        sink: The sink's name, or "all sinks".
        reason: Why.
    """

    alert: Alert
    sink: str
    reason: str


def described(error: BaseException) -> str:
    """An error in words, also one that fails to say itself."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException:  # its text is foreign code, and may not end the thread that tells of it
        return name


def pause_after(error: BaseException) -> float:
    """Seconds, up to an hour, that an error asks to wait; 0 if it does not."""
    try:
        asked: Any = getattr(error, "retry_after", None)
        seconds = float(min(max(asked, 0), _LONGEST_PAUSE))  # before it is a float, which has ends
    except BaseException:  # a property of a foreign exception, which may raise anything
        return 0.0
    return 0.0 if math.isnan(seconds) else seconds


def check_answer(answer: object) -> None:
    """Whether a sink's call was one: a coroutine or a generator has done nothing yet.

    Raises:
        TypeError: It was none.
    """
    is_lazy = inspect.isgenerator(answer) or inspect.isasyncgen(answer)
    if not is_lazy and not inspect.isawaitable(answer):
        return
    if inspect.iscoroutine(answer):
        answer.close()  # or Python warns that it was never awaited
    kind = type(answer).__qualname__
    raise TypeError(
        f"Expected a sink that has delivered when it returns, got one that returned a {kind}: "
        "run it in the sink, as by asyncio.run."
    )
