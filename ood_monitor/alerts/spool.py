"""Undelivered alerts on disk, so that neither a crash nor a dead server loses one."""

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.journal import Journal
from ood_monitor.checks import items, path_of, text, whole
from ood_monitor.private_files import FileLock

__all__ = ["Spool"]

#: Seconds that a program waits for its disk, before it goes on without: of a slow disk in all, and
#: a tenth of each second after that again. A wait that is shorter than slow is not counted.
_PATIENCE, _REGAINED, _SLOW = 0.9, 0.1, 0.05

#: Seconds between tries to write what could not be written.
_AGAIN = 1.0

#: Seconds of quiet after which is written what sinks have, or how much of it there is at most: who
#: adds an alert does not wait for that. A kill may forget it.
_GATHERED, _MANY = 0.01, 32

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Added:
    """An alert to be put on disk, and how that went, once it has ended."""

    alert: Alert
    has_room: bool = True
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Settled:
    """A sink has an alert, or refuses it for good."""

    alert_id: str
    sink: str
    why: str | None


class Spool:
    """A folder that holds each alert until every sink has it.

    An alert is on disk when :meth:`add` returns True: after the power or the process is cut, the
    next spool of this folder owes it again. All writing is done by one thread, and who adds waits
    for the disk less than a second; while the disk is behind, not at all. What the disk refuses is
    written as soon as it takes it. Each sink is known by its name, and is owed what it was owed
    under that name. The files are this user's alone, with a checksum for every line; a damaged line
    is put aside in ``alerts.damaged``, and told. A folder belongs to one spool at a time, by a lock
    of the folder and of a file in it, which ends with its process; if either is removed or replaced
    it is taken anew before anything more is written. A forked child has none.

    Args:
        folder: Made with mode 0700 if it is not there.
        sinks: The names of the sinks, each once.
        capacity: Alerts that may be owed to each sink; a further one is dropped for it, and
            counted.

    Attributes:
        dropped: Alerts that found no room, counted for each sink.
        failures: Alerts that could not be put on disk in time.
        latest: The highest ``number`` of an alert that this folder was ever given, 0 if none.

    Raises:
        BlockingIOError: Another spool has the folder.
        ValueError: The folder holds a file of a newer release, or an option is out of its range.
        TypeError: An option of another type.
        OSError: The folder cannot be used, or a link is in a file's place.
    """

    def __init__(
        self, folder: str | PathLike[str], sinks: Sequence[str], *, capacity: int = 1024
    ) -> None:
        self.folder, self._capacity = path_of("spool", folder), whole("capacity", capacity, 1)
        self.dropped = self.failures = 0
        self._sinks = [text("a sink", name) for name in items("sinks", sinks)]
        if twice := {name for name in self._sinks if self._sinks.count(name) > 1}:
            raise ValueError(f"Expected sinks of different names, got {sorted(twice)} twice.")
        self._pid, self._is_closed = os.getpid(), False
        self._locks = [FileLock(self.folder / "lock"), FileLock(self.folder)]
        self._take_folder()
        try:
            self._journal = Journal(self.folder / "alerts.jsonl", self._capacity)
        except (OSError, ValueError):
            self._release_locks()
            raise
        self.latest = self._journal.latest
        self._tell_of_strangers()
        self._owed = {name: self._journal.owed(name) for name in self._sinks}
        self._refused = {name: self._journal.refused(name) for name in self._sinks}
        self._work: deque[_Added | _Settled | None] = deque()
        self._changed = threading.Condition()
        self._is_late, self._is_failing, self._is_told_of_room = False, False, False
        self._credit, self._waited_at = _PATIENCE, time.monotonic()
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

    def refused(self, sink: str) -> list[tuple[Alert, str]]:
        """What a sink had refused for good when the folder was opened, and why."""
        return list(self._refused[sink])

    def add(self, alert: Alert) -> bool:
        """Put an alert on disk; True if it is there on return. Does not raise."""
        if not self._is_ours():
            return False
        added = _Added(alert)
        with self._changed:
            self.latest = max(self.latest, alert.number)
            waiting = sum(isinstance(item, _Added) for item in self._work)
            if waiting < self._capacity:
                self._work.append(added)
                self._changed.notify_all()
        if waiting >= self._capacity:
            self._fail(f"{waiting} alerts wait for the disk")
        elif not self._wait(added):
            self._fail("the disk does not answer")
        elif added.error:
            self._fail(added.error)
        else:
            return added.has_room
        return False

    def done(self, alert: Alert, sink: str, why: str | None = None) -> None:
        """A sink has an alert, or refuses it for good, and why. Returns at once, never raises."""
        if self._is_ours():
            with self._changed:
                self._work.append(_Settled(alert.id, sink, why))
                self._changed.notify_all()

    def close(self, timeout: float = 5.0) -> None:
        """Write what is left within ``timeout`` seconds, and give the folder back."""
        if not self._is_ours():
            return
        with self._changed:
            self._work.append(None)
            self._changed.notify_all()
        self._scribe.join(timeout)
        if not self._scribe.is_alive():
            self._is_closed = True
            if self._is_held():
                self._journal.close()
            self._release_locks()

    def _is_ours(self) -> bool:
        return not self._is_closed and self._pid == os.getpid()

    def _wait(self, added: _Added) -> bool:
        """Wait for the disk; whether it answers in time."""
        start = time.monotonic()
        regained = _REGAINED * (start - self._waited_at)
        self._credit = min(_PATIENCE, self._credit + regained)
        is_there = added.ended.wait(0.0 if self._is_late else max(0.0, self._credit))
        self._is_late = self._is_late or not is_there
        self._waited_at = time.monotonic()
        waited = self._waited_at - start
        self._credit -= waited if waited > _SLOW else 0.0
        return is_there

    def _run(self) -> None:
        while self._do(self._next()):
            pass

    def _next(self) -> list[_Added | _Settled | None]:
        with self._changed:
            patience = _AGAIN if self._journal.is_behind else None
            patience = _GATHERED if self._journal.settled_count else patience
            self._changed.wait_for(lambda: self._work, patience)
            work = list(self._work)
            self._work.clear()
            return work

    def _do(self, work: Sequence[_Added | _Settled | None]) -> bool:
        """Take in all that waits, and write it at once or when it is quiet; whether to go on."""
        for item in work:
            if isinstance(item, _Added):
                full = self._journal.add(item.alert, self._sinks)
                item.has_room = len(full) < len(self._sinks)
                self._drop(item.alert, full)
            elif item is not None:
                self._journal.settle(item.alert_id, item.sink, item.why)
        added = [item for item in work if isinstance(item, _Added)]
        error = self._written(self._write) if added or self._journal.is_behind else ""
        for item in added:
            item.error = error
            item.ended.set()
        if not work or self._journal.settled_count >= _MANY:
            self._written(self._journal.write_settled)
        self._is_late = self._is_late and bool(self._work)
        return None not in work

    def _written(self, write: Callable[[], None]) -> str:
        """Why the file could not be brought up to date; empty if it was."""
        try:
            write()
        except Exception as error:  # whatever it is, this thread must go on
            why = f"{type(error).__name__}: {error}"
            self._tell_of_failure(why)
            return why
        return ""

    def _write(self) -> None:
        if not self._is_held():
            self._take_anew()
        self._journal.write()
        if self._is_failing:
            self._is_failing = False
            _log.warning("The spool %s is written again, and lacks nothing. [OOD403]", self.folder)

    def _is_held(self) -> bool:
        return all(lock.is_held for lock in self._locks)

    def _take_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._lock_folder()
        except OSError:
            self._release_locks()
            raise
        for left in self.folder.glob(".alerts.jsonl.*.new"):  # by a kill in the middle of writing
            with suppress(OSError):
                left.unlink()

    def _lock_folder(self) -> None:
        for lock in list(self._locks):
            try:
                lock.acquire()
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                self._locks.remove(lock)  # NFS locks no folders; the file in it is locked still

    def _take_anew(self) -> None:
        """The folder or its lock was removed or replaced: another may have it by now."""
        self._release_locks()
        self._take_folder()
        _log.warning(
            "The spool %s or its lock was removed or replaced; it is taken anew. [OOD404]",
            self.folder,
        )

    def _release_locks(self) -> None:
        for lock in self._locks:
            lock.release()

    def _drop(self, alert: Alert, full: Sequence[str]) -> None:
        self.dropped += len(full)
        if full and not self._is_told_of_room:
            self._is_told_of_room = True
            text = (
                "The spool %s holds %d alerts to %s: %s found no room. More are counted, not "
                "told. [OOD402]"
            )
            _log.warning(text, self.folder, self._capacity, ", ".join(full), alert.id)

    def _fail(self, why: str) -> None:
        self.failures += 1
        self._tell_of_failure(why)

    def _tell_of_failure(self, why: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            _log.warning(
                "The spool %s: %s. More of this is counted, not told. [OOD403]", self.folder, why
            )

    def _tell_of_strangers(self) -> None:
        given_up = self._journal.give_up_strangers(self._sinks)
        strangers = ", ".join(sorted(self._journal.sinks - set(self._sinks)))
        if given_up:
            text = "The spool %s gave up %d alerts to sinks that are no more, the oldest. [OOD405]"
            _log.warning(text, self.folder, given_up)
        if strangers:
            text = "The spool %s owes alerts to %s, which is not among the sinks. [OOD405]"
            _log.warning(text, self.folder, strangers)
