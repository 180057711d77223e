import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from ood_monitor import alerts
from ood_monitor.alerts import (
    Alert,
    AlertEvidence,
    Dispatcher,
    LayerShare,
    LoggingSink,
    Summary,
    SummarySink,
)

LONG = 30.0  # seconds: only a broken dispatcher waits for so long
EVIDENCE = AlertEvidence(
    log_e_value=9.5,
    ert=10_000.0,
    fpr=0.01,
    flagged=20,
    window=30,
    flagged_rate=2 / 3,
    flagged_rate_low=0.47,
    flagged_rate_high=0.83,
    score_mean=3.25,
    score_p95=9.75,
)
ALERT = Alert(
    kind="drift",
    severity="critical",
    stream="production",
    samples_seen=1234,
    message="Two of three samples are unlike the training data.",
    evidence=EVIDENCE,
    top_layers=(LayerShare("up.0.weight", 0.62, 8.1), LayerShare("up.0.bias", 0.2, -3.0)),
    detector="d5",
    model="m7",
)


def alert(samples_seen: int) -> Alert:
    return replace(ALERT, samples_seen=samples_seen, id=f"{samples_seen:032x}")


def summary(samples_seen: int) -> Summary:
    return Summary(
        stream="production",
        samples_seen=samples_seen,
        status="OK",
        score_mean=0.5,
        score_p95=1.5,
        flagged_rate=0.01,
        log_e_value=-0.25,
    )


class Recorder:
    """Takes alerts and summaries, in order."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.summaries: list[int] = []
        self.threads: set[int] = set()
        self.closed = 0

    def __call__(self, alert: Alert) -> None:
        self.seen.append(alert.samples_seen)
        self.threads.add(threading.get_ident())

    def summarise(self, summary: Summary) -> None:
        self.summaries.append(summary.samples_seen)

    def close(self) -> None:
        self.closed += 1


class Gate:
    """Hangs in every call until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.seen: list[int] = []

    def __call__(self, alert: Alert) -> None:
        self.entered.set()
        assert self.opened.wait(LONG)
        self.seen.append(alert.samples_seen)


class Broken:
    """Fails the given number of times per alert, for ever by default."""

    def __init__(self, times: float = float("inf"), error: type[BaseException] = OSError) -> None:
        self.times, self.error = times, error
        self.calls: list[int] = []

    def __call__(self, alert: Alert) -> None:
        self.calls.append(alert.samples_seen)
        if self.calls.count(alert.samples_seen) <= self.times:
            raise self.error("the line is down")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_BACK_OFF", (0.0, 0.0))


def hang(dispatcher: Dispatcher, gate: Gate) -> None:
    """Have the worker inside the gate with alert 0, and the queue empty."""
    dispatcher.send(alert(0))
    assert gate.entered.wait(LONG)


# The records


def test_json_round_trip_is_equal() -> None:
    again = Alert.from_json(ALERT.to_json())
    assert again == ALERT
    assert again.to_json() == ALERT.to_json()
    assert Alert.from_json(ALERT.to_json(indent=2)) == ALERT


def test_json_is_plain() -> None:
    record = json.loads(ALERT.to_json())
    assert record["kind"] == "drift"
    assert record["evidence"]["flagged_rate"] == 2 / 3
    assert record["evidence"]["p_value"] is None
    assert record["top_layers"][0] == {"layer": "up.0.weight", "share": 0.62, "z": 8.1}
    assert datetime.fromisoformat(record["time"]) == ALERT.time
    assert "\n" not in ALERT.to_json()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(value: float) -> None:
    layer = LayerShare("w", share=value, z=value)
    odd = replace(
        ALERT, evidence=replace(EVIDENCE, log_e_value=value, ert=value), top_layers=(layer,)
    )
    record = json.loads(odd.to_json(), parse_constant=pytest.fail)
    assert record["evidence"]["log_e_value"] is None
    assert record["evidence"]["ert"] is None
    assert record["top_layers"] == [{"layer": "w", "share": None, "z": None}]
    assert Alert.from_json(odd.to_json()) == odd


def test_numbers_of_numpy_become_plain() -> None:
    evidence = replace(EVIDENCE, score_mean=np.float32(0.5), flagged=np.int64(7))
    odd = replace(ALERT, samples_seen=np.int64(8), evidence=evidence)
    assert Alert.from_json(odd.to_json()) == odd
    assert (type(odd.samples_seen), type(odd.evidence.flagged)) == (int, int)
    assert type(odd.evidence.score_mean) is float


def test_summary_is_plain() -> None:
    odd = replace(summary(np.int64(3)), score_mean=np.float32("nan"), score_p95=np.float32(0.5))
    assert (odd.samples_seen, odd.score_mean, odd.score_p95) == (3, None, 0.5)
    assert type(odd.samples_seen) is int
    with pytest.raises(ValueError, match="Expected status to be one of OK, WARN, ALERT, got 'BAD'"):
        replace(odd, status="BAD")


