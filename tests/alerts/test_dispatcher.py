"""Delivery: in order, apart from each other, without waiting, and nothing lost silently."""

import asyncio
import ctypes
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import alert_cases
from support.alert_cases import ALERT, LONG, Broken, Gate, Recorder, alert, run, summary
from tenacity import wait_fixed, wait_none

from ood_monitor.alerts import Alert, Dispatcher, Refused, Summary, sink_thread
from ood_monitor.alerts.failures import pause_after
from ood_monitor.alerts.sink_thread import SinkThread


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_BACK_OFF", wait_none())


class Screen(Gate):
    """A gate that shows figures, too."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[int] = []

    def summarise(self, summary: Summary) -> None:
        self.shown.append(summary.samples_seen)


def hang(dispatcher: Dispatcher, gate: Gate) -> None:
    """Have the worker inside the gate with alert 0, and the queue empty."""
    dispatcher.send(alert(0))
    assert gate.entered.wait(LONG)


# Delivery


def test_alerts_arrive_in_order_in_a_thread_per_sink() -> None:
    first, second = Recorder(), Recorder("Second")
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
        # What stepped aside goes first, so that the end of an outage finds all in order.
        assert broken.calls == [0] * 3 + [0, 1] * 3 + [0, 2] * 3
    assert [left.alert.samples_seen for left in dispatcher.undelivered] == [0, 1, 2]
    assert {left.sink for left in dispatcher.undelivered} == {"Broken"}
    assert dispatcher.undelivered[0].reason == "OSError: the line is down"
    assert dispatcher.undelivered_count == 3
    assert dispatcher.failures == {"Broken": 15, "Recorder": 0}
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


class Speechless(Exception):
    """It fails to say itself."""

    def __str__(self) -> str:
        raise OSError


ENDS = [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, Speechless]


@pytest.mark.usefixtures("_no_back_off")
@pytest.mark.parametrize("error", ENDS)
def test_whatever_a_sink_raises_is_its_failure_alone(error: type[BaseException]) -> None:
    recorder = Recorder()
    with Dispatcher([Broken(error=error), recorder], tries=2) as dispatcher:
        for index in range(3):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert dispatcher.failures["Broken"] == 2 + 4 + 4
        assert [left.alert for left in dispatcher.undelivered] == [alert(k) for k in range(3)]
        assert dispatcher.undelivered[0].reason.startswith(error.__name__)
    assert recorder.seen == [0, 1, 2]


def end(thread: int) -> None:
    """Raise an exception in a thread, wherever it is: as what stops threads from without does."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))


def test_a_thread_that_is_ended_from_without_is_begun_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    with Dispatcher([recorder]) as dispatcher:
        dispatcher.send(alert(0))
        assert dispatcher.flush(LONG)
        end(*recorder.threads)
        for index in range(1, 100):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert list(dict.fromkeys(recorder.seen)) == list(range(100))
        assert dispatcher.failures == {"Recorder": 1}
    assert "Recorder: its thread was ended by SystemExit; it is begun anew" in caplog.text


@pytest.mark.parametrize("noticed_by", ["send", "flush"])
def test_a_thread_that_is_gone_is_noticed(
    noticed_by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())  # another test's may be called the same
    with Dispatcher([recorder := Recorder()]) as dispatcher:
        with monkeypatch.context() as patch:
            patch.setattr(sink_thread.SinkThread, "_run", lambda self: None)
            dispatcher.send(alert(0))
            while any(
                thread.name == "ood-monitor Recorder"
                for thread in set(threading.enumerate()) - before
            ):
                time.sleep(0.001)
        if noticed_by == "send":
            dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
        assert recorder.seen == list(range(1 + (noticed_by == "send")))
    assert "Recorder: its thread is gone; it is begun anew" in caplog.text


def test_a_thread_that_goes_while_a_flush_waits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Dispatcher([recorder := Recorder()]) as dispatcher:
        with monkeypatch.context() as patch:
            patch.setattr(sink_thread.SinkThread, "_run", lambda self: None)
            dispatcher.send(alert(0))
            gone: Any = dispatcher._threads[0]._thread
            gone.join()
        answers = [False, True]
        monkeypatch.setattr(gone, "is_alive", answers.pop)
        assert dispatcher.flush(LONG)
        assert recorder.seen == [0]


class Asynchronous:
    async def __call__(self, alert: Alert) -> None:
        raise AssertionError

    def plain(self, alert: Alert) -> None:
        raise AssertionError


class HalfAsynchronous(Recorder):
    async def summarise(self, summary: Summary) -> None:  # type: ignore[override]
        raise AssertionError


async def send(alert: Alert, channel: str = "") -> None:
    raise AssertionError


