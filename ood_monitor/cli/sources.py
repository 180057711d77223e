"""Where `watch` gets its files from: a folder that fills, or paths on stdin."""

import os
import select
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from ood_monitor.cli.images import is_image

__all__ = ["FolderFiles", "ListedFiles", "Source"]

#: The longest that a signal waits for stdin, in seconds.
_GLANCE = 0.2

#: Time of change in nanoseconds, and size in bytes.
_Stamp = tuple[int, int]


class Source(Protocol):
    """Gives files in the order in which they came."""

    def next(self, limit: int, stop: Event) -> Sequence[Path] | None:
        """At most so many new files; none if there are none yet, None if none will come."""

    def state(self) -> dict[str, Any]:
        """What was given so far, as JSON can hold it."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Do not give again what was given before :meth:`state`."""


class FolderFiles:
    """The images below a folder, as they appear, the oldest first.

    A file is given when it has not changed between two looks, so that none is read half written;
    again if it is written anew. With ``once`` what is there is given as it is.

    Args:
        root: The folder.
        poll: Seconds between two looks.
        once: Whether to stop when all is given.
    """

    def __init__(self, root: Path, poll: float, *, once: bool) -> None:
        if not root.is_dir():
            raise NotADirectoryError(f"Expected a folder to watch, got {root}.")
        self._root, self._poll, self._once = root, poll, once
        self._given: dict[str, _Stamp] = {}
        self._growing: dict[str, _Stamp] = {}
        self._ready: list[tuple[str, _Stamp]] = []
        self._looked = False

    def next(self, limit: int, stop: Event) -> Sequence[Path] | None:
        """As :meth:`Source.next`; waits before each look but the first."""
        if not self._ready:
            if self._looked and not self._once:
                stop.wait(self._poll)
            self._look()
        if not self._ready and self._once:
            return None
        batch, self._ready = self._ready[:limit], self._ready[limit:]
        self._given.update(batch)
        return [self._root / name for name, _ in batch]

    def state(self) -> dict[str, Any]:
        """Names and stamps of the files given that are still there."""
        there = {k: v for k, v in self._given.items() if os.path.lexists(self._root / k)}
        self._given = there
        return {name: list(stamp) for name, stamp in there.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As :meth:`Source.load_state`."""
        self._given = {str(name): (int(at), int(size)) for name, (at, size) in state.items()}

    def _look(self) -> None:
        found = {
            name: stamp for name, stamp in self._stamps().items() if self._given.get(name) != stamp
        }
        ready = {k: v for k, v in found.items() if self._once or self._growing.get(k) == v}
        self._growing = {k: v for k, v in found.items() if k not in ready}
        self._looked = True
        self._ready = sorted(ready.items(), key=lambda item: (item[1][0], item[0]))

    def _stamps(self) -> dict[str, _Stamp]:
        stamps: dict[str, _Stamp] = {}
        for folder, _, names in os.walk(self._root):
            for name in filter(is_image, names):
                path = Path(folder, name)
                status = _status(path)
                if status is None:
                    continue
                relative = path.relative_to(self._root).as_posix()
                stamps[relative] = (status.st_mtime_ns, status.st_size)
        return stamps


def _status(path: Path) -> os.stat_result | None:
    """Of a file; of a link that leads to none its own; None if it is gone since."""
    for look in (path.stat, path.lstat):
        try:
            return look()
        except OSError:
            continue
    return None


class ListedFiles:
    """The files that the lines of an open file name, until it ends.

    Args:
        descriptor: Of the open file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = b""
        self._paths: list[Path] = []
        self._ended = False

    def next(self, limit: int, stop: Event) -> Sequence[Path] | None:
        """As :meth:`Source.next`."""
        wait = _GLANCE
        while len(self._paths) < limit and not self._ended and self._has_more(wait):
            self._read()
            wait = 0.0
        if not self._paths and self._ended:
            return None
        batch, self._paths = self._paths[:limit], self._paths[limit:]
        return batch

    def state(self) -> dict[str, Any]:
        """Nothing: who writes the paths knows which were written."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing is left out."""

    def _has_more(self, seconds: float) -> bool:
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def _read(self) -> None:
        read = os.read(self._descriptor, 1 << 16)
        self._ended = not read
        *lines, self._text = (self._text + read).split(b"\n")
        if self._ended and self._text:
            lines, self._text = [*lines, self._text], b""
        self._paths += [Path(os.fsdecode(line.rstrip(b"\r"))) for line in lines if line.strip()]


class Quiet:
    """How long nothing came.

    Args:
        seconds: After which it has been too long; None for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def is_over(self, *, came: bool) -> bool:
        """Whether it has been too long, given whether something came just now."""
        if came:
            self._since = time.monotonic()
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds
