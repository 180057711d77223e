"""A user's files, opened: regular ones alone, and none that is larger than what is read can be."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_regular"]

#: What a path may lead to instead of a file.
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

#: A pipe without a writer is then not waited for, and no terminal is taken for our own.
_FLAGS = os.O_RDONLY
for _name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"):  # not all are everywhere
    _FLAGS |= getattr(os, _name, 0)


def open_regular(path: str | os.PathLike[str], most: int) -> BinaryIO:
    """A file to read, of at most so many bytes.

    What it is is asked of the file that was opened, not of its name, which may be another's by
    then. Links are followed.

    Args:
        path: Of the file.
        most: In bytes.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is no regular file, or has more bytes.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if Path(path).is_socket():  # which the system will not open at all
            raise ValueError(f"Expected a regular file, got a socket: {path}.") from error
        raise
    try:
        _check(os.fstat(descriptor), path, most)
        return os.fdopen(descriptor, "rb")
    except BaseException:  # also where it is interrupted
        os.close(descriptor)
        raise


def _check(status: os.stat_result, path: str | os.PathLike[str], most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"Expected a regular file, got {kind}: {path}.")
    if status.st_size > most:
        raise ValueError(
            f"Expected a file of at most {most:,} bytes, got {status.st_size:,}: {path}."
        )
