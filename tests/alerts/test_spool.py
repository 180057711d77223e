"""The spool: what a crash leaves is owed, and nothing that happens to the folder is silent."""

import errno
import fcntl
import json
import logging
import os
import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.alert_cases import ALERT, LONG, Broken, Gate, Recorder, alert, ended, run, started
from tenacity import wait_none

from ood_monitor.alerts import Alert, Dispatcher, Refused, Spool, journal, sink_thread, spool
from ood_monitor.alerts.journal import Journal
from ood_monitor.alerts.lines import line_of

OLD_HEAD = '{"ood_monitor_spool": 1}\n'
HEAD = line_of({"ood_monitor_spool": 2, "latest": 0}).decode()


class Other(Recorder):
    """A second sink, by its name."""


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_BACK_OFF", wait_none())


def delivered(folder: Path, *sinks: Any) -> list[int]:
    """What a new start delivers to a recorder, and to the sinks after it."""
    with Dispatcher([recorder := Recorder(), *sinks], spool=folder) as dispatcher:
        assert dispatcher.flush(LONG)
    return recorder.seen


def left_by_a_dead_sink(folder: Path, *numbers: int) -> None:
    with Dispatcher([dead()], tries=1, spool=folder) as dispatcher:
        for number in numbers:
            dispatcher.send(alert(number))


def dead(name: str = "Recorder") -> Broken:
    return Broken(name=name)


def numbered(number: int) -> Alert:
    """With a place in what its monitor says."""
    found = alert(number)
    object.__setattr__(found, "number", number)
    return found


def record(line: str) -> dict[str, Any]:
    """What a line says, without its checksum."""
    found: dict[str, Any] = json.loads(line.partition(" ")[2])
    return found


def numbers(folder: Path) -> list[int]:
    """Of the alerts that are on disk."""
    records = [record(line) for line in file(folder).read_text().splitlines()]
    return [found["alert"]["samples_seen"] for found in records if "alert" in found]


def file(folder: Path) -> Path:
    return folder / "alerts.jsonl"


# Delivery across starts


def test_what_was_not_delivered_is_delivered_on_the_next_start(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2, 3)
    assert delivered(tmp_path) == [1, 2, 3]
    assert delivered(tmp_path) == []


