"""What a monitor tells people: an `Alert`, the sinks that take it, and the thread between them.

An alert holds figures and names, never data: no sample, and nothing that a sample can be rebuilt
from. Delivery keeps three promises to the code that is being monitored: `Dispatcher.send` returns
at once, it never raises, and an alert that could not be delivered is kept and counted, so nothing
is lost silently.
"""

import atexit
import json
import logging
import math
import operator
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable
from uuid import uuid4

AlertKind = Literal["sample", "drift", "recovered", "invalid_input", "stale_calibration"]
Severity = Literal["info", "warning", "critical"]
Status = Literal["OK", "WARN", "ALERT"]

_FORMAT = 1
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}
_BACK_OFF = (0.1, 0.4)  # seconds before the second and the third try
_ALL_SINKS = "all sinks"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerShare:
    """How much one layer speaks for an alert.

    Attributes:
        layer: The parameter's name, as in the model.
        share: The part of the score that is this layer's, between 0 and 1.
        z: This layer's log squared gradient norm, in standard deviations from its in-distribution
            mean.
    """

    layer: str
    share: float | None
    z: float | None

    def __post_init__(self) -> None:
        _make_plain(self, "share", "z")


@dataclass(frozen=True, kw_only=True)
class AlertEvidence:
    """The figures behind an alert. A figure that is not defined, or not finite, is None.

    Attributes:
        log_e_value: Natural logarithm of the drift test's e-value.
        ert: Promised mean number of samples between false drift alarms.
        fpr: Promised share of in-distribution samples that are flagged, between 0 and 1.
        flagged: Samples flagged among the last `window`.
        window: Samples that the figures cover: those since the drift test last began, at most
            the latest thousand.
        flagged_rate: `flagged / window`.
        flagged_rate_low: Lower end of the exact binomial interval of `flagged_rate`.
        flagged_rate_high: Its upper end.
        score_mean: Mean anomaly score over the window (higher = more anomalous).
        score_p95: 95th percentile of the anomaly score over the window.
        p_value: Conformal p-value of the sample that triggered; None for drift.
    """

    log_e_value: float | None
    ert: float | None
    fpr: float | None
    flagged: int
    window: int
    flagged_rate: float | None
    flagged_rate_low: float | None
    flagged_rate_high: float | None
    score_mean: float | None
    score_p95: float | None
    p_value: float | None = None

    def __post_init__(self) -> None:
        counts = {"flagged", "window"}
        _make_plain(self, *(f.name for f in fields(self) if f.name not in counts))
        _make_whole(self, *counts)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something a person should know about a stream.

    Attributes:
        kind: What happened.
        severity: How much it matters.
        stream: The stream's name.
        samples_seen: Samples of that stream so far, the triggering one included.
        message: One sentence for people.
        evidence: The figures.
        top_layers: The layers that say the most, the strongest first.
        detector: Fingerprint of the detector.
        model: Fingerprint of the model.
        time: When it happened; any time zone, kept as UTC.
        id: 32 hexadecimal digits, the same through every delivery.

    Raises:
        ValueError: If `kind` or `severity` is unknown, or `time` has no time zone.
    """

    kind: AlertKind
    severity: Severity
    stream: str
    samples_seen: int
    message: str
    evidence: AlertEvidence
    top_layers: tuple[LayerShare, ...] = ()
    detector: str
    model: str
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        _check_word("kind", self.kind, get_args(AlertKind))
        _check_word("severity", self.severity, get_args(Severity))
        if self.time.utcoffset() is None:
            raise ValueError(f"Expected a time with a time zone, got {self.time!r}.")
        object.__setattr__(self, "time", self.time.astimezone(UTC))
        object.__setattr__(self, "top_layers", tuple(self.top_layers))
        _make_whole(self, "samples_seen")

    def to_json(self, *, indent: int | None = None) -> str:
        """The alert as one JSON object; `from_json` gives an equal alert back."""
        record = {"format": _FORMAT, **asdict(self), "time": self.time.isoformat()}
        return json.dumps(record, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The alert that `to_json` wrote.

        Raises:
            ValueError: If `text` is not such an alert.
        """
        try:
            return cls(**_parsed(json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"Expected the JSON of an alert, got {text[:60]!r} ({cause})."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The running figures of a stream, for a sink to show between alerts.

    A figure that is not defined, or not finite, is None.

    Attributes:
        stream: The stream's name.
        samples_seen: Samples of that stream so far.
        status: OK, WARN or ALERT.
        score_mean: Running mean of the anomaly score (higher = more anomalous).
        score_p95: Running 95th percentile of the anomaly score.
        flagged_rate: Running share of flagged samples, between 0 and 1.
        log_e_value: Natural logarithm of the drift test's e-value.
        invalid: Samples that could not be scored so far, by cause.
    """

    stream: str
    samples_seen: int
    status: Status
    score_mean: float | None
    score_p95: float | None
    flagged_rate: float | None
    log_e_value: float | None
    invalid: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_word("status", self.status, get_args(Status))
        _make_plain(self, "score_mean", "score_p95", "flagged_rate", "log_e_value")
        _make_whole(self, "samples_seen")


class Sink(Protocol):
    """Takes an alert where people look.

    It may block and it may raise. If it has a `close()`, that is called once, after the last alert.
    """

    def __call__(self, alert: Alert, /) -> None:
        """Deliver `alert`, or raise to have it tried again: a repeated `id` must do no harm."""


@runtime_checkable
class SummarySink(Sink, Protocol):
    """A sink that shows the running figures too."""

    def summarise(self, summary: Summary, /) -> None:
        """Show `summary`. It is not tried again."""


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> object: ...


class LoggingSink:
    """Writes one line per alert to the standard log: a warning or an error, a recovery as info.

    Args:
        logger: Where to write; the logger `ood_monitor.alerts` by default.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or _log

    def __call__(self, alert: Alert, /) -> None:
        """Log `alert`."""
        level = logging.INFO if alert.kind == "recovered" else _LEVELS[alert.severity]
        self._logger.log(level, "%s", " ".join(_line(alert).split()))


@dataclass(frozen=True)
class Undelivered:
    """An alert that a sink did not get.

    Attributes:
        alert: The alert.
        sink: The sink's name, or "all sinks".
        reason: Why.
    """

    alert: Alert
    sink: str
    reason: str


class Dispatcher:
    """Hands alerts to sinks from a thread of its own, in the order they were sent.

    One sink's failure is nobody else's. A sink that fails is tried three times, within about half a
    second; its first failure is logged with the traceback, the others are counted. A full queue
    gives up summaries before alerts. The dispatcher closes itself when the interpreter exits. A
    forked child starts with an empty queue: the parent delivers what was sent before the fork.

    Args:
        sinks: Called in this order.
        capacity: Alerts and summaries that may wait, and undelivered alerts that are kept.

    Attributes:
        undelivered_count: Deliveries that failed for good, alerts that did not fit included.
        dropped_summaries: Summaries that were given up for lack of room.

    Raises:
        ValueError: If `capacity` is not positive.
        TypeError: If a sink cannot be called.
    """

    def __init__(self, sinks: Iterable[Sink], *, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"Expected a capacity of at least 1, got {capacity}.")
        self._outlets = [_Outlet(sink) for sink in sinks]
        self._capacity = capacity
        self._closed = False
        self._begin()
        atexit.register(self.close)

    def _begin(self) -> None:
        self._pid = os.getpid()
        # Its lock is re-entrant: a signal handler may send while a send is under way.
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Alert | Summary]] = deque()
        self._current: tuple[int, Alert | Summary] | None = None
        self._accepted = 0
        self._worker: threading.Thread | None = None
        self._refused = False
        self._abandoned = False
        self._undelivered: deque[Undelivered] = deque(maxlen=self._capacity)
        self.undelivered_count = 0
        self.dropped_summaries = 0

    @property
    def undelivered(self) -> tuple[Undelivered, ...]:
        """What was not delivered, the oldest first; the latest `capacity` of them."""
        with self._changed:
            return tuple(self._undelivered)

    @property
    def failures(self) -> dict[str, int]:
        """Calls that raised, by the sink's name, tries that were repeated included."""
        counts: Counter[str] = Counter()
        for outlet in self._outlets:
            counts[outlet.name] += outlet.failures
        return dict(counts)

    def send(self, alert: Alert) -> None:
        """Queue `alert` for every sink. Returns at once and does not raise."""
        self._leave_parent()
        with self._changed:
            refusal = self._refusal() or self._enqueue(alert)
            if refusal:
                self._keep(Undelivered(alert, _ALL_SINKS, refusal))
        if refusal and not self._refused:
            self._refused = True  # one line, however many alerts follow
            _log.warning("Alert %s will not be delivered: %s.", alert.id, refusal)

    def summarise(self, summary: Summary) -> None:
        """Queue `summary`, if there is room. Returns at once and does not raise."""
        self._leave_parent()
        with self._changed:
            full = len(self._queue) >= self._capacity
            if full or self._closed or self._enqueue(summary):
                self.dropped_summaries += 1

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was queued before this call is dealt with.

        Args:
            timeout: The longest wait, in seconds.

        Returns:
            Whether it was, in time.
        """
        self._leave_parent()
        with self._changed:
            last = self._accepted
            return self._changed.wait_for(lambda: self._dealt_with(last), timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what is queued, close the sinks and stop. A second call does nothing.

        Args:
            timeout: The longest wait, in seconds; what is left then counts as undelivered.
        """
        self._leave_parent()
        with self._changed:
            again, self._closed = self._closed, True
            self._changed.notify_all()
        if again:
            return
        atexit.unregister(self.close)
        self._join(timeout)
        if self.undelivered_count:
            text = "Alerts not delivered: %d. Dispatcher.undelivered has the latest of them."
            _log.warning(text, self.undelivered_count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _leave_parent(self) -> None:
        if self._pid != os.getpid():
            self._begin()

    def _refusal(self) -> str | None:
        if self._closed:
            return "it was sent after the dispatcher was closed"
        if len(self._queue) >= self._capacity and not self._give_up_summary():
            return "the queue was full"
        return None

    def _give_up_summary(self) -> bool:
        for index, (_, item) in enumerate(self._queue):
            if isinstance(item, Summary):
                del self._queue[index]
                self.dropped_summaries += 1
                return True
        return False

    def _enqueue(self, item: Alert | Summary) -> str | None:
        try:
            self._start()
        except RuntimeError as error:  # no thread can start while the interpreter shuts down
            return f"no thread could start: {error}"
        self._accepted += 1
        self._queue.append((self._accepted, item))
        self._changed.notify_all()
        return None

    def _start(self) -> None:
        if self._worker is None:
            worker = threading.Thread(target=self._run, name="ood-monitor-alerts", daemon=True)
            worker.start()
            self._worker = worker

    def _dealt_with(self, last: int) -> bool:
        oldest = self._current or (self._queue[0] if self._queue else None)
        return oldest is None or oldest[0] > last

    def _keep(self, undelivered: Undelivered) -> None:
        self.undelivered_count += 1
        self._undelivered.append(undelivered)

    def _join(self, timeout: float) -> None:
        if self._worker is None:
            for outlet in self._outlets:
                outlet.close()
        elif self._worker is not threading.current_thread():
            self._worker.join(timeout)
            self._abandon()

    def _abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            left = [self._current] if self._current else []
            for _, item in [*left, *self._queue]:
                if isinstance(item, Alert):
                    reason = "it was not delivered by the deadline for closing"
                    self._keep(Undelivered(item, _ALL_SINKS, reason))
            self._queue.clear()

    def _run(self) -> None:
        while item := self._next():
            if isinstance(item, Alert):
                self._deliver(item)
            else:
                for outlet in self._outlets:
                    outlet.show(item)
        for outlet in self._outlets:
            outlet.close()

    def _next(self) -> Alert | Summary | None:
        with self._changed:
            self._current = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._current = self._queue.popleft() if self._queue else None
            return self._current[1] if self._current else None

    def _deliver(self, alert: Alert) -> None:
        left = [outlet for outlet in self._outlets if not outlet.deliver(alert)]
        for delay in _BACK_OFF:
            if left:
                self._pause(delay)
            left = [outlet for outlet in left if not outlet.deliver(alert)]
        with self._changed:
            for outlet in [] if self._abandoned else left:
                self._keep(Undelivered(alert, outlet.name, outlet.error))

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)


