"""Files that are replaced: whole, all or none, and with nothing left beside them."""

from pathlib import Path

import pytest

from ood_monitor.whole_files import replace_files


def test_files_are_made_and_replaced(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(b"before")
    replace_files({new: b"1", old: b"2"})
    assert (new.read_bytes(), old.read_bytes()) == (b"1", b"2")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


def test_where_one_cannot_be_written_none_is_replaced(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"before")
    with pytest.raises(FileNotFoundError):
        replace_files({old: b"after", tmp_path / "nowhere" / "new": b"1"})
    assert old.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    replace_files({tmp_path / "made": b""})
    assert (tmp_path / "made").stat().st_mode == plain.stat().st_mode
