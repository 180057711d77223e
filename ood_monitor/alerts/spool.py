"""Undelivered alerts on disk, so that neither a crash nor a dead server loses one."""

import errno
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.journal import Journal
from ood_monitor.checks import items, path_of, text, whole
from ood_monitor.processes import after_fork_in_child

__all__ = ["Spool"]

#: Seconds that a program waits for its disk, before it goes on without.
_PATIENCE = 1.0

_log = logging.getLogger(__name__)


class Spool:
    """A folder that holds each alert until every sink has it.

    An alert is on disk when :meth:`add` returns True: after the power or the process is cut, the
    next spool of this folder owes it again. All writing is done by one thread, and who adds waits
    for the disk at most a second; while the disk is behind, not at all. A folder belongs to one
    spool at a time, by a lock that ends with its process. A forked child has none.

    Args:
        folder: Made if it is not there.
        sinks: The names of the sinks.
        capacity: Alerts that may be owed; a further one is dropped, and counted.

    Attributes:
        dropped: Alerts that found no room.
        failures: Alerts that could not be put on disk in time.

    Raises:
        BlockingIOError: Another spool has the folder.
        ValueError: The folder holds another's file, or that of a newer release, or an option is out
            of its range.
        TypeError: An option of another type.
        OSError: The folder cannot be used.
    """

    def __init__(
        self, folder: str | PathLike[str], sinks: Sequence[str], *, capacity: int = 1024
    ) -> None:
        self.folder, capacity = path_of("spool", folder), whole("capacity", capacity, 1)
        self.dropped = self.failures = 0
        self._sinks = [text("a sink", name) for name in items("sinks", sinks)]
        self._pid = os.getpid()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / "lock")
        _open_locks.add(self)
        try:
            self._journal = Journal(self.folder / "alerts.jsonl", capacity)
        except (OSError, ValueError):
            self.release_lock()
            raise
        self._tell_of_strangers()
        self._owed = {name: self._journal.owed(name) for name in self._sinks}
        self._work: deque[Callable[[], None] | None] = deque()
        self._changed = threading.Condition()
        self._capacity, self._is_late, self._is_told = capacity, False, False
        self._scribe = threading.Thread(target=self._run, name="ood-monitor-spool", daemon=True)
        self._scribe.start()

    def check_process(self, alert: Alert) -> None:
        """Whether an alert is raised in the process that has the folder.

        Raises:
            RuntimeError: In a child that it has forked.
        """
        if self._pid != os.getpid():
            raise RuntimeError(
                f"Expected an alert of process {self._pid}, which has the spool {self.folder}, got "
                f"{alert.kind!r} of process {os.getpid()}, forked from it: make a monitor in each "
                "process, with a folder of its own."
            )

    def owed(self, sink: str) -> list[Alert]:
        """What a sink was owed when the folder was opened, the oldest first."""
        return list(self._owed[sink])

    def add(self, alert: Alert) -> bool:
        """Put an alert on disk; True if it is there on return. Does not raise."""
        if not self._sinks or not self._is_ours():
            return False
        written, late = threading.Event(), self._is_late
        found: list[bool] = []

        def write() -> None:
            try:
                found.append(self._journal.add(alert, self._sinks) or self._make_room(alert))
            finally:
                written.set()

        if not self._put(write):
            self._fail(f"{len(self._work)} alerts wait for the disk")
            return False
        if late or not written.wait(_PATIENCE):
            self._is_late = True
            self._fail("the disk does not answer")
            return False
        return found == [True]

    def done(self, alert: Alert, sink: str) -> None:
        """A sink has an alert. Returns at once and does not raise."""
        if self._is_ours():
            self._put(lambda: self._journal.done(alert.id, sink), is_short=True)

    def close(self, timeout: float = 5.0) -> None:
        """Write what is left within ``timeout`` seconds, and give the folder back."""
        if not self._is_ours():
            return
        with self._changed:
            self._work.append(None)
            self._changed.notify_all()
        self._scribe.join(timeout)
        if not self._scribe.is_alive():
            self._journal.close()
            self.release_lock()

    def release_lock(self) -> None:
        """Close the lock's file; the lock goes with the last process that has it open."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _is_ours(self) -> bool:
        return self._lock >= 0 and self._pid == os.getpid()

    def _put(self, work: Callable[[], None], *, is_short: bool = False) -> bool:
        with self._changed:
            if len(self._work) >= self._capacity and not is_short:
                return False
            self._work.append(work)
            self._changed.notify_all()
            return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work)
                work = self._work.popleft()
            if work is None:
                return
            try:
                work()
            except OSError as error:
                self._fail(f"{type(error).__name__}: {error}")
            self._is_late = self._is_late and bool(self._work)

    def _make_room(self, alert: Alert) -> bool:
        """Give up what is owed to sinks that are no more, else the alert."""
        strangers = self._journal.sinks - set(self._sinks)
        given_up = self._journal.forget(strangers) if strangers else 0
        self.dropped += given_up or 1
        if given_up:
            _log.warning("%d alerts to %s were given up.", given_up, ", ".join(sorted(strangers)))
            return self._journal.add(alert, self._sinks)
        self._tell(f"it holds {self._capacity} alerts, and alert {alert.id} found no room")
        return False

    def _fail(self, why: str) -> None:
        self.failures += 1
        self._tell(why)

    def _tell(self, why: str) -> None:
        if not self._is_told:
            self._is_told = True
            _log.warning("The spool %s: %s. More of this is counted, not told.", self.folder, why)

    def _tell_of_strangers(self) -> None:
        strangers = self._journal.sinks - set(self._sinks)
        if strangers:
            text = "The spool %s owes alerts to %s, which is not among the sinks."
            _log.warning(text, self.folder, ", ".join(sorted(strangers)))


_open_locks: weakref.WeakSet[Spool] = weakref.WeakSet()


def _leave_locks() -> None:
    """A child that outlives its parent must not keep the folder from the parent's successor."""
    for spool in _open_locks:
        spool.release_lock()


after_fork_in_child(_leave_locks)


def _locked(path: Path) -> int:
    """The open file of a lock that only this process has.

    Raises:
        BlockingIOError: Another has it.
        OSError: The system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        text = "Expected a POSIX system for a spool, got one without file locks"
        raise OSError(errno.ENOTSUP, text) from error

    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 40, 0).decode(errors="replace").strip()
        os.close(fd)
        text = (
            f"Expected a spool folder of this monitor's own, got one that {owner or 'another'} has"
        )
        raise BlockingIOError(errno.EWOULDBLOCK, text, str(path.parent)) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} since {time.strftime('%F %T')}\n".encode(), 0)
    return fd
