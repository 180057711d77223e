"""Private files: nobody else reads them, nothing else is in their place, one has the lock."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from support.alert_cases import started

from ood_monitor.private_files import FileLock, is_at, open_private, write_private

REFUSED = "Expected a regular file, got a symbolic link, a folder or a device"

MAKERS: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to(path.with_name("secret")),
    "dangling link": lambda path: path.symlink_to(path.with_name("nothing")),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def taken(path: Path) -> FileLock:
    lock = FileLock(path)
    lock.acquire()
    return lock


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT], ids=["read", "write"])
def test_what_is_no_regular_file_is_refused_and_left_alone(
    kind: str, flags: int, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    MAKERS[kind](path := tmp_path / "file")
    with pytest.raises(OSError, match=REFUSED):
        open_private(path, flags)
    with pytest.raises(OSError, match=REFUSED):
        write_private(path, b"new")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert len(list(tmp_path.iterdir())) == 1 + (path.is_symlink() or path.exists())


def test_a_file_is_this_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        os.close(open_private(tmp_path / "made", os.O_WRONLY | os.O_CREAT))
        write_private(tmp_path / "written", b"x")
        (tmp_path / "open").write_bytes(b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "open") == 0o666
    os.close(open_private(tmp_path / "open", os.O_RDONLY))
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}


def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private(path := tmp_path / "file", b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_private(path, b"new and longer")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
    write_private(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]


def test_a_lock_is_one_owners_until_it_is_given_back(tmp_path: Path) -> None:
    lock = taken(tmp_path / "lock")
    with pytest.raises(BlockingIOError, match=f"got one that process {os.getpid()} since 20"):
        taken(tmp_path / "lock")
    lock.release()
    assert not lock.is_held
    taken(tmp_path / "lock").release()


def test_a_folder_can_be_locked(tmp_path: Path) -> None:
    lock = taken(tmp_path)
    with pytest.raises(BlockingIOError, match="got one that another process has"):
        taken(tmp_path)
    lock.release()


def test_who_has_a_lock_sees_that_its_file_is_gone(tmp_path: Path) -> None:
    lock = taken(path := tmp_path / "lock")
    path.unlink()
    assert not lock.is_held
    path.write_bytes(b"")
    assert not lock.is_held
    lock.release()


def test_a_file_that_is_removed_while_it_is_being_locked_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, real = tmp_path / "lock", fcntl.flock
    removed: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(fd)
            path.unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = taken(path)
    assert removed
    assert lock.is_held
    with pytest.raises(BlockingIOError):
        taken(path)
    lock.release()


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=REFUSED):
        taken(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_forked_child_does_not_have_the_lock(tmp_path: Path) -> None:
    script = """
import os, sys, time
from ood_monitor.private_files import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
if os.fork() == 0:
    print(lock.is_held, flush=True)
    sys.stdin.read()
    os._exit(0)
os._exit(0)
"""
    process = started(script, str(tmp_path / "lock"))
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    process.wait()
    taken(tmp_path / "lock").release()  # though the child still runs
    process.communicate()


def test_is_at_tells_a_file_from_its_successor(tmp_path: Path) -> None:
    fd = open_private(path := tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    found = os.fstat(fd)
    assert is_at(found, path)
    write_private(path, b"another")
    assert not is_at(found, path)
    path.unlink()
    assert not is_at(found, path)
    os.close(fd)
