"""The spool: what a crash leaves is owed, and nothing that happens to the folder is silent."""

import errno
import json
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.alert_cases import ALERT, LONG, Broken, Gate, Recorder, alert, run, started
from tenacity import wait_none

from ood_monitor.alerts import Alert, Dispatcher, journal, sink_thread, spool
from ood_monitor.alerts.journal import Journal

HEAD = '{"ood_monitor_spool": 1}\n'


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


def dead() -> Broken:
    broken = Broken()
    broken.name = "Recorder"  # type: ignore[attr-defined]
    return broken


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


def test_sinks_of_one_class_are_told_apart(tmp_path: Path) -> None:
    first = Recorder()
    with Dispatcher([first, named(Broken(), "Recorder")], tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
        assert set(dispatcher.failures) == {"Recorder", "Recorder 2"}
    first, second = Recorder(), Recorder()
    with Dispatcher([first, second], spool=tmp_path) as dispatcher:
        assert dispatcher.flush(LONG)
    assert (first.seen, second.seen) == ([], [1])


def test_an_alert_is_on_disk_before_send_returns(tmp_path: Path) -> None:
    gate = Gate()
    dispatcher = Dispatcher([gate], spool=tmp_path)
    for number in range(3):
        dispatcher.send(alert(number))
        last = json.loads(file(tmp_path).read_text().splitlines()[-1])
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
        kept.done(alert(number).id, "Other")
        kept.done(alert(number).id, "Recorder")
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
    assert seen == [3, 1, 2]
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


def test_what_is_owed_to_a_sink_that_is_no_more_gives_way(tmp_path: Path) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2)
    gone = named(Broken(), "Other")
    with Dispatcher([gone], capacity=2, tries=1, spool=tmp_path) as dispatcher:
        dispatcher.send(alert(3))
        assert dispatcher.spool is not None
        assert dispatcher.spool.dropped == 2
    other = Other()
    assert delivered(tmp_path, other) == []
    assert other.seen == [3]


# Damage


@pytest.mark.parametrize("cut", [1, 20, 200, 700])
def test_a_torn_last_line_is_left_out_and_told(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2)
    whole = file(tmp_path).read_bytes()
    file(tmp_path).write_bytes(whole[:-cut])
    assert delivered(tmp_path) == [1]
    assert "was torn by a crash" in caplog.text


@pytest.mark.parametrize("size", range(len(HEAD)))
def test_a_torn_head_is_an_empty_spool(size: int, tmp_path: Path) -> None:
    file(tmp_path).write_text(HEAD[:size])
    assert delivered(tmp_path) == []


def test_a_damaged_line_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_by_a_dead_sink(tmp_path, 1, 2, 3)
    lines = file(tmp_path).read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"alert"', '"alarm"')
    file(tmp_path).write_text("".join(lines))
    assert delivered(tmp_path) == [1, 3]
    assert (tmp_path / "alerts.damaged").read_text() == lines[2]
    assert "1 lines" in caplog.text


@pytest.mark.parametrize(
    "text", ["a file of yours\n", "a file", '{"ood_monitor_spool": 2}\n', "\n\n", "[]\n"]
)
def test_another_file_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    file(tmp_path).write_text(text)
    with pytest.raises(ValueError, match="Expected a spool of format 1 in"):
        Dispatcher([Recorder()], spool=tmp_path)
    assert file(tmp_path).read_text() == text
    file(tmp_path).unlink()
    assert delivered(tmp_path) == []  # and the folder is not locked


def test_alerts_of_the_release_before_are_delivered(tmp_path: Path) -> None:
    record = json.loads(alert(5).to_json()) | {"format": 1}
    for new in ("status", "top_terms", "samples"):
        del record[new]
    file(tmp_path).write_text(HEAD + json.dumps({"alert": record, "for": ["Recorder"]}) + "\n")
    assert delivered(tmp_path) == [5]


# A disk that refuses


def test_a_full_disk_is_counted_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, is_full = os.write, True

    def write(fd: int, data: Any) -> int:
        if is_full and data[:4] != b'{"oo':
            if len(data) > 100:
                return real(fd, data[:100])  # a part of it fits
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    gate = Gate()
    with monkeypatch.context() as patch:
        dispatcher = Dispatcher([named(gate, "Recorder")], spool=tmp_path)
        patch.setattr(os, "write", write)
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
        is_full = False
        dispatcher.send(alert(3))
        assert dispatcher.spool is not None
        assert dispatcher.spool.failures == 2
    # What was torn is gone, and the next line is whole.
    _, line = file(tmp_path).read_text().splitlines()
    assert json.loads(line)["alert"]["id"] == alert(3).id
    assert caplog.text.count("No space left on device") == 1
    gate.opened.set()
    dispatcher.close(LONG)
    assert gate.seen == [1, 2, 3]  # they reach the sinks all the same
    assert file(tmp_path).read_text() == HEAD


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


# Processes


HOLDER = """
import sys
from ood_monitor.alerts import Dispatcher
dispatcher = Dispatcher([lambda alert: None], spool=sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_have_one_folder(tmp_path: Path) -> None:
    holder = started(HOLDER, str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    text = f"Expected a spool folder of this monitor's own, got one that process {holder.pid} "
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
dispatcher = Dispatcher([lambda alert: None], spool=sys.argv[1])
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
    ended = run(script, str(tmp_path), ALERT.to_json())
    assert ended.returncode == 0, ended.stderr
    assert f"which has the spool {tmp_path}, got 'drift' of process" in ended.stdout
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
