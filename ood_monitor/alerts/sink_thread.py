"""One sink with a queue and a thread of its own: what it does to it is nobody else's."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    wait_exponential,
)

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.alerts.sink import MeterSink, Sink, SummarySink

__all__ = ["Figures", "SinkThread", "Undelivered"]

#: What is shown once or not at all.
Figures: TypeAlias = Summary | Reading

#: Seconds between tries. Without jitter: tenacity's draws from the watched program's random state.
_BACK_OFF = wait_exponential(multiplier=0.1, exp_base=4, max=30)  # 0.1, 0.4, 1.6, ...

#: Tries of an alert while the thread is closing, and seconds between them at most.
_LAST_TRIES, _LAST_PAUSE = 3, 0.1

#: Seconds between tries of what a sink has refused, while nothing new comes.
_AGAIN = 60.0

_log = logging.getLogger(__name__)


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


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> object: ...


class SinkThread:
    """Hands what is put in to one sink, in order, from a thread of its own.

    An alert that the sink refuses ``tries`` times steps aside for those after it. It is tried again
    when the sink takes another, and every minute while there is none.

    Args:
        sink: Called by one thread only.
        name: Of the sink.
        capacity: What may wait, and refused alerts that are tried again.
        tries: Of an alert, before it steps aside.
        delivered: Called with each alert that the sink took.

    Attributes:
        failures: Calls that raised.
        dropped: Summaries and readings that were given up for lack of room.
        lost: Alerts that are not tried any more.
        lost_count: How many there were; ``lost`` has the latest.
    """

    def __init__(
        self,
        sink: Sink,
        name: str,
        *,
        capacity: int,
        tries: int,
        delivered: Callable[[Alert, str], None],
    ) -> None:
        self.name, self.failures, self.dropped, self.lost_count = name, 0, 0, 0
        self.lost: deque[Undelivered] = deque(maxlen=capacity)
        self._sink, self._capacity, self._delivered = sink, capacity, delivered
        self._tries = tries
        # Its lock is re-entrant: a signal handler may send while a send is under way.
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Alert | Figures]] = deque()
        self._current: tuple[int, Alert | Figures] | None = None
        self._refused: dict[str, Undelivered] = {}
        self._accepted, self._error, self._abandoned = 0, "", False
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._retrying = Retrying(
            stop=self._has_tried_enough,
            wait=_BACK_OFF,
            sleep=self._pause,
            retry=retry_if_result(lambda taken: not taken),
            retry_error_callback=_gave_up,
        )

    @property
    def undelivered(self) -> list[Undelivered]:
        """What the sink did not get: given up, or refused and tried again."""
        with self._changed:
            return [*self.lost, *self._refused.values()]

    @property
    def undelivered_count(self) -> int:
        """How many these are, those no longer remembered included."""
        with self._changed:
            return self.lost_count + len(self._refused)

    @property
    def is_used(self) -> bool:
        """Whether anything was put in."""
        return self._thread is not None

    def shows(self, figures: Figures | type[Figures]) -> bool:
        """Whether the sink takes such figures."""
        kind = figures if isinstance(figures, type) else type(figures)
        return isinstance(self._sink, SummarySink if kind is Summary else MeterSink)

    def put(self, item: Alert | Figures) -> str | None:
        """Queue an item; why not, if it was not. Alerts that were not are kept in ``lost``."""
        with self._changed:
            refusal = self._refusal(item) or self._enqueue(item)
            if refusal and isinstance(item, Alert):
                self._lose(item, refusal)
            elif refusal:
                self.dropped += 1
            return refusal

    def mark(self) -> int:
        """What was queued so far, for :meth:`wait`."""
        with self._changed:
            return self._accepted

    def wait(self, mark: int, timeout: float) -> bool:
        """Wait until all before a mark was dealt with; whether it was, in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_past(mark), max(0.0, timeout))

    def begin_to_close(self) -> None:
        """Take nothing more, and hurry with what is left."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    def finish(self, timeout: float) -> None:
        """Wait for the end; what is left when the time is up is given up."""
        if self._thread is None:
            self._close_sink()
        elif self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout))
            self._abandon()

    def _refusal(self, item: Alert | Figures) -> str | None:
        if self._closing.is_set():
            return "it was sent after the dispatcher was closed"
        full = len(self._queue) >= self._capacity
        if full and not (isinstance(item, Alert) and self._give_up_figures()):
            return "the queue was full"
        return None

    def _give_up_figures(self) -> bool:
        for index, (_, item) in enumerate(self._queue):
            if not isinstance(item, Alert):
                del self._queue[index]
                self.dropped += 1
                return True
        return False

    def _enqueue(self, item: Alert | Figures) -> str | None:
        try:
            self._start()
        except RuntimeError as error:  # no thread can start while the interpreter shuts down
            return f"no thread could start: {error}"
        self._accepted += 1
        self._queue.append((self._accepted, item))
        self._changed.notify_all()
        return None

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(
                target=self._run, name=f"ood-monitor {self.name}", daemon=True
            )
            thread.start()
            self._thread = thread

    def _is_past(self, mark: int) -> bool:
        oldest = self._current or (self._queue[0] if self._queue else None)
        return oldest is None or oldest[0] > mark

    def _lose(self, alert: Alert, reason: str) -> None:
        self.lost_count += 1
        self.lost.append(Undelivered(alert, self.name, reason))

    def _abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            left = [self._current] if self._current else []
            for _, item in [*left, *self._queue]:
                if isinstance(item, Alert):
                    self._lose(item, "it was not delivered by the deadline for closing")
            self._queue.clear()

    def _run(self) -> None:
        while self._next():
            item = self._current and self._current[1]
            if item is None:
                self._try_refused()
            elif isinstance(item, Alert):
                self._deliver(item)
            else:
                self._show(item)
        self._close_sink()

    def _next(self) -> bool:
        """Whether to go on: with ``_current``, or if that is None, with what was refused."""
        with self._changed:
            self._current = None
            self._changed.notify_all()
            patience = _AGAIN if self._refused else None
            self._changed.wait_for(lambda: self._queue or self._closing.is_set(), patience)
            self._current = self._queue.popleft() if self._queue else None
            return self._current is not None or not self._closing.is_set()

    def _deliver(self, alert: Alert) -> None:
        if self._retrying(self._takes, alert):
            self._try_refused()
            return
        with self._changed:
            if self._abandoned:
                return
            self._refused[alert.id] = Undelivered(alert, self.name, self._error)
            if len(self._refused) > self._capacity:
                oldest = self._refused.pop(next(iter(self._refused)))
                self._lose(oldest.alert, oldest.reason)

    def _has_tried_enough(self, state: RetryCallState) -> bool:
        enough = min(self._tries, _LAST_TRIES) if self._closing.is_set() else self._tries
        return state.attempt_number >= enough

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            time.sleep(min(seconds, _LAST_PAUSE))
        else:
            self._closing.wait(seconds)

    def _try_refused(self) -> None:
        for alert in [refused.alert for refused in self._refused.values()]:
            if self._closing.is_set():
                return
            taken = self._takes(alert)
            with self._changed:
                refused = self._refused.pop(alert.id)
                if not taken:  # behind the others: it may be the alert that is to blame
                    self._refused[alert.id] = refused
                    return

    def _takes(self, alert: Alert) -> bool:
        taken = self._attempt(lambda: self._sink(alert))
        if taken:
            self._delivered(alert, self.name)
        return taken

    def _show(self, figures: Figures) -> None:
        sink = self._sink
        if isinstance(figures, Summary) and isinstance(sink, SummarySink):
            self._attempt(lambda: sink.summarise(figures))
        elif isinstance(figures, Reading) and isinstance(sink, MeterSink):
            self._attempt(lambda: sink.measure(figures))

    def _close_sink(self) -> None:
        if isinstance(self._sink, _Closeable):
            self._attempt(self._sink.close)

    def _attempt(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # a sink that exits must not end the thread
            self.failures += 1
            self._error = f"{type(error).__name__}: {error}"
            if self.failures == 1:
                text = "The sink %s failed; its further failures are counted, not logged."
                _log.warning(text, self.name, exc_info=True)
            return False
        return True


def _gave_up(state: RetryCallState) -> bool:
    return False
