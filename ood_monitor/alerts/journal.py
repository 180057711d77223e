"""A file of alerts that are owed to sinks: appended to, synchronised, and read back after a crash.

One JSON line each: a head with the format, then `{"alert": {...}, "for": [sinks]}` when an alert
comes and `{"done": id, "sink": name}` when one of them has it. A line that a crash tore is the last
one, and was promised to nobody.
"""

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ood_monitor.alerts.alert import Alert

__all__ = ["Journal"]

_FORMAT = 1
_HEAD = json.dumps({"ood_monitor_spool": _FORMAT}).encode() + b"\n"

#: Bytes of lines that say nothing new from which on the file is written anew.
_WASTE = 1 << 20

_log = logging.getLogger(__name__)


@dataclass
class _Owed:
    """An alert and the sinks that do not have it yet."""

    alert: Alert
    sinks: list[str]

    def line(self) -> bytes:
        alert = json.loads(self.alert.to_json())
        return json.dumps({"alert": alert, "for": self.sinks}).encode() + b"\n"


class Journal:
    """The file, for one thread of one process.

    Args:
        path: The file; made if it is not there.
        capacity: Alerts that it holds.

    Raises:
        ValueError: The file is another's, or of a newer release.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self._path, self._capacity = path, capacity
        self._owed: dict[str, _Owed] = {}
        self._fd, self._size, self._waste = -1, 0, 0
        self._recover()
        self._rewrite()

    def owed(self, sink: str) -> list[Alert]:
        """Alerts that a sink does not have yet, the oldest first."""
        return [entry.alert for entry in self._owed.values() if sink in entry.sinks]

    @property
    def sinks(self) -> set[str]:
        """All that are owed an alert."""
        return {name for entry in self._owed.values() for name in entry.sinks}

    def add(self, alert: Alert, sinks: Iterable[str]) -> bool:
        """Owe an alert to sinks; on disk on return, which is False if there is no room.

        Raises:
            OSError: The disk refuses.
        """
        if len(self._owed) >= self._capacity:
            return alert.id in self._owed
        if alert.id not in self._owed:
            entry = _Owed(alert, list(sinks))
            self._append(entry.line())
            os.fsync(self._fd)
            self._owed[alert.id] = entry
        return True

    def done(self, alert_id: str, sink: str) -> None:
        """A sink has an alert. A crash may forget it, not more.

        Raises:
            OSError: The disk refuses.
        """
        entry = self._owed.get(alert_id)
        if entry is None or sink not in entry.sinks:
            return
        entry.sinks.remove(sink)
        if not entry.sinks:
            del self._owed[alert_id]
        if not self._owed:
            self._cut(len(_HEAD))
            self._waste = 0
            return
        line = json.dumps({"done": alert_id, "sink": sink}).encode() + b"\n"
        self._append(line)
        self._waste += len(line) if entry.sinks else len(line) + len(entry.line())
        if self._waste > max(_WASTE, self._size // 2):
            self._rewrite()

    def forget(self, sinks: Iterable[str]) -> int:
        """Owe nothing to these sinks any more; the alerts that this gives up."""
        gone, before = set(sinks), len(self._owed)
        for entry in self._owed.values():
            entry.sinks = [name for name in entry.sinks if name not in gone]
        self._owed = {key: entry for key, entry in self._owed.items() if entry.sinks}
        self._rewrite()
        return before - len(self._owed)

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, line: bytes) -> None:
        try:
            _write(self._fd, line)
        except OSError:
            with suppress(OSError):  # the torn line is found when the file is next read
                self._cut(self._size)
            raise
        self._size += len(line)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._size = size

    def _recover(self) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        if not content.startswith(_HEAD):
            if not _HEAD.startswith(content):
                raise ValueError(
                    f"Expected a spool of format {_FORMAT} in {self._path}, got {content[:60]!r}."
                )
            return
        *lines, torn = content[len(_HEAD) :].split(b"\n")
        damaged = [line for line in lines if not self._take(line)]
        if torn:
            _log.warning("The last line of %s was torn by a crash, and is left out.", self._path)
        if damaged:
            self._keep(damaged)

    def _take(self, line: bytes) -> bool:
        """Whether a line could be read."""
        try:
            record: dict[str, Any] = json.loads(line)
            if "done" in record:
                self._settle(str(record["done"]), str(record["sink"]))
            else:
                alert = Alert.from_json(json.dumps(record["alert"]))
                self._owed[alert.id] = _Owed(alert, [str(name) for name in record["for"]])
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return True

    def _settle(self, alert_id: str, sink: str) -> None:
        entry = self._owed.get(alert_id)
        if entry is not None:
            entry.sinks = [name for name in entry.sinks if name != sink]
            if not entry.sinks:
                del self._owed[alert_id]

    def _keep(self, damaged: list[bytes]) -> None:
        aside = self._path.with_suffix(".damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        text = "%d lines of %s could not be read, and are kept in %s."
        _log.warning(text, len(damaged), self._path, aside)

    def _rewrite(self) -> None:
        """Only what is owed, in a file that takes the old one's place at once."""
        new = self._path.with_suffix(".new")
        content = _HEAD + b"".join(entry.line() for entry in self._owed.values())
        fd = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            _write(fd, content)
            os.fsync(fd)
            os.replace(new, self._path)
            _synchronise(self._path.parent)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._size, self._waste = fd, len(content), 0


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _synchronise(folder: Path) -> None:
    """The file's new name is in the folder, which is synchronised apart."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
