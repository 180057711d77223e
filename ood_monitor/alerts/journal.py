"""A file of alerts that are owed to sinks: appended to, synchronised, and read back after a crash.

Lines, after a head with the format: `{"for": [sinks], "latest": n, "alert": {...}}` when an alert
comes, and `{"done": id, "sink": name}` when a sink has it, with a `"why"` if it never will.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.lines import FORMAT, Content, framed, line_of, read
from ood_monitor.private_files import is_at, open_private, write_all, write_private

__all__ = ["Journal"]

#: Bytes of lines that say nothing new from which on the file is written anew.
_WASTE = 1 << 20

#: What a line says that is of no alert.
_HEADS = {"ood_monitor_spool", "latest"}

_log = logging.getLogger(__name__)


@dataclass
class _Owed:
    """An alert, the sinks that do not have it yet, and why others never will; bytes of its line."""

    alert: Alert
    sinks: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def line(self, latest: int) -> bytes:
        record: dict[str, Any] = {"for": self.sinks, "latest": latest}
        record |= {"refused": self.refused} if self.refused else {}
        line = framed(f'{json.dumps(record)[:-1]}, "alert": {self.alert.to_json()}}}'.encode())
        self.size = len(line)
        return line


class Journal:
    """The file, and what it is to hold, for one thread of one process.

    :meth:`add` and :meth:`settle` change what it is to hold, :meth:`write` and
    :meth:`write_settled` the file. What could not be written is written by the next that can. A
    file that was removed or replaced is not written to: what stands in its place is read, and all
    is written anew.

    Args:
        path: The file; made if it is not there.
        capacity: Alerts that may be owed to each sink; and of each, refused ones that are kept.

    Attributes:
        latest: The highest number of an alert that was ever added, 0 if none had one.

    Raises:
        ValueError: The file is of a newer release.
        OSError: It cannot be read or made, or is no regular file.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self._path, self._capacity = path, capacity
        self._owed: dict[str, _Owed] = {}
        self._counts: Counter[str] = Counter()
        self._unwritten: dict[str, _Owed] = {}
        self._settled: list[dict[str, Any]] = []
        self.latest = self._latest_written = 0
        self._fd, self._found = -1, os.stat_result([0] * 10)
        self._size, self._waste = 0, 0
        self._is_unsure, self._gap = False, b""
        self._open()

    def owed(self, sink: str) -> list[Alert]:
        """Alerts that a sink does not have yet, by their numbers, else the oldest first."""
        found = [entry.alert for entry in self._owed.values() if sink in entry.sinks]
        return sorted(found, key=lambda alert: alert.number)

    def refused(self, sink: str) -> list[tuple[Alert, str]]:
        """Alerts that a sink has refused for good, and why, the oldest first."""
        found = [entry for entry in self._owed.values() if sink in entry.refused]
        return [(entry.alert, entry.refused[sink]) for entry in found]

    @property
    def sinks(self) -> set[str]:
        """All that are owed an alert."""
        return {name for entry in self._owed.values() for name in entry.sinks}

    @property
    def is_behind(self) -> bool:
        """Whether the file lacks something that a crash must not forget."""
        return bool(self._unwritten) or self._is_unsure or self.latest > self._latest_written

    @property
    def settled_count(self) -> int:
        """What was settled and is not in the file."""
        return len(self._settled)

    def add(self, alert: Alert, sinks: Iterable[str]) -> list[str]:
        """Owe an alert to sinks; those that are owed too much already, and are not owed this."""
        self.latest = max(self.latest, alert.number)
        if alert.id in self._owed:
            return []
        names = list(sinks)
        room = [name for name in names if self._counts[name] < self._capacity]
        if room:
            self._unwritten[alert.id] = self._take(_Owed(alert, room))
        return [name for name in names if name not in room]

    def settle(self, alert_id: str, sink: str, why: str | None = None) -> None:
        """A sink has an alert, or refuses it for good, and why. A crash may forget it, not more."""
        entry = self._owed.get(alert_id)
        if entry is None or sink not in entry.sinks:
            return
        self._strike_out(entry, sink, why)
        if alert_id not in self._unwritten:
            record = {"done": alert_id, "sink": sink} | ({} if why is None else {"why": why})
            self._settled.append(record)
            self._waste += 0 if alert_id in self._owed else entry.size

    def give_up_strangers(self, known: Collection[str]) -> int:
        """Forget alerts of unknown sinks beyond the capacity, the oldest first; how many."""
        known = set(known)
        theirs = [e for e in self._owed.values() if known.isdisjoint([*e.sinks, *e.refused])]
        for entry in (beyond := theirs[: max(0, len(theirs) - self._capacity)]):
            del self._owed[entry.alert.id]
            self._counts.subtract(entry.sinks)
            self._waste += entry.size
        return len(beyond)

    def write(self) -> None:
        """Have all that was added on disk on return.

        Raises:
            OSError: The disk refuses.
            ValueError: A file of a newer release stands in the place of this.
        """
        if self._is_unsure:
            self._rewrite()
        elif not self._is_in_place():
            self._rewrite_with_successor()
        elif lines := self._news():
            self._append(lines)
            self._unwritten.clear()
            self._latest_written = self.latest

    def write_settled(self) -> None:
        """Write what was settled, which is on disk when the system has it there.

        Whether the file is still in its place is not asked: if not, :meth:`write` finds it out, and
        writes all of it elsewhere.

        Raises:
            OSError: The disk refuses.
        """
        if self._settled and self._fd >= 0 and not self._is_unsure:
            lines = b"".join(map(line_of, self._settled))
            self._append(lines)
            self._settled.clear()
            self._waste += len(lines)
            if self._waste > max(_WASTE, self._size // 2):
                self._compact()

    def close(self) -> None:
        """Leave only what is owed in the file, as far as the disk takes it, and give it back."""
        with suppress(OSError, ValueError):
            if self._waste or self._settled or self.is_behind:
                self._rewrite() if self._is_in_place() else self.write()
        self._leave()

    def _news(self) -> bytes:
        if not self._unwritten and self.latest > self._latest_written:
            return line_of({"latest": self.latest})
        return b"".join(entry.line(self.latest) for entry in self._unwritten.values())

    def _append(self, lines: bytes) -> None:
        content = self._gap + lines
        try:
            write_all(self._fd, content)
        except OSError:
            self._cut()
            raise
        if self.is_behind:
            try:
                os.fsync(self._fd)
            except OSError:  # of what was not synchronised a later fsync may say nothing
                self._is_unsure = True
                raise
        self._gap = b""
        self._size += len(content)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._is_unsure = True

    def _open(self) -> None:
        """Read the file; write it anew if that is of use, and else go on with it."""
        try:
            content, is_kept = self._read()
        except FileNotFoundError:
            self._rewrite()
            return
        self._size = len(content)
        self._latest_written = self.latest
        try:
            if not is_kept:
                self._rewrite()
        except OSError as error:
            _log.warning("%s could not be written anew: %s. [OOD403]", self._path, error)
        if self._fd >= 0 and self._size == len(content) and not content.endswith(b"\n"):
            self._gap = b"\n" if content else b""

    def _read(self) -> tuple[bytes, bool]:
        """Take in what the file holds; its bytes, and whether they can stay as they are."""
        self._use(open_private(self._path, os.O_RDWR | os.O_APPEND))
        content = _all(self._fd)
        try:
            found = read(content)
        except ValueError as error:
            self._leave()
            raise ValueError(
                f"Expected a spool of format {FORMAT} in {self._path}, got {error}: it is of a "
                "newer release."
            ) from error
        damaged = [
            *found.damaged,
            *(line for line, record in found.lines if not self._learn(record)),
        ]
        self.latest = max(self.latest, found.highest)
        # Lines that cannot be kept elsewhere stay, and are left out again.
        is_safe = not damaged or self._keep(damaged, found)
        return content, not is_safe or (found.is_current and not damaged and not self._waste)

    def _learn(self, record: dict[str, Any]) -> bool:
        """Take in a record; whether it is one."""
        try:
            if "alert" in record:
                alert = Alert.from_json(json.dumps(record["alert"]))
                sinks, refused = map(str, record["for"]), dict(record.get("refused", {}))
                entry = _Owed(alert, list(sinks), refused, len(json.dumps(record)))
                if alert.id not in self._owed:
                    self._take(entry)
                self.latest = max(self.latest, alert.number)
            elif "done" in record:
                self._learn_that_settled(
                    str(record["done"]), str(record["sink"]), record.get("why")
                )
            elif not record.keys() <= _HEADS:
                return False
            self.latest = max(self.latest, int(record.get("latest", 0)))
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            return False
        return True

    def _learn_that_settled(self, alert_id: str, sink: str, why: str | None) -> None:
        self._waste += 1  # so that what is settled is not kept for another start
        entry = self._owed.get(alert_id)
        if entry is not None and sink in entry.sinks:
            self._strike_out(entry, sink, why)

    def _take(self, entry: _Owed) -> _Owed:
        self._owed[entry.alert.id] = entry
        self._counts.update(entry.sinks)
        return entry

    def _strike_out(self, entry: _Owed, sink: str, why: str | None) -> None:
        entry.sinks.remove(sink)
        self._counts[sink] -= 1
        if why is not None:
            entry.refused[sink] = why
            self._forget_refused(sink)
        self._drop_if_settled(entry)

    def _forget_refused(self, sink: str) -> None:
        refused = [entry for entry in self._owed.values() if sink in entry.refused]
        for entry in refused[: -self._capacity]:
            del entry.refused[sink]
            self._drop_if_settled(entry)

    def _drop_if_settled(self, entry: _Owed) -> None:
        if not entry.sinks and not entry.refused:
            self._owed.pop(entry.alert.id, None)
            self._unwritten.pop(entry.alert.id, None)

    def _keep(self, damaged: list[bytes], found: Content) -> bool:
        """Put lines aside; whether that was possible."""
        aside = self._path.with_suffix(".damaged")
        torn = ", the last torn by a crash," if found.is_torn else ""
        try:
            fd = open_private(aside, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            try:
                write_all(fd, b"".join(line + b"\n" for line in damaged))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            text = "%d lines of %s%s could not be read, and stay there: %s. [OOD406]"
            _log.warning(text, len(damaged), self._path, torn, error)
            return False
        text = "%d lines of %s%s could not be read, and are kept in %s. [OOD406]"
        _log.warning(text, len(damaged), self._path, torn, aside)
        return True

    def _compact(self) -> None:
        try:
            self._rewrite()
        except OSError as error:
            self._waste = 0  # tried again when there is as much again
            _log.warning("%s could not be written anew: %s. [OOD403]", self._path, error)

    def _rewrite_with_successor(self) -> None:
        """The file was removed or replaced, by whatever means, while this process had the lock."""
        _log.warning(
            "%s was removed or replaced; all that is owed is written anew. [OOD404]", self._path
        )
        self._leave()
        with suppress(FileNotFoundError):
            self._read()
        self._is_unsure = True
        self._rewrite()

    def _rewrite(self) -> None:
        """Only what is owed, in a file that takes the old one's place at once."""
        entries = self._owed.values()
        head = line_of({"ood_monitor_spool": FORMAT, "latest": self.latest})
        content = head + b"".join(entry.line(self.latest) for entry in entries)
        try:
            write_private(self._path, content)
            fd = open_private(self._path, os.O_RDWR | os.O_APPEND)
        except OSError:
            # If it is the new file that is in place, what is written to the old one is lost.
            self._is_unsure = self._is_unsure or not self._is_in_place()
            raise
        self._leave()
        self._use(fd)
        self._size, self._waste = len(content), 0
        self._is_unsure, self._gap = False, b""
        self._unwritten.clear()
        self._settled.clear()
        self._latest_written = self.latest

    def _is_in_place(self) -> bool:
        return self._fd >= 0 and is_at(self._found, self._path)

    def _use(self, fd: int) -> None:
        self._fd, self._found = fd, os.fstat(fd)

    def _leave(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _all(fd: int) -> bytes:
    parts = iter(lambda: os.read(fd, 1 << 20), b"")
    return b"".join(parts)
