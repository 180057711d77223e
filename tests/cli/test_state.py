"""The state of a watch: for one user, one writer, and as it was written."""

import json
import os
import random
import stat
from pathlib import Path

import pytest
from support.cli_cases import grey_images, write_images
from typer.testing import CliRunner, Result

from ood_monitor.cli import app
from ood_monitor.cli.state import StateFile


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    held_out = write_images(root / "held_out", grey_images(240))
    assert run("fit", "support.cli_cases:flow", held_out, root / "detector").exit_code == 0
    write_images(root / "inbox", grey_images(20, seed=1))
    return root / "detector"


@pytest.fixture
def state(detector: Path, tmp_path: Path) -> Path:
    assert watched(detector, tmp_path / "state.json").exit_code in (0, 3)
    return tmp_path / "state.json"


def watched(detector: Path, state: Path) -> Result:
    return run("watch", detector, detector.parent / "inbox", "--once", "--state", state)


def accepted(detector: Path, state: Path) -> Result:
    return run("accept", state, detector, "--reason", "x")


def read(path: Path) -> object:
    with StateFile.locked(path) as state:
        return state.read()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


#: How often a bit is flipped, each time in another place.
FLIPS = 1000


def test_each_of_a_thousand_flipped_bits_is_refused_with_a_word(state: Path) -> None:
    whole = state.read_bytes()
    assert read(state) == {k: v for k, v in json.loads(whole).items() if k != "checksum"}
    draw = random.Random(0)
    refused = []
    with StateFile.locked(state) as kept:
        for place in draw.sample(range(8 * len(whole)), FLIPS):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            state.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"\w"):
                kept.read()
            refused.append(place)
    assert len(refused) == FLIPS


@pytest.mark.parametrize("at", [0, 0.3, 0.9, -2])
def test_a_flipped_bit_ends_watch_and_accept_and_is_left_as_it_is(
    at: float, detector: Path, state: Path
) -> None:
    damaged = bytearray(state.read_bytes())
    damaged[int(at * len(damaged)) if 0 <= at < 1 else int(at)] ^= 1
    state.write_bytes(damaged)
    for result in (watched(detector, state), accepted(detector, state)):
        assert result.exit_code == 1
        assert f"Expected the state of a watch with this detector and --ert in {state}, got" in (
            result.stderr
        )
    assert state.read_bytes() == damaged


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.rstrip(b"\n"),
        lambda content: content + b"\n",
        lambda content: content.replace(b": ", b":"),
        lambda content: content.replace(b'"format": 2', b'"format": 2, "format": 2'),
        lambda content: content[: len(content) // 2],
        lambda content: json.dumps({"format": 2, "monitor": {}, "files": {}}).encode(),
    ],
)
def test_what_was_edited_is_refused(change: object, state: Path) -> None:
    state.write_bytes(change(state.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"\w"):
        read(state)


def test_a_state_is_this_users_alone(detector: Path, state: Path) -> None:
    assert mode(state) == 0o600
    state.chmod(0o644)
    assert accepted(detector, state).exit_code == 0
    assert mode(state) == mode(state.with_name("state.json.lock")) == 0o600


@pytest.mark.parametrize("target", ["there.json", "nowhere.json"])
def test_no_link_is_followed(target: str, detector: Path, state: Path, tmp_path: Path) -> None:
    state.rename(tmp_path / "there.json")
    before = (tmp_path / "there.json").read_bytes()
    state.symlink_to(target)
    for result in (watched(detector, state), accepted(detector, state)):
        assert result.exit_code == 1
        assert "got a symbolic link" in result.stderr
    assert (tmp_path / "there.json").read_bytes() == before
    assert not (tmp_path / "nowhere.json").exists()


def test_a_pipe_is_no_state(detector: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    assert "Expected a regular file" in watched(detector, tmp_path / "state.json").stderr


def test_who_comes_second_is_told_who_has_it(detector: Path, state: Path) -> None:
    before = state.read_bytes()
    with StateFile.locked(state):
        for result in (watched(detector, state), accepted(detector, state)):
            assert result.exit_code == 1
            assert f"Expected a state that no other watch or accept has open: {state}" in (
                result.stderr
            )
            assert f"process {os.getpid()}" in result.stderr
    assert state.read_bytes() == before
    assert accepted(detector, state).exit_code == 0


def test_who_has_lost_the_lock_does_not_write(state: Path) -> None:
    before = state.read_bytes()
    with StateFile.locked(state) as first:
        state.with_name("state.json.lock").unlink()
        with StateFile.locked(state) as second:
            with pytest.raises(OSError, match="a lock file that was removed meanwhile"):
                first.write({"monitor": {}})
            assert state.read_bytes() == before
            second.write({"monitor": {}})
    assert read(state) == {"format": 2, "monitor": {}}


def test_nothing_is_left_beside_what_is_not_there(detector: Path, tmp_path: Path) -> None:
    result = accepted(detector, tmp_path / "state.json")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "got nothing there" in result.stderr
