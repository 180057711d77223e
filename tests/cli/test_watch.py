"""`ood-monitor watch`, as a process of its own: its lines, its signals and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.cli_cases import flow, grey_images, write_images
from torch import Tensor
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.cli import watching as watching_module
from ood_monitor.cli.sources import FolderFiles
from ood_monitor.cli.state import StateFile

OK, WARN, ALERT = 0, 3, 4

#: The longest that a process is waited for, in seconds: what it does takes one or two.
PATIENCE = 60


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    held_out = write_images(root / "held_out", grey_images(400))
    result = CliRunner().invoke(
        app, ["fit", "support.cli_cases:flow", str(held_out), str(root / "detector")]
    )
    assert result.exit_code == 0, result.output
    return root / "detector"


def usual(folder: Path, n: int = 20) -> Path:
    return write_images(folder, np.random.default_rng(8).integers(0, 256, (n, 4, 4), np.uint8))


def drifted(folder: Path, n: int = 60) -> Path:
    return write_images(folder, grey_images(n, seed=2) // 8)


def blank(folder: Path) -> Path:
    return write_images(folder, np.zeros((1, 4, 4), np.uint8))


def unended(*arguments: object) -> Result:
    """A run in this process."""
    return CliRunner().invoke(app, ["watch", *map(str, arguments)])


def test_a_page_shows_how_the_stream_stands(detector: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "status.html", drifted(tmp_path / "inbox")
    result = unended(detector, folder, "--once", "--page", page, "--name", "uploads")
    assert result.exit_code == ALERT
    text = page.read_text(encoding="utf-8")
    for part in ("uploads", "ALERT", "Since", "Do now:", "Its watch ended at", "60, 0 of them"):
        assert part in text
    assert "ALERT drift (stream uploads): Drift" in result.stderr
    assert "More: ood-monitor guide drift" in result.stderr
    refused = unended(detector, folder, "--once", "--page", tmp_path / "nowhere" / "p.html")
    assert refused.exit_code == 1
    assert "Expected a file in a folder that is there" in refused.stderr


def watched(*arguments: object) -> Result:
    """A run in this process, of a folder as it is."""
    return unended(*arguments, "--once")


@contextmanager
def watching(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    code = "from ood_monitor.cli import app; app(prog_name='ood-monitor')"
    folders = [Path(__file__).parents[1], Path(om.__file__).parents[1]]
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "watch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def summary(text: str) -> dict[str, Any]:
    return dict(lines(text)[-1]["summary"])


def state_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())["monitor"]) if file.exists() else {"samples_seen": 0}


STREAMS: dict[str, tuple[Callable[[Path], Path], int, set[str]]] = {
    "usual": (usual, OK, set()),
    "one that is not": (blank, WARN, {"sample"}),
    "drift": (drifted, ALERT, {"drift", "explanation"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_exit_code_is_the_status(name: str, detector: Path, tmp_path: Path) -> None:
    make, code, kinds = STREAMS[name]
    result = watched(detector, make(tmp_path / "inbox"))
    assert result.exit_code == code, result.output
    alerts = [om.Alert.from_json(line) for line in result.stdout.splitlines()]
    assert {alert.kind for alert in alerts} == kinds


def test_a_drift_is_one_alert_however_long_it_lasts(detector: Path, tmp_path: Path) -> None:
    result = watched(detector, drifted(tmp_path, n=200), "--name", "camera 1")
    drifts = [alert for alert in lines(result.stdout) if alert["kind"] == "drift"]
    assert len(drifts) == 1
    assert drifts[0]["stream"] == "camera 1"


def test_files_that_cannot_be_read_are_said_and_counted(detector: Path, tmp_path: Path) -> None:
    usual(tmp_path, n=5)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "large.png")
    result = watched(detector, tmp_path, "--json")
    assert result.stderr.count("unreadable:") == 2
    assert "broken.png" in result.stderr
    assert "9 x 9" in result.stderr
    found = summary(result.stdout)
    assert (found["samples_seen"], found["invalid"], found["unreadable"]) == (7, 2, 2)
    assert [alert["kind"] for alert in lines(result.stdout)[:-1]] == ["invalid_input"]


def test_a_flagged_file_is_named(detector: Path, tmp_path: Path) -> None:
    result = watched(detector, blank(tmp_path))
    assert "0000.png" in result.stderr
    [alert] = lines(result.stdout)
    assert [sample["id"] for sample in alert["samples"]] == [str(tmp_path / "0000.png")]


def test_a_watch_resumes_as_if_it_had_never_ended(detector: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    images = np.concatenate([grey_images(50, seed=3), grey_images(20, seed=4) // 2])
    for part in (slice(0, 30), slice(30, 70)):
        for i, image in list(enumerate(images))[part]:
            Image.fromarray(image).save(inbox / f"{i:03}.png")
            os.utime(inbox / f"{i:03}.png", (i, i))
        last = watched(detector, inbox, "--state", tmp_path / "parts.json")
    whole = watched(detector, inbox, "--state", tmp_path / "whole.json")
    parts, all_at_once = (state_of(tmp_path / name) for name in ("parts.json", "whole.json"))
    assert parts | {"said": None} == all_at_once | {"said": None}
    assert last.exit_code == whole.exit_code
    assert state_of(tmp_path / "whole.json")["samples_seen"] == 70


def test_a_file_that_is_written_anew_is_a_new_sample(detector: Path, tmp_path: Path) -> None:
    arguments = (detector, usual(tmp_path / "inbox", n=2), "--state", tmp_path / "state", "--json")
    assert summary(watched(*arguments).stdout)["samples_seen"] == 2
    Image.fromarray(grey_images(1, seed=9)[0]).save(tmp_path / "inbox" / "0000.png")
    assert summary(watched(*arguments).stdout)["samples_seen"] == 3
    assert summary(watched(*arguments).stdout)["samples_seen"] == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "monitor": {}, "files": {}}'])
def test_a_damaged_state_is_a_clear_error_and_is_left_alone(
    text: str, detector: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    state.write_text(text)
    result = watched(detector, usual(tmp_path / "inbox"), "--state", state)
    assert result.exit_code == 1
    assert str(state) in result.stderr
    assert result.stderr.count("\n") == 1
    assert state.read_text() == text


def test_the_state_of_another_promise_is_refused(detector: Path, tmp_path: Path) -> None:
    usual(tmp_path / "inbox")
    state = tmp_path / "state.json"
    assert watched(detector, tmp_path / "inbox", "--state", state).exit_code == OK
    before = state.read_text()
    other = watched(detector, tmp_path / "inbox", "--state", state, "--ert", "500")
    assert other.exit_code == 1
    assert "ert" in other.stderr.lower()
    assert state.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["INBOX", "--fpr", "0.0001"], "0.0001"),
        (["INBOX", "--ert", "1"], "Expected ert in [2, inf]"),
        (["INBOX", "--state", "nowhere/state.json"], "nowhere"),
    ],
)
def test_a_wrong_watch_exits_with_1_and_a_line(
    arguments: list[str], message: str, detector: Path, tmp_path: Path
) -> None:
    inbox = str(usual(tmp_path / "inbox"))
    result = watched(detector, *(inbox if text == "INBOX" else text for text in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_watch_with_its_status(detector: Path, tmp_path: Path) -> None:
    inbox, state = usual(tmp_path / "inbox", n=3), tmp_path / "state.json"
    with watching(detector, inbox, "--state", state, "--poll", "0.1", "--json") as process:
        wait_until(lambda: state_of(state)["samples_seen"] == 3)
        blank(tmp_path / "later")
        whole = (tmp_path / "later" / "0000.png").read_bytes()
        (inbox / "late.png").write_bytes(whole)
        assert process.stdout is not None
        alert = om.Alert.from_json(process.stdout.readline())  # at once, not at the end
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == WARN, err
    assert alert.kind == "sample"
    assert summary(out)["samples_seen"] == 4
    assert "Traceback" not in err


def test_the_state_is_kept_while_nothing_comes(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, state = usual(tmp_path / "inbox", n=2), tmp_path / "state.json"
    kept: list[int] = []

    class UntilKept(FolderFiles):
        def next(self, limit: int, stop: threading.Event) -> Sequence[Path] | None:
            kept.append(state_of(state)["samples_seen"])
            return None if kept[-1] == 2 else super().next(limit, stop)

    # The command makes its source by itself, and ends when that has no more to give.
    monkeypatch.setattr(watching_module, "FolderFiles", UntilKept)
    unended(detector, inbox, "--state", state, "--poll", "0.05", "--idle", "20")
    assert kept[-1] == 2


@pytest.mark.slow
def test_a_file_is_read_when_it_has_stopped_growing(detector: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    whole = (usual(tmp_path / "other", n=1) / "0000.png").read_bytes()

    def write() -> None:
        for end in range(1, len(whole) + 1, max(1, len(whole) // 20)):
            (inbox / "slow.png").write_bytes(whole[:end])
            time.sleep(0.1)
        (inbox / "slow.png").write_bytes(whole)

    writer = threading.Thread(target=write)
    writer.start()
    result = unended(detector, inbox, "--poll", "0.5", "--idle", "5", "--json")
    writer.join()
    found = summary(result.stdout)
    assert (found["samples_seen"], found["unreadable"]) == (1, 0)


@pytest.mark.slow
def test_paths_come_by_stdin_until_it_ends(detector: Path, tmp_path: Path) -> None:
    files = sorted(drifted(tmp_path).iterdir())
    with watching(detector, "-", "--json", stdin=subprocess.PIPE) as process:
        text = "\n".join(map(str, [*files, tmp_path / "missing.png"]))
        out, err = process.communicate(text, timeout=PATIENCE)
    assert process.returncode == ALERT, err
    found = summary(out)
    assert (found["samples_seen"], found["unreadable"]) == (len(files) + 1, 1)
    assert "missing.png" in err


@pytest.mark.slow
def test_a_path_is_scored_when_it_comes_and_term_ends_the_wait(
    detector: Path, tmp_path: Path
) -> None:
    file = blank(tmp_path) / "0000.png"
    with watching(detector, "-", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{file}\n")
        process.stdin.flush()
        assert om.Alert.from_json(process.stdout.readline()).kind == "sample"
        process.send_signal(signal.SIGTERM)  # while stdin is open and silent
        assert process.wait(timeout=PATIENCE) == WARN


@pytest.mark.slow
def test_a_watch_that_was_killed_goes_on_from_its_last_state(
    detector: Path, tmp_path: Path
) -> None:
    inbox, state = tmp_path / "inbox", tmp_path / "state.json"
    write_images(inbox, grey_images(200, seed=5))
    for i, file in enumerate(sorted(inbox.iterdir())):
        os.utime(file, (i, i))
    arguments = (detector, inbox, "--state", state, "--batch-size", "1")
    with watching(*arguments, "--poll", "0.05") as process:
        wait_until(lambda: state_of(state)["samples_seen"] > 0)
        process.kill()
        process.wait()
    assert 0 < state_of(state)["samples_seen"] <= 200
    watched(*arguments)
    watched(detector, inbox, "--state", tmp_path / "whole.json", "--batch-size", "1")
    found, whole = state_of(state), state_of(tmp_path / "whole.json")
    assert found | {"said": None} == whole | {"said": None}


def test_idle_stops_a_watch(detector: Path, tmp_path: Path) -> None:
    inbox = usual(tmp_path / "inbox", n=2)
    result = unended(detector, inbox, "--poll", "0.05", "--idle", "0.5", "--json")
    assert result.exit_code == OK
    assert summary(result.stdout)["samples_seen"] == 2


def test_files_that_cannot_be_read_are_an_alert(detector: Path, tmp_path: Path) -> None:
    inbox = usual(tmp_path / "inbox", 5)
    for i in range(12):
        (inbox / f"broken-{i}.png").write_bytes(b"no image")
    result = watched(detector, inbox, "--json")
    assert result.exit_code == ALERT, result.output
    last = lines(result.stdout)[-2]
    assert (last["kind"], last["severity"]) == ("invalid_input", "critical")
    assert "10 of the latest" in str(last["message"])


# After an alert


def test_a_watch_goes_on_with_what_was_accepted(detector: Path, tmp_path: Path) -> None:
    inbox, state = drifted(tmp_path / "inbox"), tmp_path / "state.json"
    assert watched(detector, inbox, "--state", state).exit_code == ALERT
    normal, new = write_images(tmp_path / "n", grey_images(300, seed=7) // 8), tmp_path / "new"
    assert (
        CliRunner().invoke(app, ["recalibrate", *map(str, (detector, normal, new))]).exit_code == 0
    )
    refused = watched(new, inbox, "--state", state)
    assert refused.exit_code == 1
    assert "Expected the state of a watch with this detector" in refused.output
    reason = "darker lamps, approved by Ada"
    result = CliRunner().invoke(app, ["accept", str(state), str(new), "--reason", reason])
    [alert] = lines(result.stdout)
    assert (alert["kind"], alert["status"], alert["samples_seen"]) == ("accepted", "OK", 60)
    assert alert["message"] == f"Accepted: {reason}"
    write_images(inbox, grey_images(160, seed=3) // 8)
    result = watched(new, inbox, "--state", state, "--json")
    assert result.exit_code in (OK, WARN), result.output
    assert state_of(state)["samples_seen"] > 60


@pytest.mark.parametrize(
    ("content", "reason"), [("{}", "x"), ("no JSON", "x"), (None, "x"), ("state", " ")]
)
def test_what_is_no_state_is_not_accepted(
    content: str | None, reason: str, detector: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    watched(detector, usual(tmp_path / "inbox", 3), "--state", state)
    if content is None:
        state.unlink()
    elif content != "state":
        state.write_text(content)
    before = state.read_bytes() if state.exists() else None
    result = CliRunner().invoke(app, ["accept", str(state), str(detector), "--reason", reason])
    assert result.exit_code == 1
    assert (state.read_bytes() if state.exists() else None) == before


def test_what_a_watch_would_refuse_is_not_accepted(detector: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    watched(detector, usual(tmp_path / "inbox", 3), "--state", state)
    before = state.read_bytes()
    arguments = ["accept", str(state), str(detector), "--reason", "x", "--fpr", "0.000001"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, state.read_bytes()) == (1, before)
    assert "needs at least" in result.output
    with StateFile.locked(state) as kept:
        record = kept.read()
        record["monitor"]["model"] = "0" * 12
        kept.write(record)
    before = state.read_bytes()
    result = CliRunner().invoke(app, arguments[:-2])
    assert result.exit_code == 1
    assert "Expected the state of a monitor of the weights" in result.output
    assert state.read_bytes() == before


def refusing() -> om.Adapter:
    """A flow that refuses white images, as one with a bounded support does."""

    def log_prob(module: Any, x: Tensor) -> Tensor:
        if (x.flatten(1).min(1).values == 1).any():
            raise ValueError("Expected value to be within the support")
        return module.log_prob(x)  # type: ignore[no-any-return]

    return om.LogLikelihood(flow().module, log_prob)


def test_a_file_that_the_model_refuses_alone_ends_no_watch(tmp_path: Path) -> None:
    folder = tmp_path / "detector"
    held_out = write_images(tmp_path / "held_out", grey_images(240))
    arguments = ["fit", f"{__name__}:refusing", str(held_out), str(folder), "--seed", "0"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    inbox, state = usual(tmp_path / "inbox", 8), tmp_path / "state.json"
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(inbox / "white.png")
    for batch_size in (8, 4):
        result = watched(folder, inbox, "--state", state, "--batch-size", batch_size)
        assert result.exit_code in (OK, WARN), result.output
    assert (state_of(state)["samples_seen"], state_of(state)["invalid"]) == (9, 1)
