"""What a watch keeps: in a file of this user's alone, sealed by a checksum, with one writer."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ood_monitor.private_files import FileLock, open_private, write_private

__all__ = ["StateFile"]

#: Version of the file; it grows when an older reader would misread it.
_FORMAT = 2


class StateFile:
    """A JSON object in a file, which changes as a whole; use :meth:`locked`.

    Args:
        path: The file.
        lock: Of its writer.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self._path, self._lock = path, lock

    @classmethod
    @contextmanager
    def locked(cls, path: Path) -> Iterator["StateFile"]:
        """The file of a path, and no other program has it meanwhile.

        The lock is beside it, in ``<name>.lock``, and stays there.

        Raises:
            BlockingIOError: Another program has it.
            OSError: There is no such folder, or it cannot be written to.
        """
        lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            lock.acquire()
        except BlockingIOError as error:
            raise BlockingIOError(
                f"Expected a state that no other watch or accept has open: {path}. End that one "
                f"first ({error.strerror})."
            ) from error
        try:
            yield cls(path, lock)
        finally:
            lock.release()

    @staticmethod
    def opened(path: Path) -> dict[str, Any]:
        """What was written last to a path, by whoever has it.

        Raises:
            OSError: There is no file, or it is a link or no regular file.
            ValueError: It has one bit that was not written so.
        """
        with os.fdopen(open_private(path, os.O_RDONLY), "rb") as file:
            return _opened(file.read())

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    @property
    def is_there(self) -> bool:
        """Whether something has that name, be it a link to nothing."""
        return os.path.lexists(self._path)

    def read(self) -> dict[str, Any]:
        """What was written last.

        Raises:
            OSError: There is no file, or it is a link or no regular file.
            ValueError: It has one bit that was not written so.
        """
        return self.opened(self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Replace the file by one with this record.

        Raises:
            OSError: It cannot be written, is a link or no regular file, or its lock was removed.
        """
        if not self._lock.is_held:
            raise OSError(
                f"Expected to be alone with {self._path}, got a lock file that was removed "
                "meanwhile: another program may write there."
            )
        write_private(self._path, _sealed({"format": _FORMAT} | record))


def _sealed(record: dict[str, Any]) -> bytes:
    text = json.dumps(record)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return f"{json.dumps(record | {'checksum': checksum})}\n".encode()


def _opened(data: bytes) -> dict[str, Any]:
    """The record, if sealing it again gives each of these bytes."""
    try:
        record = json.loads(data)
        if not isinstance(record, dict):
            raise ValueError(f"a JSON {type(record).__name__}")
        found = record.pop("checksum", None)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
    if record.get("format") != _FORMAT:
        raise ValueError(
            f"format {record.get('format')!r}, where this release reads {_FORMAT}: it is of "
            "another release, or was damaged"
        )
    if _sealed(record) != data:
        raise ValueError(f"other bytes than those of checksum {found!r}: it was damaged or edited")
    return record