async def events(alert: Alert) -> AsyncIterator[int]:
    yield 1


def parts(alert: Alert) -> Iterator[int]:
    yield 1


ASYNCHRONOUS = {
    "function": send,
    "object": Asynchronous(),
    "method": Asynchronous().__call__,
    "partial": partial(send, channel="x"),
    "partial of partial": partial(partial(send), channel="x"),
    "partial of object": partial(Asynchronous()),
    "asynchronous generator": events,
    "generator": parts,
    "running figures": HalfAsynchronous(),
}


@pytest.mark.parametrize("kind", ASYNCHRONOUS)
def test_an_asynchronous_sink_is_refused_at_once(kind: str) -> None:
    text = r"which is asynchronous: wrap it, as in `def sink\(alert\): asyncio.run"
    with pytest.raises(TypeError, match=text):
        Dispatcher([ASYNCHRONOUS[kind]])
    Dispatcher([Asynchronous().plain]).close()


LAZY: dict[str, Callable[[Alert], Any]] = {
    "coroutine": lambda alert: send(alert),
    "generator": lambda alert: parts(alert),
    "asynchronous generator": lambda alert: events(alert),
}


@pytest.mark.usefixtures("_no_back_off")
@pytest.mark.parametrize("kind", LAZY)
def test_a_sink_that_returns_what_is_still_to_run_has_failed(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Dispatcher([LAZY[kind]], tries=1) as dispatcher:
        dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
        [left] = dispatcher.undelivered
    assert "Expected a sink that has delivered when it returns, got one that" in left.reason
    assert "run it in the sink" in caplog.text


def test_what_a_sink_refuses_for_good_is_set_aside_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    def sink(alert: Alert) -> None:
        calls.append(alert.samples_seen)
        if alert.samples_seen % 2:
            raise Refused("no such channel")

    with Dispatcher([sink]) as dispatcher:
        for index in range(5):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert calls == [0, 1, 2, 3, 4]
        assert dispatcher.refused == {"sink": 2}
        assert [left.alert for left in dispatcher.undelivered] == [alert(1), alert(3)]
        assert dispatcher.undelivered[0].reason == "refused for good: Refused: no such channel"
    told = [record.getMessage() for record in caplog.records]
    assert sum("It is not tried again" in text for text in told) == 1


@pytest.mark.usefixtures("_no_back_off")
def test_what_an_outage_held_up_comes_in_order() -> None:
    works, seen = threading.Event(), list[int]()

    def sink(alert: Alert) -> None:
        if not works.is_set():
            raise OSError
        seen.append(alert.samples_seen)

    with Dispatcher([sink], tries=2) as dispatcher:
        for index in range(4):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 4
        works.set()
        dispatcher.send(alert(4))
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 0
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("_no_back_off")
def test_an_alert_that_always_fails_keeps_none_from_a_sink() -> None:
    seen: list[int] = []

    def sink(alert: Alert) -> None:
        if alert.samples_seen == 1:
            raise OSError
        seen.append(alert.samples_seen)

    with Dispatcher([sink], tries=2) as dispatcher:
        for index in range(4):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert [left.alert for left in dispatcher.undelivered] == [alert(1)]
    assert seen == [0, 2, 3]


@pytest.mark.usefixtures("_no_back_off")
def test_an_idle_sink_gets_all_but_what_always_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_thread, "_AGAIN", 0.01)
    works, seen = threading.Event(), list[int]()

    def sink(alert: Alert) -> None:
        if not works.is_set() or alert.samples_seen == 0:
            raise OSError
        seen.append(alert.samples_seen)

    with Dispatcher([sink], tries=1) as dispatcher:
        for index in range(4):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        works.set()
        deadline = time.monotonic() + LONG
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [left.alert for left in dispatcher.undelivered] == [alert(0)]
    assert sorted(seen) == [1, 2, 3]


class Busy(Exception):
    def __init__(self, retry_after: object) -> None:
        self.retry_after = retry_after


@pytest.mark.usefixtures("_no_back_off")
@pytest.mark.parametrize(
    ("asked", "least"), [(0.2, 0.2), (-1, 0), (float("nan"), 0), ("soon", 0), (None, 0)]
)
def test_a_receiver_that_asks_to_wait_is_left_alone_so_long(asked: object, least: float) -> None:
    at: list[float] = []

    def sink(alert: Alert) -> None:
        at.append(time.monotonic())
        if len(at) == 1:
            raise Busy(asked)

    with Dispatcher([sink]) as dispatcher:
        dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
    assert at[1] - at[0] >= least


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
    screen = Screen()
    with Dispatcher([screen], capacity=3) as dispatcher:
        hang(dispatcher, screen)
        dispatcher.summarise(summary(1))
        dispatcher.send(alert(2))
        dispatcher.summarise(summary(3))
        dispatcher.summarise(summary(4))  # takes the room of summary 1
        assert dispatcher.dropped_summaries == 1
        dispatcher.send(alert(5))  # takes the room of summary 3
        dispatcher.send(alert(6))  # takes the room of summary 4
        dispatcher.summarise(summary(7))
        dispatcher.send(alert(8))  # only alerts are left
        screen.opened.set()
    assert screen.seen == [0, 2, 5, 6]
    assert screen.shown == []
    assert dispatcher.dropped_summaries == 4
    assert [left.alert.samples_seen for left in dispatcher.undelivered] == [8]


