"""Delivery: in order, apart from each other, without waiting, and nothing lost silently."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import alert_cases
from support.alert_cases import ALERT, LONG, Broken, Gate, Recorder, alert, run, summary
from tenacity import wait_fixed, wait_none

from ood_monitor.alerts import Alert, Dispatcher, Summary, sink_thread


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_BACK_OFF", wait_none())


def hang(dispatcher: Dispatcher, gate: Gate) -> None:
    """Have the worker inside the gate with alert 0, and the queue empty."""
    dispatcher.send(alert(0))
    assert gate.entered.wait(LONG)


# Delivery


def test_alerts_arrive_in_order_in_a_thread_per_sink() -> None:
    first, second = Recorder(), Recorder()
    with Dispatcher([first, second]) as dispatcher:
        for index in range(500):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert first.seen == second.seen == list(range(500))
    assert len(first.threads) == len(second.threads) == 1
    assert len(first.threads | second.threads | {threading.get_ident()}) == 3
    assert (first.closed, second.closed) == (1, 1)
    assert dispatcher.undelivered == ()


def test_threads_may_send_together() -> None:
    recorder = Recorder()

    def work(start: int) -> None:
        for index in range(start, start + 100):
            dispatcher.send(alert(index))

    with Dispatcher([recorder]) as dispatcher:
        threads = [threading.Thread(target=work, args=(100 * k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(recorder.seen) == list(range(400))
    for k in range(4):
        mine = [index for index in recorder.seen if index // 100 == k]
        assert mine == sorted(mine), k


def test_summaries_reach_the_sinks_that_show_them() -> None:
    recorder, plain = Recorder(), []
    with Dispatcher([lambda alert: plain.append(alert.samples_seen), recorder]) as dispatcher:
        dispatcher.summarise(summary(1))
        dispatcher.send(alert(2))
        dispatcher.summarise(summary(3))
    assert recorder.summaries == [1, 3]
    assert recorder.seen == plain == [2]
    assert set(dispatcher.failures.values()) == {0}


@pytest.mark.usefixtures("_no_back_off")
def test_a_failing_sink_is_isolated(caplog: pytest.LogCaptureFixture) -> None:
    broken, recorder = Broken(), Recorder()
    with Dispatcher([broken, recorder], tries=3) as dispatcher:
        for index in range(3):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert recorder.seen == [0, 1, 2]
        assert broken.calls == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [left.alert.samples_seen for left in dispatcher.undelivered] == [0, 1, 2]
    assert {left.sink for left in dispatcher.undelivered} == {"Broken"}
    assert dispatcher.undelivered[0].reason == "OSError: the line is down"
    assert dispatcher.undelivered_count == 3
    assert dispatcher.failures == {"Broken": 9, "Recorder": 0}
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1
    assert "Broken" in tracebacks[0].getMessage()
    assert "Alerts not delivered: 3" in caplog.records[-1].getMessage()


@pytest.mark.usefixtures("_no_back_off")
@pytest.mark.parametrize("times", [1, 2])
def test_a_sink_that_recovers_gets_its_alert(times: int) -> None:
    broken, recorder = Broken(times), Recorder()
    with Dispatcher([broken, recorder], tries=3) as dispatcher:
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
    assert broken.calls == [1] * (times + 1) + [2] * (times + 1)
    assert recorder.seen == [1, 2]
    assert dispatcher.undelivered == ()
    assert dispatcher.failures["Broken"] == 2 * times


def test_back_off_waits_and_the_others_do_not() -> None:
    at: list[float] = []
    seen: list[float] = []

    def broken(alert: Alert) -> None:
        at.append(time.monotonic())
        raise OSError

    sinks = [broken, lambda alert: seen.append(time.monotonic())]
    with Dispatcher(sinks, tries=3) as dispatcher:
        dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
    assert at[1] - at[0] >= 0.1
    assert at[2] - at[1] >= 0.4
    assert seen[0] - at[0] < at[1] - at[0]


def test_closing_ends_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_BACK_OFF", wait_fixed(LONG))
    failed = threading.Event()

    def broken(alert: Alert) -> None:
        failed.set()
        raise OSError

    dispatcher = Dispatcher([broken])
    dispatcher.send(alert(1))
    assert failed.wait(LONG)
    start = time.monotonic()
    dispatcher.close(LONG)
    assert time.monotonic() - start < LONG / 2
    assert dispatcher.undelivered[0].sink.endswith("broken")


@pytest.mark.usefixtures("_no_back_off")
def test_a_sink_that_exits_does_not_end_the_thread() -> None:
    recorder = Recorder()
    with Dispatcher([Broken(error=SystemExit), recorder], tries=3) as dispatcher:
        dispatcher.send(alert(1))
        dispatcher.send(alert(2))
    assert recorder.seen == [1, 2]
    assert dispatcher.undelivered_count == 2


def test_a_failing_summary_is_not_tried_again() -> None:
    calls = []

    class Sink(Recorder):
        def summarise(self, summary: Summary) -> None:
            calls.append(summary.samples_seen)
            raise OSError

    with Dispatcher([Sink()]) as dispatcher:
        dispatcher.summarise(summary(1))
        dispatcher.summarise(summary(2))
    assert calls == [1, 2]
    assert list(dispatcher.failures.values()) == [2]
    assert dispatcher.undelivered == ()


# Nothing blocks, nothing is lost


def test_send_does_not_block_while_a_sink_hangs(gate: Gate) -> None:
    with Dispatcher([gate], capacity=10) as dispatcher:
        hang(dispatcher, gate)
        start = time.monotonic()
        for index in range(1, 1001):
            dispatcher.send(alert(index))
            dispatcher.summarise(summary(index))
        assert time.monotonic() - start < LONG / 10
        gate.opened.set()
        assert dispatcher.flush(LONG)
    assert gate.seen == list(range(11))


def test_a_full_queue_keeps_and_counts_what_does_not_fit(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with Dispatcher([gate], capacity=3) as dispatcher:
        hang(dispatcher, gate)
        for index in range(1, 9):
            dispatcher.send(alert(index))
        refused = [record.getMessage() for record in caplog.records]
        gate.opened.set()
    assert gate.seen == [0, 1, 2, 3]
    # Five did not fit; the latest three are kept.
    assert dispatcher.undelivered_count == 5
    assert [left.alert for left in dispatcher.undelivered] == [alert(6), alert(7), alert(8)]
    assert {(left.sink, left.reason) for left in dispatcher.undelivered} == {
        ("Gate", "the queue was full")
    }
    assert len(refused) == 1
    assert alert(4).id in refused[0]


def test_summaries_give_way_to_alerts(gate: Gate) -> None:
    class Screen(Gate):
        def summarise(self, summary: Summary) -> None:
            summaries.append(summary.samples_seen)

    summaries: list[int] = []
    screen = Screen()
    with Dispatcher([screen], capacity=3) as dispatcher:
        hang(dispatcher, screen)
        dispatcher.summarise(summary(1))
        dispatcher.send(alert(2))
        dispatcher.summarise(summary(3))
        dispatcher.summarise(summary(4))  # no room, and it takes none from the others
        assert dispatcher.dropped_summaries == 1
        dispatcher.send(alert(5))  # takes the room of summary 1
        dispatcher.send(alert(6))  # takes the room of summary 3
        dispatcher.send(alert(7))  # only alerts are left
        screen.opened.set()
    assert screen.seen == [0, 2, 5, 6]
    assert summaries == []
    assert dispatcher.dropped_summaries == 3
    assert [left.alert.samples_seen for left in dispatcher.undelivered] == [7]


def test_flush_keeps_its_deadline(gate: Gate) -> None:
    with Dispatcher([gate]) as dispatcher:
        assert dispatcher.flush(0.0)
        hang(dispatcher, gate)
        start = time.monotonic()
        assert not dispatcher.flush(0.05)
        assert 0.05 <= time.monotonic() - start < LONG / 2
        gate.opened.set()
        assert dispatcher.flush(LONG)


def test_flush_does_not_wait_for_what_comes_later() -> None:
    """A sink that always sends one more: the queue is never empty."""
    seen: list[int] = []
    endless = threading.Event()

    def sink(alert: Alert) -> None:
        seen.append(alert.samples_seen)
        if not endless.is_set():
            dispatcher.send(alert_cases.alert(alert.samples_seen + 1))

    dispatcher = Dispatcher([sink])
    dispatcher.send(alert(0))
    assert dispatcher.flush(LONG)
    endless.set()
    dispatcher.close(LONG)
    assert seen == list(range(len(seen)))
    assert dispatcher.undelivered_count <= 1  # the one that was sent while closing


def test_close_keeps_its_deadline(gate: Gate) -> None:
    dispatcher = Dispatcher([gate])
    hang(dispatcher, gate)
    dispatcher.send(alert(1))
    dispatcher.summarise(summary(2))
    start = time.monotonic()
    dispatcher.close(0.05)
    assert 0.05 <= time.monotonic() - start < LONG / 2
    assert [left.alert for left in dispatcher.undelivered] == [alert(0), alert(1)]
    assert "deadline" in dispatcher.undelivered[0].reason


def test_close_delivers_what_is_queued(gate: Gate) -> None:
    dispatcher = Dispatcher([gate])
    hang(dispatcher, gate)
    for index in range(1, 50):
        dispatcher.send(alert(index))
    threading.Timer(0.05, gate.opened.set).start()
    dispatcher.close(LONG)
    assert gate.seen == list(range(50))


def test_after_close_alerts_are_kept() -> None:
    recorder = Recorder()
    dispatcher = Dispatcher([recorder])
    dispatcher.close()
    dispatcher.close()
    dispatcher.send(alert(1))
    dispatcher.summarise(summary(2))
    assert recorder.seen == []
    assert recorder.closed == 1
    assert [left.alert for left in dispatcher.undelivered] == [alert(1)]
    assert dispatcher.dropped_summaries == 1


def test_a_sink_may_close_the_dispatcher() -> None:
    closed = threading.Event()

    def sink(alert: Alert) -> None:
        dispatcher.close()
        closed.set()

    dispatcher = Dispatcher([sink])
    dispatcher.send(alert(1))
    assert closed.wait(LONG)
    assert set(dispatcher.failures.values()) == {0}
    assert dispatcher.undelivered == ()


def test_a_close_that_fails_is_isolated() -> None:
    class Sink(Recorder):
        def close(self) -> None:
            raise OSError

    recorder = Recorder()
    with Dispatcher([Sink(), recorder]) as dispatcher:
        dispatcher.send(alert(1))
    assert recorder.closed == 1
    assert sum(dispatcher.failures.values()) == 1


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="capacity of at least 1, got 0"):
        Dispatcher([], capacity=0)
    with pytest.raises(ValueError, match="tries of at least 1, got 0"):
        Dispatcher([], tries=0)
    with pytest.raises(TypeError, match="Expected a sink that can be called"):
        Dispatcher(["not a sink"])


# Processes


def test_the_end_of_the_interpreter_delivers(tmp_path: Path) -> None:
    script = """
