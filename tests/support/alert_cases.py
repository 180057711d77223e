"""Alerts, and sinks that record, hang or break, for the tests of what is between them."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ood_monitor
from ood_monitor.alerts import (
    Alert,
    AlertEvidence,
    FlaggedSample,
    LayerShare,
    Summary,
    TermShare,
    TracePoint,
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
    top_terms=(TermShare("t=500", 0.7), TermShare("t=50", 0.3)),
    samples=(FlaggedSample(1201, 0.004, "a.png"), FlaggedSample(1230, 0.002, None)),
    trace=(TracePoint(1200, 0.7), TracePoint(1234, 0.003)),
    number=17,
    detector="d5",
    model="m7",
)


def alert(samples_seen: int) -> Alert:
    return replace(ALERT, samples_seen=samples_seen, number=0, id=f"{samples_seen:032x}")


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

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).__name__
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

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).__name__
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.seen: list[int] = []

    def __call__(self, alert: Alert) -> None:
        self.entered.set()
        assert self.opened.wait(LONG)
        self.seen.append(alert.samples_seen)


class Broken:
    """Fails the given number of times per alert, for ever by default."""

    def __init__(
        self,
        times: float = float("inf"),
        error: type[BaseException] = OSError,
        name: str | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        self.times, self.error = times, error
        self.calls: list[int] = []

    def __call__(self, alert: Alert) -> None:
        self.calls.append(alert.samples_seen)
        if self.calls.count(alert.samples_seen) <= self.times:
            raise self.error("the line is down")


def ended(is_so: Callable[[], bool]) -> bool:
    """Whether something is so, in the end."""
    deadline = time.monotonic() + LONG
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so()


#: The modules without the package, whose torch takes seconds to import: a process starts at once.
PRELUDE = f"""
import sys, types
package = types.ModuleType("ood_monitor")
package.__path__ = {[str(Path(ood_monitor.__file__).parent)]!r}
sys.modules["ood_monitor"] = package
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A process to talk to, and to kill."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
