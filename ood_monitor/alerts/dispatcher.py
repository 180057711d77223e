"""Between a monitor and its sinks: never waited for, never raising, losing nothing silently."""

import atexit
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing import util
from os import PathLike
from typing import Self

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.failures import Undelivered
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.alerts.named import named
from ood_monitor.alerts.sink import Sink
from ood_monitor.alerts.sink_thread import Figures, SinkThread
from ood_monitor.alerts.spool import Spool
from ood_monitor.checks import number, whole
from ood_monitor.processes import after_fork_in_child_of

__all__ = ["Dispatcher", "Undelivered"]

_ALL_SINKS = "all sinks"

#: Before `multiprocessing` closes its queues at the end of a worker, which a sink may write to.
_FIRST = 100
_CLOSED = "it was sent after the dispatcher was closed"

_log = logging.getLogger(__name__)


class Dispatcher:
    """Hands alerts to sinks, to each from a thread of its own, in the order they were sent.

    One sink's failure, or its silence, is nobody else's, whatever it raises: also what cancels or
    exits. An alert that fails is tried again, within about a minute and a half by default, then
    steps aside for those after it until the sink works again; one for which a sink raises
    :class:`Refused` is not tried again. A sink's first failure is logged with the traceback, the
    others are counted. A full queue gives up figures before alerts, the oldest first. The
    dispatcher closes itself when the
    interpreter or a worker of `multiprocessing` exits, unless it is killed, by a signal or by
    `os._exit`. A forked child starts with empty queues: the parent delivers what was sent before
    the fork. Sinks that the child has not used stay the parent's to close.

    With a ``spool``, an alert is on disk before :meth:`send` returns, until every sink has it, and
    what a crash leaves is delivered on the next start: to each sink at least once, with the same
    id. :meth:`send` then takes as long as the disk takes to synchronise, milliseconds as a rule and
    at most a second. A spool is one process's: a forked child cannot send with it.

    Args:
        sinks: Each has delivered when its call returns. A sink is known by its ``name``, as it is
            now, or a function's own name; without a spool also by its class's. The spool owes by
            this name: it is one of the receiver, not of whatever stands in its place.
        capacity: Per sink, alerts and figures that may wait, alerts that the spool owes it, and
            undelivered ones that are kept.
        tries: Of an alert, before it steps aside.
        spool: A folder of this dispatcher's own.

    Attributes:
        spool: The spool, if there is one.

    Raises:
        ValueError: If `capacity` or `tries` is not positive, the spool is not one, two sinks have
            one name, or one has none and there is a spool.
        TypeError: If a sink cannot be called or is asynchronous, or an option is of another type.
        OSError: If the spool cannot be used, or another process has it.
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        *,
        capacity: int = 1024,
        tries: int = 8,
        spool: str | PathLike[str] | None = None,
    ) -> None:
        capacity, tries = whole("capacity", capacity, 1), whole("tries", tries, 1)
        known, self._capacity = named(sinks, has_spool=spool is not None), capacity
        self._new_threads = partial(_threads, known, capacity, tries, self._settled)
        names = [name for name, _ in known]
        self.spool = None if spool is None else Spool(spool, names, capacity=capacity)
        self._closed, self._is_childs = False, False
        self._begin()
        self._replay()
        atexit.register(self.close)
        self._close_with_worker()
        after_fork_in_child_of(self, Dispatcher.begin_as_child)
        util.register_after_fork(self, Dispatcher._close_with_worker)

    def _begin(self) -> None:
        self._is_told = False
        self._late: deque[Undelivered] = deque(maxlen=self._capacity)
        self._late_count = 0
        self._threads = self._new_threads()

    def begin_as_child(self) -> None:
        """In a forked child: with nothing to deliver, in threads of the child's own."""
        self._is_childs = True
        self._begin()

    def _close_with_worker(self) -> None:
        """A worker of `multiprocessing` ends without what `atexit` would call."""
        self._ending = util.Finalize(None, self.close, exitpriority=_FIRST)

    @property
    def undelivered(self) -> tuple[Undelivered, ...]:
        """What was not delivered, the oldest of each sink first; the latest `capacity` of them."""
        return (*(left for thread in self._threads for left in thread.undelivered), *self._late)

    @property
    def undelivered_count(self) -> int:
        """Deliveries that failed so far, alerts that did not fit included."""
        return sum(thread.undelivered_count for thread in self._threads) + self._late_count

    @property
    def dropped_summaries(self) -> int:
        """Figures that were given up for lack of room."""
        return sum(thread.dropped for thread in self._threads)

    @property
    def failures(self) -> dict[str, int]:
        """Calls that raised, by the sink's name, tries that were repeated included."""
        return {thread.name: thread.failures for thread in self._threads}

    @property
    def refused(self) -> dict[str, int]:
        """Alerts that a sink has refused for good, by the sink's name; `undelivered` has them."""
        return {thread.name: thread.refused for thread in self._threads}

    @property
    def has_meters(self) -> bool:
        """Whether a sink takes readings."""
        return any(thread.shows(Reading) for thread in self._threads)

    def send(self, alert: Alert) -> None:
        """Queue `alert` for every sink. Does not wait for any.

        Raises:
            RuntimeError: In a forked child of the process that has the spool; nothing else does.
        """
        if self.spool is not None:
            self.spool.check_process(alert)
        if self._closed:
            self._refuse(alert)
            return
        if self.spool is not None:
            self.spool.add(alert)
        refusals = [refusal for thread in self._threads if (refusal := thread.put(alert))]
        if refusals:
            self._tell(alert, refusals[0])

    def summarise(self, summary: Summary) -> None:
        """Queue `summary`, where there is room. Returns at once and does not raise."""
        self._show(summary)

    def measure(self, reading: Reading) -> None:
        """Queue `reading`, where there is room. Returns at once and does not raise."""
        self._show(reading)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was queued before this call is dealt with.

        Args:
            timeout: The longest wait, in seconds.

        Returns:
            Whether it was, in time.

        Raises:
            TypeError: The time is no number.
            ValueError: It is nan or below 0.
        """
        timeout = number("timeout", timeout, 0)
        deadline = time.monotonic() + timeout
        marks = [thread.mark() for thread in self._threads]
        waits = zip(self._threads, marks, strict=True)
        return all([thread.wait(mark, deadline - time.monotonic()) for thread, mark in waits])

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what is queued, close the sinks and stop. A second call does nothing.

        Args:
            timeout: The longest wait, in seconds; what is left then counts as undelivered.
        """
        again, self._closed = self._closed, True
        if again:
            return
        atexit.unregister(self.close)
        self._ending.cancel()
        deadline = time.monotonic() + timeout
        threads = [t for t in self._threads if t.is_used or not self._is_childs]
        for thread in threads:
            thread.begin_to_close()
        for thread in threads:
            thread.finish(deadline - time.monotonic())
        if self.spool is not None:
            self.spool.close(max(0.1, deadline - time.monotonic()))
        self._tell_of_undelivered()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _replay(self) -> None:
        """Deliver what an earlier process left in the spool, and keep what was refused then."""
        if self.spool is not None:
            for thread in self._threads:
                for alert, why in self.spool.refused(thread.name):
                    thread.lose(alert, why)
                for alert in self.spool.owed(thread.name):
                    thread.put(alert)

    def _show(self, figures: Figures) -> None:
        for thread in self._threads:
            if thread.shows(figures):
                thread.put(figures)

    def _settled(self, alert: Alert, sink: str, why: str | None) -> None:
        if self.spool is not None:
            self.spool.done(alert, sink, why)

    def _refuse(self, alert: Alert) -> None:
        self._late_count += 1
        self._late.append(Undelivered(alert, _ALL_SINKS, _CLOSED))
        self._tell(alert, _CLOSED)

    def _tell(self, alert: Alert, why: str) -> None:
        if not self._is_told:
            self._is_told = True  # one line, however many alerts follow
            _log.warning("Alert %s will not be delivered: %s. [OOD401]", alert.id, why)

    def _tell_of_undelivered(self) -> None:
        if not self.undelivered_count:
            return
        where = "Dispatcher.undelivered has the latest of them"
        if self.spool is not None:
            folder = self.spool.folder
            where = f"the next monitor with the spool {folder} delivers what it has of them"
        _log.warning("Alerts not delivered: %d; %s. [OOD401]", self.undelivered_count, where)


def _threads(
    known: Sequence[tuple[str, Sink]],
    capacity: int,
    tries: int,
    settled: Callable[[Alert, str, str | None], None],
) -> list[SinkThread]:
    return [
        SinkThread(sink, name, capacity=capacity, tries=tries, settled=settled)
        for name, sink in known
    ]