def test_the_same_alert_comes_back(tmp_path: Path) -> None:
    seen: list[Alert] = []

    class Recorder:
        def __call__(self, alert: Alert) -> None:
            seen.append(alert)

    with Dispatcher([dead()], tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(ALERT)
    with Dispatcher([named(Recorder(), "Recorder")], spool=tmp_path) as dispatcher:
        assert dispatcher.flush(LONG)
    assert seen == [ALERT]


def named(sink: Any, name: str) -> Any:
    sink.name = name
    return sink


def test_one_dead_sink_has_nothing_delivered_twice_to_the_others(tmp_path: Path) -> None:
    alive = Other()
    with Dispatcher([alive, dead()], tries=1, spool=tmp_path) as dispatcher:
        for number in range(3):
            dispatcher.send(alert(number))
    assert alive.seen == [0, 1, 2]
    again = Other()
    assert delivered(tmp_path, again) == [0, 1, 2]
    assert again.seen == []


def test_a_new_receiver_gets_nothing_that_another_was_owed(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 1)
    other = Other()
    with Dispatcher([other], spool=tmp_path) as dispatcher:
        dispatcher.send(alert(2))
        assert dispatcher.flush(LONG)
    assert other.seen == [2]
    assert delivered(tmp_path) == [1]


def test_what_was_refused_for_good_is_known_and_not_tried_after_a_restart(tmp_path: Path) -> None:
    def sink(alert: Alert) -> None:
        raise Refused("no such channel")

    with Dispatcher([sink, dead()], tries=1, spool=tmp_path) as dispatcher:
        for number in range(3):
            dispatcher.send(alert(number))
    again = Recorder("sink")
    with Dispatcher([again], spool=tmp_path) as dispatcher:
        assert [left.alert for left in dispatcher.undelivered] == [alert(k) for k in range(3)]
        assert {left.sink for left in dispatcher.undelivered} == {"sink"}
        assert dispatcher.undelivered[0].reason.endswith("Refused: no such channel")
        dispatcher.send(alert(3))
        assert dispatcher.flush(LONG)
    assert again.seen == [3]
    assert delivered(tmp_path) == [0, 1, 2]


def test_of_what_was_refused_the_latest_are_kept(tmp_path: Path) -> None:
    kept = Journal(file(tmp_path), capacity=2)
    for number in range(5):
        kept.add(alert(number), ["Recorder"])
        kept.settle(alert(number).id, "Recorder", "no")
    kept.write()
    kept.close()
    kept = Journal(file(tmp_path), capacity=2)
    assert kept.refused("Recorder") == [(alert(3), "no"), (alert(4), "no")]
    kept.close()


def test_an_alert_is_on_disk_before_send_returns(tmp_path: Path) -> None:
    gate = Gate()
    dispatcher = Dispatcher([gate], spool=tmp_path)
    for number in range(3):
        dispatcher.send(alert(number))
        last = record(file(tmp_path).read_text().splitlines()[-1])
        assert Alert.from_json(json.dumps(last["alert"])) == alert(number)
    gate.opened.set()
    dispatcher.close()


def test_what_every_sink_has_leaves_no_trace(tmp_path: Path) -> None:
    with Dispatcher([Recorder()], spool=tmp_path) as dispatcher:
        for number in range(50):
            dispatcher.send(alert(number))
    assert file(tmp_path).read_text() == HEAD


def test_the_file_does_not_grow_with_what_was_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_WASTE", 20_000)
    kept = Journal(file(tmp_path), capacity=10)
    kept.add(alert(0), ["Recorder"])  # so that the file is never empty
    for number in range(1, 300):
        kept.add(alert(number), ["Recorder", "Other"])
        kept.write()
        kept.settle(alert(number).id, "Other")
        kept.settle(alert(number).id, "Recorder")
        kept.write_settled()
        assert file(tmp_path).stat().st_size < 50_000
    kept.close()
    assert delivered(tmp_path) == [0]


def test_an_alert_sent_twice_is_kept_once(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 7, 7)
    assert delivered(tmp_path) == [7]


def test_a_sink_that_is_not_there_is_owed_still(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by_a_dead_sink(tmp_path, 1)
    with Dispatcher([Other()], spool=tmp_path):
        pass
    assert "owes alerts to Recorder, which is not among the sinks" in caplog.text
    assert delivered(tmp_path) == [1]


def test_a_sink_that_works_again_gets_what_it_refused(tmp_path: Path) -> None:
    refuses = threading.Event()
    refuses.set()
    seen: list[int] = []

    def sink(alert: Alert) -> None:
        if refuses.is_set():
            raise OSError
        seen.append(alert.samples_seen)

    with Dispatcher([sink], tries=2, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 2
        refuses.clear()
        dispatcher.send(alert(3))
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 0
    assert seen == [1, 2, 3]
    assert file(tmp_path).read_text() == HEAD


def test_an_idle_sink_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_AGAIN", 0.01)
    broken = Broken(times=5)
    with Dispatcher([broken], tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
        deadline = time.monotonic() + LONG
        while len(broken.calls) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert broken.calls == [1] * 6
    assert dispatcher.undelivered == ()


# Bounds


def test_a_full_spool_counts_what_it_drops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Dispatcher([dead()], capacity=3, tries=1, spool=tmp_path) as dispatcher:
        for number in range(5):
            dispatcher.send(alert(number))
        assert dispatcher.spool is not None
        assert (dispatcher.spool.dropped, dispatcher.spool.failures) == (2, 0)
    told = [r.getMessage() for r in caplog.records if "found no room" in r.getMessage()]
    assert len(told) == 1
    assert alert(3).id in told[0]
    assert delivered(tmp_path) == [0, 1, 2]


def test_a_dead_sink_takes_no_room_from_another(tmp_path: Path) -> None:
    gate = Gate("Other")
    dispatcher = Dispatcher([dead(), gate], capacity=3, tries=1, spool=tmp_path)
    for number in range(3):
        dispatcher.send(alert(number))
    gate.opened.set()
    assert dispatcher.flush(LONG)
    gate.opened.clear()
    for number in range(3, 6):
        dispatcher.send(alert(number))
    records = [record(line) for line in file(tmp_path).read_text().splitlines()]
    owed = [(found["alert"]["samples_seen"], found["for"]) for found in records if "for" in found]
    assert owed == [(k, ["Recorder", "Other"] if k < 3 else ["Other"]) for k in range(6)]
    gate.opened.set()
    dispatcher.close(LONG)
    assert gate.seen == list(range(6))


def test_what_is_owed_to_sinks_that_are_no_more_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(["A", "B", "C"]):
        with Dispatcher([dead(name)], tries=1, spool=tmp_path) as dispatcher:
            dispatcher.send(alert(number))
    with Dispatcher([recorder := Recorder()], capacity=2, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(3))
        assert dispatcher.flush(LONG)
    assert recorder.seen == [3]
    assert "gave up 1 alerts to sinks that are no more, the oldest" in caplog.text
    assert numbers(tmp_path) == [1, 2]


# Numbers


def latest(folder: Path) -> int:
    with Dispatcher([Recorder()], spool=folder) as dispatcher:
        assert dispatcher.spool is not None
        return dispatcher.spool.latest


@pytest.mark.parametrize("sinks", [[], [Recorder()], [dead()]], ids=["none", "alive", "dead"])
def test_the_latest_number_outlives_restarts(sinks: list[Any], tmp_path: Path) -> None:
    with Dispatcher(sinks, tries=1, spool=tmp_path) as dispatcher:
        assert dispatcher.spool is not None
        assert dispatcher.spool.latest == 0
        for number in (3, 12, 7):
            dispatcher.send(numbered(number))
        assert dispatcher.spool.latest == 12
    assert latest(tmp_path) == latest(tmp_path) == 12


@pytest.mark.parametrize("capacity", [1, 10])
def test_the_latest_number_outlives_a_kill(capacity: int, tmp_path: Path) -> None:
    kept = Journal(file(tmp_path), capacity)
    for number in (3, 12):  # of a capacity of one the second finds no room
        kept.add(numbered(number), ["Recorder"])
        kept.write()
        kept.settle(alert(number).id, "Recorder")
    assert latest(tmp_path) == 12


def test_the_latest_number_outlives_the_line_that_has_it(tmp_path: Path) -> None:
    with Dispatcher([dead()], tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(numbered(12))
    file(tmp_path).write_text(file(tmp_path).read_text().replace("critical", "harmless"))
    assert latest(tmp_path) == 12


# Damage


@pytest.mark.parametrize("cut", [2, 20, 200, 700])
def test_a_torn_last_line_is_left_out_and_told(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2)
    whole = file(tmp_path).read_bytes()
    file(tmp_path).write_bytes(whole[:-cut])
    assert delivered(tmp_path) == [1]
    assert "the last torn by a crash" in caplog.text


def test_a_line_that_lacks_its_end_alone_is_read(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2)
    file(tmp_path).write_bytes(file(tmp_path).read_bytes()[:-1])
    left_by_a_dead_sink(tmp_path, 3)
    assert delivered(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("head", [HEAD, OLD_HEAD])
def test_a_torn_head_is_an_empty_spool(head: str, tmp_path: Path) -> None:
    for size in range(len(head)):
        file(tmp_path).write_text(head[:size])
        assert delivered(tmp_path) == []
        assert file(tmp_path).read_text() == HEAD


def test_a_damaged_line_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2, 3)
    lines = file(tmp_path).read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("critical", "criticaI")
    file(tmp_path).write_text("".join(lines))
    assert delivered(tmp_path) == [1, 3]
    assert (tmp_path / "alerts.damaged").read_text() == lines[2]
    assert "1 lines" in caplog.text


def test_a_line_of_another_alert_is_kept_aside(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 1)
    strange = line_of({"alert": {"format": 99}, "for": ["Recorder"], "latest": 1}).decode()
    file(tmp_path).write_text(file(tmp_path).read_text() + strange)
    assert delivered(tmp_path) == [1]
    assert (tmp_path / "alerts.damaged").read_text() == strange


def test_a_damaged_head_costs_no_alert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2)
    file(tmp_path).write_text("x" + file(tmp_path).read_text())
    assert delivered(tmp_path) == [1, 2]
    assert "1 lines" in caplog.text


def test_no_bit_that_flips_is_silent_or_changes_an_alert(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2, 3)
    whole, sent = file(tmp_path).read_bytes(), [alert(1), alert(2), alert(3)]
    generator = random.Random(0)
    for _ in range(200):
        bit = generator.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file(tmp_path).write_bytes(flipped)
        caplog.clear()
        kept = Journal(file(tmp_path), capacity=10)
        kept.close()
        assert all(found in sent for found in kept.owed("Recorder")), bit
        assert len(kept.owed("Recorder")) >= 1, bit
        assert "could not be read" in caplog.text, bit


@pytest.mark.parametrize("text", ["a file of yours\n", "a file", "\n\n", "[]\n", '{"a": 1}\n'])
def test_what_is_no_log_is_kept_aside(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file(tmp_path).write_text(text)
    assert delivered(tmp_path) == []
    if text.strip():
        assert (tmp_path / "alerts.damaged").read_text().strip() == text.strip()
        assert "could not be read" in caplog.text


def test_lines_that_cannot_be_kept_aside_stay_and_cost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by_a_dead_sink(tmp_path, 1)
    with file(tmp_path).open("a") as log:
        log.write("torn")
    (tmp_path / "alerts.damaged").mkdir()
    left_by_a_dead_sink(tmp_path, 2)
    assert "and stay there" in caplog.text
    assert "torn" in file(tmp_path).read_text()
    (tmp_path / "alerts.damaged").rmdir()
    assert delivered(tmp_path) == [1, 2]
    assert (tmp_path / "alerts.damaged").read_text() == "torn\n"


def test_a_file_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = line_of({"ood_monitor_spool": 3}).decode()
    file(tmp_path).write_text(text)
    with pytest.raises(ValueError, match=r"Expected a spool of format 2 in .* got format 3"):
        Dispatcher([Recorder()], spool=tmp_path)
    assert file(tmp_path).read_text() == text
    file(tmp_path).unlink()
    assert delivered(tmp_path) == []  # and the folder is not locked


def test_alerts_of_the_release_before_are_delivered(tmp_path: Path) -> None:
    old = json.loads(alert(5).to_json()) | {"format": 1}
    for new in ("status", "top_terms", "samples"):
        del old[new]
    lines = [
        {"alert": old, "for": ["Recorder", "Other"]},
        {"alert": old | {"id": "6"}, "for": ["Recorder"]},
        {"done": alert(5).id, "sink": "Other"},
        {"done": "6", "sink": "Recorder"},
    ]
    file(tmp_path).write_text(OLD_HEAD + "".join(json.dumps(line) + "\n" for line in lines))
    other = Other()
    assert delivered(tmp_path, other) == [5]
    assert other.seen == []
    assert not (tmp_path / "alerts.damaged").exists()


# A disk that refuses


def full(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_full_disk_refused_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "_AGAIN", 0.01)
    real = os.write

    def write(fd: int, data: Any) -> int:
        return real(fd, data[:100]) if len(data) > 100 else full()  # a part of it fits

    gate = Gate("Recorder")
    dispatcher = Dispatcher([gate], spool=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures == 2
    assert ended(lambda: numbers(tmp_path) == [1, 2])  # without a further alert
    dispatcher.send(alert(3))
    assert numbers(tmp_path) == [1, 2, 3]
    assert caplog.text.count("No space left on device") == 1
    assert "is written again, and lacks nothing" in caplog.text
    gate.opened.set()
    dispatcher.close(LONG)
    assert gate.seen == [1, 2, 3]
    assert file(tmp_path).read_text() == HEAD


def test_a_full_disk_at_the_start_keeps_no_program_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Journal(file(tmp_path), capacity=10)
    for number in (1, 2):
        kept.add(alert(number), ["Recorder"])
    kept.write()
    kept.settle(alert(1).id, "Recorder")
    kept.write_settled()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        dispatcher = Dispatcher([dead()], tries=1, spool=tmp_path)
    assert "could not be written anew" in caplog.text
    dispatcher.send(alert(3))
    assert numbers(tmp_path) == [1, 2, 3]
    dispatcher.close()
    assert delivered(tmp_path) == [2, 3]


@pytest.mark.parametrize("call", ["fsync", "replace", "write", "open"])
@pytest.mark.parametrize("times", range(1, 7))
def test_a_call_that_fails_at_any_moment_loses_nothing(
    call: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is written anew: before the new one is in place, and when it is already."""
    monkeypatch.setattr(journal, "_WASTE", 0)
    real, calls = getattr(os, call), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        return full() if len(calls) == times else real(*arguments)

    kept = Journal(file(tmp_path), capacity=100)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        for number in range(60):
            kept.add(alert(number), ["Recorder"])
            with suppress(OSError):
                kept.write()
            if number % 10:
                kept.settle(alert(number).id, "Recorder")
            with suppress(OSError):
                kept.write_settled()
        kept.write()
        kept.write_settled()
    assert len(calls) > times
    assert set(numbers(tmp_path)) >= set(range(0, 60, 10))
    assert delivered(tmp_path) == list(range(0, 60, 10))


def test_a_slow_disk_is_waited_for_a_second_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many alerts as an update has: without a bound in all each would wait."""
    monkeypatch.setattr(spool, "_PATIENCE", 0.3)
    real = os.fsync
    with Dispatcher([Recorder()], spool=tmp_path) as dispatcher:
        monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0.12) or real(fd))
        for number in range(8):
            dispatcher.send(alert(number))
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures >= 1
        assert ended(lambda: not dispatcher.spool or not dispatcher.spool._work)


def test_a_disk_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_PATIENCE", 0.05)
    answers = threading.Event()
    real = os.fsync
    recorder = Recorder()
    dispatcher = Dispatcher([recorder], spool=tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: answers.wait(LONG) and real(fd))
    start = time.monotonic()
    for number in range(20):
        dispatcher.send(alert(number))
    assert time.monotonic() - start < LONG / 3
    assert dispatcher.flush(LONG)
    assert recorder.seen == list(range(20))
    assert dispatcher.spool is not None
    assert dispatcher.spool.failures == 20
    answers.set()
    dispatcher.close(LONG)
    assert file(tmp_path).read_text() == HEAD


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Dispatcher([Recorder()], spool=tmp_path / "file" / "spool")


# What others do to the folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_files_are_this_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "spool"
    before = os.umask(0)
    try:
        left_by_a_dead_sink(folder, 1)
        file(folder).write_text("x" + file(folder).read_text())
        assert delivered(folder) == [1]
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        "alerts.jsonl": 0o600,
        "alerts.damaged": 0o600,
        "lock": 0o600,
    }


@pytest.mark.parametrize("name", ["alerts.jsonl", "lock"])
def test_a_link_in_a_files_place_is_refused(name: str, tmp_path: Path) -> None:
    (folder := tmp_path / "spool").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="Expected a regular file, got a symbolic link") as caught:
        Dispatcher([Recorder()], spool=folder)
    assert name in str(caught.value)
    assert (tmp_path / "secret").read_text() == "secret"
    (folder / name).unlink()
    assert delivered(folder) == []


def test_a_link_that_comes_later_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with Dispatcher([dead()], tries=1, spool=tmp_path / "spool") as dispatcher:
        file(tmp_path / "spool").unlink()
        file(tmp_path / "spool").symlink_to(tmp_path / "secret")
        dispatcher.send(alert(1))
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures == 1
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_lock_that_is_removed_is_no_second_owners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Dispatcher([dead()], tries=1, spool=tmp_path) as dispatcher:
        (tmp_path / "lock").unlink()
        with pytest.raises(BlockingIOError, match="got one that another process has"):
            Dispatcher([Recorder()], spool=tmp_path)
        dispatcher.send(alert(1))
        assert "or its lock was removed or replaced; it is taken anew" in caplog.text
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "):
            Dispatcher([Recorder()], spool=tmp_path)
    assert delivered(tmp_path) == [1]


def test_who_finds_another_in_the_folder_writes_nothing(tmp_path: Path) -> None:
    """The folder was removed, and another process has made it again."""
    folder = tmp_path / "spool"
    dispatcher = Dispatcher([dead()], tries=1, spool=folder)
    dispatcher.send(alert(1))
    folder.rename(tmp_path / "old")
    with Dispatcher([dead("Other")], tries=1, spool=folder) as successor:
        dispatcher.send(alert(2))
        successor.send(alert(3))
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures == 1
        assert numbers(folder) == [3]
    dispatcher.send(alert(4))  # the other has gone, and what it owes is not lost
    assert sorted(numbers(folder)) == [1, 2, 3, 4]
    dispatcher.close()
    other = Other()
    assert delivered(folder, other) == [1, 2, 4]
    assert other.seen == [3]


def removed(folder: Path) -> None:
    file(folder).unlink()


def replaced(folder: Path) -> None:
    (folder / "copy").write_bytes(file(folder).read_bytes())
    (folder / "copy").replace(file(folder))


def overwritten_by_another(folder: Path) -> None:
    (folder / "copy").write_text("a file of yours\n")
    (folder / "copy").replace(file(folder))


@pytest.mark.parametrize("change", [removed, replaced, overwritten_by_another, shutil.rmtree])
def test_a_file_that_is_gone_is_written_anew_and_told(
    change: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    with Dispatcher([dead()], tries=1, spool=folder) as dispatcher:
        dispatcher.send(alert(1))
        change(folder)
        dispatcher.send(alert(2))
        assert numbers(folder) == [1, 2]
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures == 0
    assert "alerts.jsonl was removed or replaced; all that is owed is written anew" in caplog.text
    assert delivered(folder) == [1, 2]


def test_where_folders_cannot_be_locked_the_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where an exclusive lock takes a file that is open for writing."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Dispatcher([dead()], tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "):
            Dispatcher([Recorder()], spool=tmp_path)
    assert delivered(tmp_path) == [1]


def test_what_a_kill_left_of_a_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".alerts.jsonl.x.new").write_text("half")
    assert delivered(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"alerts.jsonl", "lock"}


def test_sinks_of_a_spool_have_different_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected sinks of different names, got \['A'\] twice"):
        Spool(tmp_path, ["A", "B", "A"])


# Processes


HOLDER = """
import sys
from ood_monitor.alerts import Dispatcher
dispatcher = Dispatcher([], spool=sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_have_one_folder(tmp_path: Path) -> None:
    holder = started(HOLDER, str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    text = f"Expected a lock that nobody has, got one that process {holder.pid} "
    with pytest.raises(BlockingIOError, match=text):
        Dispatcher([Recorder()], spool=tmp_path)
    holder.kill()
    holder.communicate()
    assert delivered(tmp_path) == []


def test_two_monitors_of_a_process_cannot_have_one_folder(tmp_path: Path) -> None:
    with (
        Dispatcher([Recorder()], spool=tmp_path),
        pytest.raises(BlockingIOError, match=f"process {os.getpid()} "),
    ):
        Dispatcher([Recorder()], spool=tmp_path)
    assert delivered(tmp_path) == []


def test_a_childs_life_does_not_keep_the_folder(tmp_path: Path) -> None:
    """A worker that outlives a killed parent, as data loaders' do for a while."""
    script = """
import os, sys, time
from ood_monitor.alerts import Dispatcher
dispatcher = Dispatcher([], spool=sys.argv[1])
if os.fork() == 0:
    os.close(2)
    print("forked", flush=True)
    os.close(1)
    time.sleep(20)
    os._exit(0)
time.sleep(20)
"""
    parent = started(script, str(tmp_path))
    assert parent.stdout is not None
    assert parent.stdout.readline() == "forked\n"
    parent.kill()
    parent.wait()
    assert delivered(tmp_path) == []
    parent.communicate()


def test_a_forked_child_is_refused_and_leaves_the_folder_alone(tmp_path: Path) -> None:
    script = """
import os, sys
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
first = Alert.from_json(sys.argv[2])
def sink(alert):
    raise OSError
dispatcher = Dispatcher([sink], tries=1, spool=sys.argv[1])
dispatcher.send(first)
child = os.fork()
if child == 0:
    try:
        dispatcher.send(first)
    except RuntimeError as error:
        print(error, flush=True)
    dispatcher.close()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = run(script, str(tmp_path), ALERT.to_json())
    assert process.returncode == 0, process.stderr
    assert f"which has the spool {tmp_path}, got 'drift' of process" in process.stdout
    lines = file(tmp_path).read_text().splitlines()
    assert len(lines) == 2


SENDER = """
import sys
from dataclasses import replace
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
def sink(alert):
    if alert.samples_seen % 3 == 0:
        raise OSError("refused")
    print(f"took {alert.samples_seen}\\n", end="", flush=True)  # whole lines, of two threads
sink.name = "Recorder"
alert = Alert.from_json(sys.argv[2])
dispatcher = Dispatcher([sink], tries=1, spool=sys.argv[1])
for number in range(10_000):
    dispatcher.send(replace(alert, samples_seen=number, id=f"{number:032x}"))
    print(f"sent {number}\\n", end="", flush=True)
"""


def killed_after(folder: Path, seconds: float) -> list[str]:
    process = started(SENDER, str(folder), ALERT.to_json())
    lines: list[str] = []
    assert process.stdout is not None
    lines.append(process.stdout.readline())
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return [*lines, *rest.splitlines(keepends=True)]


@pytest.mark.parametrize("seed", range(3))
def test_no_alert_is_lost_to_a_kill_at_any_moment(tmp_path: Path, seed: int) -> None:
    lines = killed_after(tmp_path, random.Random(seed).uniform(0.0, 0.4))
    words = [line.split() for line in lines if line.endswith("\n")]
    sent = {int(number) for word, number in words if word == "sent"}
    took = {int(number) for word, number in words if word == "took"}
    assert sent
    again = delivered(tmp_path)
    assert len(again) == len(set(again))
    assert sent <= took | set(again)


def test_logs_are_quiet_where_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Dispatcher([Recorder()], spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
    assert caplog.records == []