def test_of_running_figures_the_latest_are_shown(gate: Gate) -> None:
    screen = Screen()
    with Dispatcher([screen], capacity=2) as dispatcher:
        hang(dispatcher, screen)
        for index in range(1, 6):
            dispatcher.summarise(summary(index))
        screen.opened.set()
    assert screen.shown == [4, 5]


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


# Names


def test_a_sinks_name_is_what_it_says_when_it_is_taken() -> None:
    def pager(alert: Alert) -> None:
        pass

    sinks = [Recorder("Lobby"), pager, partial(pager), partial(pager), lambda alert: None]
    with Dispatcher(sinks) as dispatcher:
        sinks[0].name = "Attic"  # type: ignore[attr-defined]
        *said, unsaid = dispatcher.failures
    assert said == ["Lobby", "pager", "partial", "partial 2"]
    assert unsaid.endswith("<lambda>")


@pytest.mark.parametrize("has_spool", [False, True])
def test_two_sinks_of_one_name_are_refused(has_spool: bool, tmp_path: Path) -> None:
    spool = tmp_path if has_spool else None
    with pytest.raises(ValueError, match="Expected sinks of different names, got two of 'A'"):
        Dispatcher([Recorder("A"), Recorder("A")], spool=spool)


@pytest.mark.parametrize("sink", [partial(print), lambda alert: None, [].append])
def test_with_a_spool_a_sink_must_have_a_name(sink: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a sink with a name, by which the spool owes"):
        Dispatcher([sink], spool=tmp_path)


@pytest.mark.parametrize("name", [3, b"x", "", " "])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    sink = Recorder()
    sink.name = name
    with pytest.raises((TypeError, ValueError), match="Expected a sink's name as text"):
        Dispatcher([sink])


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_sink_that_forks_leaves_its_work_to_the_parent(tmp_path: Path) -> None:
    script = """
import os, sys
from dataclasses import replace
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
first = Alert.from_json(sys.argv[2])
parent = os.getpid()
def sink(alert):
    with open(sys.argv[1], "a") as file:
        print(os.getpid() == parent, alert.samples_seen, file=file, flush=True)
    if alert.samples_seen == 0 and (child := os.fork()):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
dispatcher = Dispatcher([sink], spool=sys.argv[3])
for number in range(3):
    dispatcher.send(replace(first, samples_seen=number, id=str(number)))
dispatcher.close(20)
assert dispatcher.undelivered_count == 0
"""
    path = tmp_path / "seen"
    ended = run(script, str(path), ALERT.to_json(), str(tmp_path / "spool"))
    assert ended.returncode == 0, ended.stderr
    assert path.read_text().splitlines() == ["True 0", "True 1", "True 2"]


class Exiting(Exception):
    """What a foreign exception may be."""

    @property
    def retry_after(self) -> float:
        raise SystemExit


class Asking(Exception):
    def __init__(self, retry_after: object) -> None:
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (ValueError(), 0),
        (Asking(2.5), 2.5),
        (Asking(10**400), 3600),
        (Asking(math.inf), 3600),
        (Asking(-7), 0),
        (Asking(math.nan), 0),
        (Asking("7"), 0),
        (Exiting(), 0),
    ],
    ids=repr,
)
def test_whatever_an_error_asks_for_is_a_pause(error: Exception, seconds: float) -> None:
    assert pause_after(error) == seconds


def test_a_thread_that_is_ended_again_and_again_makes_no_loop_without_a_pause() -> None:
    ended = []

    def settled(*_: object) -> None:
        ended.append(time.monotonic())
        raise RuntimeError("no room for a word")

    thread = SinkThread(Recorder(), "sink", capacity=8, tries=1, settled=settled)
    thread.put(alert(1))
    assert not thread.wait(thread.mark(), 1.5)
    thread.begin_to_close()
    thread.finish(0.5)
    assert 2 <= len(ended) <= 12
    time.sleep(0.3)
    count = len(ended)
    time.sleep(0.3)
    assert len(ended) == count  # nor does it go on after the end