class _Outlet:
    """A sink whose failures stay inside; only one thread calls it."""

    def __init__(self, sink: Sink) -> None:
        if not callable(sink):
            raise TypeError(f"Expected a sink that can be called with an alert, got {sink!r}.")
        self._sink = sink
        self.name: str = getattr(sink, "__qualname__", type(sink).__qualname__)
        self.failures = 0
        self.error = ""

    def deliver(self, alert: Alert) -> bool:
        return self._attempt(lambda: self._sink(alert))

    def show(self, summary: Summary) -> None:
        if isinstance(self._sink, SummarySink):
            sink = self._sink
            self._attempt(lambda: sink.summarise(summary))

    def close(self) -> None:
        if isinstance(self._sink, _Closeable):
            self._attempt(self._sink.close)

    def _attempt(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # a sink that exits must not end the thread
            self.failures += 1
            self.error = f"{type(error).__name__}: {error}"
            if self.failures == 1:
                text = "The sink %s failed; its further failures are counted, not logged."
                _log.warning(text, self.name, exc_info=True)
            return False
        return True


def _make_plain(record: object, *names: str) -> None:
    """Make numbers of any library Python's own, and None of what JSON cannot carry."""
    for name in names:
        value = getattr(record, name)
        number = None if value is None else float(value)
        finite = number is not None and math.isfinite(number)
        object.__setattr__(record, name, number if finite else None)


def _make_whole(record: object, *names: str) -> None:
    for name in names:
        object.__setattr__(record, name, operator.index(getattr(record, name)))


def _check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"Expected {name} to be one of {', '.join(words)}, got {word!r}.")


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    version = record.pop("format")
    if version != _FORMAT:
        raise ValueError(f"its format is {version!r}, and this release reads {_FORMAT}")
    return record | {
        "time": datetime.fromisoformat(record["time"]),
        "evidence": AlertEvidence(**record["evidence"]),
        "top_layers": tuple(LayerShare(**layer) for layer in record["top_layers"]),
    }


def _line(alert: Alert) -> str:
    evidence = alert.evidence
    parts = [f"{evidence.flagged} of {evidence.window} samples flagged"]
    if evidence.log_e_value is not None:
        parts.append(f"log e-value {evidence.log_e_value:.1f}")
    if evidence.p_value is not None:
        parts.append(f"p-value {evidence.p_value:.2g}")
    if alert.top_layers:
        parts.append(f"top layer {alert.top_layers[0].layer}")
    where = f"stream {alert.stream}, sample {alert.samples_seen}"
    return f"{alert.kind} ({where}): {alert.message} [{'; '.join(parts)}] id {alert.id}"
