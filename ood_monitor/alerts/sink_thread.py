"""One sink with a queue and a thread of its own: what it does to it is nobody else's."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    wait_exponential,
)

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.failures import (
    Refused,
    Undelivered,
    check_answer,
    described,
    pause_after,
)
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.alerts.sink import MeterSink, Sink, SummarySink

__all__ = ["Figures", "SinkThread"]

#: What is shown once or not at all.
Figures: TypeAlias = Summary | Reading

#: Seconds between tries. Without jitter: tenacity's draws from the watched program's random state.
_BACK_OFF = wait_exponential(multiplier=0.1, exp_base=4, max=30)  # 0.1, 0.4, 1.6, ...

#: Tries of an alert while the thread is closing, and seconds between them at most.
_LAST_TRIES, _LAST_PAUSE = 3, 0.1

#: Seconds before a thread that was ended begins anew.
_ENDED_PAUSE = 1.0

#: Seconds after which a wait looks again whether there is a thread to wait for.
_LOOK_AGAIN = 1.0

#: Seconds between tries of what a sink has refused, while nothing new comes.
_AGAIN = 60.0

_log = logging.getLogger(__name__)


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> object: ...


class SinkThread:
    """Hands what is put in to one sink, in order, from a thread of its own.

    Whatever a call raises is a failure of the sink, and ends neither the thread nor the program. An
    alert that fails ``tries`` times steps aside for those after it. From then on the oldest of
    these is tried before any other, so that what an outage held up comes in order; once the sink
    takes an alert, all of them are tried, and every minute while nothing new comes. What the sink
    refuses for good is not tried again.

    Args:
        sink: Called by one thread only.
        name: Of the sink.
        capacity: Alerts and figures that may wait.
        tries: Of an alert, before it steps aside.
        settled: Called with each alert that the sink took, or refused for good, and then why.

    Attributes:
        failures: Calls that raised.
        refused: Alerts that the sink has refused for good.
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
        settled: Callable[[Alert, str, str | None], None],
    ) -> None:
        self.name, self.failures, self.refused = name, 0, 0
        self.dropped, self.lost_count = 0, 0
        self.lost: deque[Undelivered] = deque(maxlen=capacity)
        self._sink, self._capacity, self._settled = sink, capacity, settled
        self._tries, self._pid = tries, os.getpid()
        # Its lock is re-entrant: a signal handler may send while a send is under way.
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Alert | Figures]] = deque()
        self._current: tuple[int, Alert | Figures] | None = None
        self._aside: dict[str, Undelivered] = {}
        self._turn, self._not_before = 0, 0.0
        self._accepted, self._error, self._abandoned = 0, "", False
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._retrying = Retrying(
            stop=self._has_tried_enough,
            wait=_BACK_OFF,
            sleep=self._pause,
            retry=retry_if_result(lambda settled: not settled),
            retry_error_callback=_gave_up,
        )

    @property
    def undelivered(self) -> list[Undelivered]:
        """What the sink did not get: given up, refused, or tried again."""
        with self._changed:
            return [*self.lost, *self._aside.values()]

    @property
    def undelivered_count(self) -> int:
        """How many these are, those no longer remembered included."""
        with self._changed:
            return self.lost_count + len(self._aside)

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
                self.lose(item, refusal)
            elif refusal:
                self.dropped += 1
            return refusal

    def lose(self, alert: Alert, reason: str) -> None:
        """Keep an alert in ``lost``."""
        with self._changed:
            self.lost_count += 1
            self.lost.append(Undelivered(alert, self.name, reason))

    def mark(self) -> int:
        """What was queued so far, for :meth:`wait`."""
        with self._changed:
            return self._accepted

    def wait(self, mark: int, timeout: float) -> bool:
        """Wait until all before a mark was dealt with; whether it was, in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._is_past(mark):
                self._start()  # also in the place of one that is gone while this waits
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait_for(lambda: self._is_past(mark), min(left, _LOOK_AGAIN))
            return True

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
        full = len(self._queue) + len(self._aside) >= self._capacity
        if full and not self._give_up_figures():
            return "the queue was full"
        return None

    def _give_up_figures(self) -> bool:
        """Drop the oldest summary or reading, if there is any."""
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
        """Have a thread, the first or one in the place of one that died."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self._thread is not None and not self._closing.is_set():
            self._take_back("its thread is gone")
        thread = threading.Thread(target=self._run, name=f"ood-monitor {self.name}", daemon=True)
        thread.start()
        self._thread = thread

    def _is_past(self, mark: int) -> bool:
        oldest = self._current or (self._queue[0] if self._queue else None)
        return oldest is None or oldest[0] > mark

    def _abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            left = [self._current] if self._current else []
            for _, item in [*left, *self._queue]:
                if isinstance(item, Alert):
                    self.lose(item, "it was not delivered by the deadline for closing")
            self._queue.clear()

    def _run(self) -> None:
        while True:
            try:
                self._work()
                break
            except BaseException as error:  # an exception set from another thread, no memory, ...
                if self._is_left():
                    return
                self._take_back(f"its thread was ended by {type(error).__name__}")
                if self._abandoned:
                    return
                self._pause(_ENDED_PAUSE)  # whatever ends it may do so again
        if not self._is_left():
            self._close_sink()

    def _work(self) -> None:
        while not self._is_left() and self._next():
            item = self._current and self._current[1]
            if item is None:
                self._try_aside()
            elif isinstance(item, Alert):
                self._deliver(item)
            else:
                self._show(item)

    def _is_left(self) -> bool:
        """Whether this runs in a child that the sink has forked: the work is the parent's."""
        return self._pid != os.getpid()

    def _take_back(self, why: str) -> None:
        """Queue again what was under way, and tell."""
        with self._changed:
            if self._current is not None:
                self._queue.appendleft(self._current)
            self._current = None
            self.failures += 1
        _log.warning("The sink %s: %s; it is begun anew. [OOD407]", self.name, why)

    def _next(self) -> bool:
        """Whether to go on: with ``_current``, or if that is None, with what stepped aside."""
        with self._changed:
            self._current = None
            self._changed.notify_all()
            patience = _AGAIN if self._aside else None
            self._changed.wait_for(lambda: self._queue or self._closing.is_set(), patience)
            self._current = self._queue.popleft() if self._queue else None
            return self._current is not None or not self._closing.is_set()

    def _deliver(self, alert: Alert) -> None:
        if self._retrying(self._try_in_order, alert):
            self._try_all_aside()
            return
        with self._changed:
            if not self._abandoned:
                self._aside[alert.id] = Undelivered(alert, self.name, self._error)

    def _try_in_order(self, alert: Alert) -> bool:
        """A try of the oldest that stepped aside, and of an alert; whether this is settled."""
        oldest = next(iter(self._aside.values()), None)
        if oldest is not None and self._settles_aside(oldest.alert):
            self._try_all_aside()
        return self._settles(alert)

    def _has_tried_enough(self, state: RetryCallState) -> bool:
        enough = min(self._tries, _LAST_TRIES) if self._closing.is_set() else self._tries
        return state.attempt_number >= enough

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            time.sleep(min(max(seconds, 0.0), _LAST_PAUSE))
        else:
            self._closing.wait(seconds)

    def _try_aside(self) -> None:
        """The oldest, then in turn another: the oldest may itself be to blame."""
        alerts = [left.alert for left in self._aside.values()]
        self._turn += 1
        others = alerts[1:]
        for alert in [alerts[0], *others[self._turn % max(1, len(others)) :][:1]]:
            if self._settles_aside(alert):
                self._try_all_aside()
                return

    def _try_all_aside(self) -> None:
        """In order, while the sink works: two failures on end are its own."""
        failed = 0
        for alert in [left.alert for left in self._aside.values()]:
            if self._closing.is_set() or failed == 2:
                return
            failed = 0 if self._settles_aside(alert) else failed + 1

    def _settles_aside(self, alert: Alert) -> bool:
        is_settled = self._settles(alert)
        if is_settled:
            with self._changed:
                self._aside.pop(alert.id, None)
        return is_settled

    def _settles(self, alert: Alert) -> bool:
        """Whether a try is the last: the sink took the alert, or refuses it for good."""
        self._pause(self._not_before - time.monotonic())
        error = self._error_of(lambda: self._sink(alert))
        if error is None:
            self._settled(alert, self.name, None)
        elif isinstance(error, Refused):
            self._set_aside(alert)
        else:
            self._not_before = time.monotonic() + pause_after(error)
            return False
        return True

    def _set_aside(self, alert: Alert) -> None:
        """An alert that is refused for good."""
        why = f"refused for good: {self._error}"
        with self._changed:
            self.refused += 1
            if not self._abandoned:
                self.lose(alert, why)
        if self.refused == 1:
            text = (
                "The sink %s refused alert %s: %s. It is not tried again; more are counted. "
                "[OOD408]"
            )
            _log.warning(text, self.name, alert.id, self._error)
        self._settled(alert, self.name, why)

    def _show(self, figures: Figures) -> None:
        sink = self._sink
        if isinstance(figures, Summary) and isinstance(sink, SummarySink):
            self._error_of(lambda: sink.summarise(figures))
        elif isinstance(figures, Reading) and isinstance(sink, MeterSink):
            self._error_of(lambda: sink.measure(figures))

    def _close_sink(self) -> None:
        if isinstance(self._sink, _Closeable):
            self._error_of(self._sink.close)

    def _error_of(self, call: Callable[[], object]) -> BaseException | None:
        """What a call raises: of every kind, since one that cancels or exits must end nothing."""
        try:
            check_answer(call())
            error = None
        except BaseException as raised:  # see above
            error = raised
        if self._is_left():
            raise SystemExit  # what the sink has forked is not to go on with the parent's work
        if error is not None:
            self._count(error)
        return error

    def _count(self, error: BaseException) -> None:
        self.failures += 1
        self._error = described(error)
        if self.failures == 1:
            text = "The sink %s failed; its further failures are counted, not logged. [OOD407]"
            _log.warning(text, self.name, exc_info=error)


def _gave_up(state: RetryCallState) -> bool:
    return False
