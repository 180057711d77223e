"""What a fork leaves in a child: locks that are free, and nothing that another thread should end.

A child has the forking thread alone. A lock that another thread held would be held for ever, and
what that thread was about to put back would stay as it is.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Lock", "after_fork_in_child", "after_fork_in_child_of"]

#: Seconds that a fork waits for what locks guard to be whole.
_PATIENCE = 1.0

_Owner = TypeVar("_Owner")

_functions: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()

_log = logging.getLogger(__name__)


def after_fork_in_child(function: Callable[[], object]) -> None:
    """Call a function first of all in every child that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def after_fork_in_child_of(owner: _Owner, function: Callable[[_Owner], object]) -> None:
    """The same with an object, as long as it lives: one function of each."""
    _functions[owner] = function


class Lock:
    """A re-entrant lock that a forked child finds free, and what it guards whole.

    A fork takes it first, so that no other thread is in the middle of a change. It waits a second
    at most: hold it for short.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def take(self, timeout: float) -> bool:
        """Acquire it within so many seconds; whether that was possible."""
        return self._lock.acquire(timeout=timeout)

    def renew(self) -> None:
        """Make it anew, free."""
        self._lock = threading.RLock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class _Forking(threading.local):
    """The locks that a thread has taken for its fork."""

    def __init__(self) -> None:
        self.taken: list[Lock] = []


_forking = _Forking()


def _before_fork() -> None:
    deadline = time.monotonic() + _PATIENCE
    _forking.taken = [
        lock for lock in list(_locks) if lock.take(max(0.0, deadline - time.monotonic()))
    ]


def _after_in_parent() -> None:
    while _forking.taken:
        _forking.taken.pop().__exit__()


def _after_in_child() -> None:
    missed = set(_locks) - set(_forking.taken)
    for lock in missed:
        lock.renew()
    _after_in_parent()
    for owner, function in list(_functions.items()):
        function(owner)
    if missed:
        text = (
            "A fork waited %.0f s for another thread: what that was changing may be incomplete. "
            "[OOD303]"
        )
        _log.warning(text, _PATIENCE)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
