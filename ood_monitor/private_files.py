"""Files of this user's alone: mode 0600, no link followed, replaced as a whole, locked by one.

What is asked for by name is what is opened: a symbolic link, a named pipe or a device in a file's
place is refused, since another may have put it there.
"""

import errno
import os
import stat
import tempfile
import time
from contextlib import suppress
from os import PathLike
from pathlib import Path

from ood_monitor.processes import after_fork_in_child_of

__all__ = ["FileLock", "is_at", "open_private", "write_all", "write_private"]

_MODE = 0o600
_IS_POSIX = os.name == "posix"

#: A link is refused, and a named pipe neither waited for nor written to.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def open_private(path: str | PathLike[str], flags: int) -> int:
    """Open a regular file that only this user may read.

    Args:
        path: The file. Folders above it may be links.
        flags: As of `os.open`; a file that is made, or was open to others, gets mode 0600.

    Returns:
        The file descriptor, which the caller closes.

    Raises:
        OSError: It cannot be opened, or it is a symbolic link or no regular file.
    """
    try:
        fd = os.open(path, flags | _SAFE, _MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _no_file(path) from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _no_file(path)
        is_open = _IS_POSIX and stat.S_IMODE(found.st_mode) & ~_MODE
        if is_open and found.st_uid == os.geteuid():
            os.fchmod(fd, _MODE)
    except OSError:
        os.close(fd)
        raise
    return fd


def write_private(path: str | PathLike[str], data: bytes) -> None:
    """Replace a file as a whole: after a crash it holds the old bytes or the new, never a part.

    Args:
        path: The file; made with mode 0600 if it is not there.
        data: What it is to hold, on disk on return.

    Raises:
        OSError: It cannot be written, or it is a symbolic link or no regular file. If it is the
            folder that could not be synchronised, the file is the new one already.
    """
    path = Path(path)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _no_file(path)
    fd, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
    except BaseException:  # also where it is interrupted; it is raised on
        with suppress(OSError):
            os.unlink(new)
        raise
    _synchronise(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, in as many calls as the system takes.

    Raises:
        OSError: The disk refuses; a part may be written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_at(found: os.stat_result, path: str | PathLike[str]) -> bool:
    """Whether a file that is open is the one that a path names, and was not removed there.

    Args:
        found: What `os.fstat` says of it: its number is no other's while it is open.
        path: Where it was.
    """
    try:
        return os.path.samestat(found, os.lstat(path))
    except OSError:
        return False


class FileLock:
    """A lock that one process has at a time, and that ends with it.

    It is of what the path names *now*: who locked a file that another has removed meanwhile begins
    again. Whoever removes the file of a held lock makes way for a second owner all the same, which
    the first sees by :attr:`is_held`; lock the folder too where that must not be. A forked child
    does not have the lock.

    Args:
        path: A file, made if it is not there, which then says who has it; or a folder.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = str(Path(path))
        self._fd, self._found = -1, os.stat_result([0] * 10)
        # A child that outlives its parent must not keep a lock from the parent's successor.
        after_fork_in_child_of(self, FileLock.release)

    @property
    def is_held(self) -> bool:
        """Whether this has the lock, and its file is still in its place."""
        return self._fd >= 0 and is_at(self._found, self._path)

    def acquire(self) -> None:
        """Take the lock, which is not held; does not wait.

        Raises:
            BlockingIOError: Another has it; the error says who.
            OSError: The file cannot be used, or the system has no such locks.
        """
        fd = self._locked()
        while not is_at(found := os.fstat(fd), self._path):
            os.close(fd)
            fd = self._locked()
        self._fd, self._found = fd, found
        if stat.S_ISREG(found.st_mode):
            with suppress(OSError):  # on a full disk the lock is one all the same
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} since {time.strftime('%F %T')}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _locked(self) -> int:
        try:
            import fcntl
        except ImportError as error:
            text = "Expected a POSIX system for a lock, got one without file locks"
            raise OSError(errno.ENOTSUP, text, self._path) from error

        if os.path.isdir(self._path):
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            fd = open_private(self._path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(fd)
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise
            text = f"Expected a lock that nobody has, got one that {owner} has"
            raise BlockingIOError(errno.EWOULDBLOCK, text, self._path) from error
        return fd


def _owner(fd: int) -> str:
    try:
        return os.pread(fd, 80, 0).decode(errors="replace").strip() or "another process"
    except OSError:  # of a folder
        return "another process"


def _no_file(path: str | PathLike[str]) -> OSError:
    text = "Expected a regular file, got a symbolic link, a folder or a device"
    return OSError(errno.ELOOP, text, str(path))


def _synchronise(folder: Path) -> None:
    """A file's new name is in its folder, which is synchronised apart."""
    if not _IS_POSIX:
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