def test_time_is_utc_and_aware() -> None:
    east = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5)))
    moved = replace(ALERT, time=east)
    assert moved.time == east
    assert moved.time.tzinfo is UTC
    assert Alert.from_json(moved.to_json()).time == east
    with pytest.raises(ValueError, match="time zone"):
        replace(ALERT, time=datetime(2026, 1, 2))


def test_each_alert_has_an_id_and_a_time() -> None:
    given = {name: value for name, value in vars(ALERT).items() if name not in {"id", "time"}}
    before = datetime.now(UTC)
    first, second = Alert(**given), Alert(**given)
    assert first.id != second.id
    assert len(bytes.fromhex(first.id)) == 16
    assert before <= first.time <= second.time <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "panic"}, "Expected kind to be one of sample"), ({"severity": "bad"}, "severity")],
)
def test_unknown_words_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ALERT, **change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        ALERT.to_json().replace('"format": 1', '"format": 99'),
        ALERT.to_json().replace('"samples_seen": 1234', '"samples_seen": 1.5'),
        ALERT.to_json().replace('"samples_seen": 1234', '"samples_seen": Infinity'),
        ALERT.to_json().replace('"kind"', '"sort"'),
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected the JSON of an alert, got"):
        Alert.from_json(text)


def test_summary_sink_is_recognised() -> None:
    assert isinstance(Recorder(), SummarySink)
    assert not isinstance(LoggingSink(), SummarySink)


# The log


@pytest.mark.parametrize(
    ("kind", "severity", "level"),
    [
        ("drift", "critical", logging.ERROR),
        ("sample", "warning", logging.WARNING),
        ("stale_calibration", "info", logging.INFO),
        ("recovered", "critical", logging.INFO),
    ],
)
def test_logging_sink_writes_one_line(
    kind: str, severity: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("somewhere.else")
    with caplog.at_level(logging.INFO, logger.name):
        LoggingSink(logger)(replace(ALERT, kind=kind, severity=severity, message="Two\n lines %s."))
    (record,) = caplog.records
    assert (record.levelno, record.name) == (level, logger.name)
    text = record.getMessage()
    assert "\n" not in text
    for part in (kind, "Two lines %s.", "production", "sample 1234", "20 of 30", "up.0.weight"):
        assert part in text, part


# Delivery


def test_alerts_arrive_in_order_in_one_other_thread() -> None:
    first, second = Recorder(), Recorder()
    with Dispatcher([first, second]) as dispatcher:
        for index in range(500):
            dispatcher.send(alert(index))
        assert dispatcher.flush(LONG)
        assert first.seen == second.seen == list(range(500))
    assert first.threads == second.threads
    assert len(first.threads) == 1
    assert threading.get_ident() not in first.threads
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
    with Dispatcher([broken, recorder]) as dispatcher:
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
    with Dispatcher([broken, recorder]) as dispatcher:
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

    with Dispatcher([broken, lambda alert: seen.append(time.monotonic())]) as dispatcher:
        dispatcher.send(alert(1))
        assert dispatcher.flush(LONG)
    assert at[1] - at[0] >= 0.1
    assert at[2] - at[1] >= 0.4
    assert seen[0] - at[0] < at[1] - at[0]


def test_closing_ends_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_BACK_OFF", (LONG, LONG))
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
    with Dispatcher([Broken(error=SystemExit), recorder]) as dispatcher:
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
        ("all sinks", "the queue was full")
    }
    assert len(refused) == 1
    assert alert(4).id in refused[0]


def test_summaries_give_way_to_alerts(gate: Gate) -> None:
    recorder = Recorder()
    with Dispatcher([gate, recorder], capacity=3) as dispatcher:
        hang(dispatcher, gate)
        dispatcher.summarise(summary(1))
        dispatcher.send(alert(2))
        dispatcher.summarise(summary(3))
        dispatcher.summarise(summary(4))  # no room, and it takes none from the others
        assert dispatcher.dropped_summaries == 1
        dispatcher.send(alert(5))  # takes the room of summary 1
        dispatcher.send(alert(6))  # takes the room of summary 3
        dispatcher.send(alert(7))  # only alerts are left
        gate.opened.set()
    assert recorder.seen == [0, 2, 5, 6]
    assert recorder.summaries == []
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
    seen = []
    endless = threading.Event()

    def sink(alert: Alert) -> None:
        seen.append(alert.samples_seen)
        if not endless.is_set():
            dispatcher.send(replace(alert, samples_seen=alert.samples_seen + 1))

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
    with pytest.raises(TypeError, match="Expected a sink that can be called"):
        Dispatcher(["not a sink"])


# Processes


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        # The module alone, not its package: it needs the standard library only, and starts at once.
        env=os.environ | {"PYTHONPATH": str(Path(alerts.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_end_of_the_interpreter_delivers(tmp_path: Path) -> None:
    script = """
import pathlib, sys, time
from alerts import Alert, Dispatcher
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
from alerts import Alert, Dispatcher
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
from alerts import Alert, Dispatcher
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