import sys, time
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
def sink(alert):
    time.sleep(0.05)
    with open(sys.argv[1], "a") as file:
        print(alert.to_json(), file=file)
dispatcher = Dispatcher([sink])
for _ in range(3):
    dispatcher.send(Alert.from_json(sys.argv[2]))
"""
    path = tmp_path / "alerts.jsonl"
    ended = run(script, str(path), ALERT.to_json())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [Alert.from_json(line) for line in path.read_text().splitlines()] == [ALERT] * 3


def test_a_hanging_sink_does_not_keep_the_interpreter() -> None:
    script = """
import sys, threading
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
dispatcher = Dispatcher([lambda alert: threading.Event().wait()])
dispatcher.send(Alert.from_json(sys.argv[1]))
dispatcher.close(0.05)
"""
    ended = run(script, ALERT.to_json())
    assert ended.returncode == 0
    assert "Alerts not delivered: 1" in ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_forked_child_delivers_its_own(tmp_path: Path) -> None:
    script = """
import os, sys, threading
from dataclasses import replace
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
first = Alert.from_json(sys.argv[2])
inside, go = threading.Event(), threading.Event()
def sink(alert):
    inside.set()
    go.wait()
    with open(sys.argv[1], "a") as file:
        print(os.getpid() == parent, alert.samples_seen, file=file, flush=True)
parent = os.getpid()
dispatcher = Dispatcher([sink])
dispatcher.send(first)
inside.wait()
dispatcher.send(replace(first, samples_seen=2))
child = os.fork()
go.set()
if child == 0:
    dispatcher.send(replace(first, samples_seen=3))
    os._exit(0 if dispatcher.flush(20) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    path = tmp_path / "seen"
    ended = run(script, str(path), ALERT.to_json())
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.read_text().splitlines()) == ["False 3", "True 1234", "True 2"]
