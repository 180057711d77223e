"""How much is scored, and when: shares, budgets and a queue, none of which looks at the content.

A monitor's promises hold for the samples that are scored as long as what they show has no part in
which they are.
"""

import logging
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, Full, Queue

from ood_monitor.checks import number, seed_of, whole
from ood_monitor.processes import Lock, after_fork_in_child_of

__all__ = ["Choice", "Worker"]

_log = logging.getLogger(__name__)

#: Costs of which the running median is taken.
_COSTS = 20


class Choice:
    """Which samples of a call are scored.

    Args:
        sample_rate: The share of samples, each drawn by itself.
        max_latency_ms: Milliseconds a call that scoring may take; the first call measures the cost
            of one sample.
        seed: Of the draws; None for other ones each time.

    Raises:
        ValueError: A rate outside (0, 1], or a budget that is not positive and finite.
        TypeError: An option of another type.
    """

    def __init__(self, sample_rate: float, max_latency_ms: float | None, seed: int | None) -> None:
        self._rate = number("sample_rate", sample_rate, 0, 1, ends="(]")
        self._budget = max_latency_ms
        if max_latency_ms is not None:
            self._budget = number("max_latency_ms", max_latency_ms, 0, ends="()")
        seed = None if seed is None else seed_of("seed", seed)
        self._random, self._lock = random.Random(seed), Lock()
        self._costs: deque[float] = deque(maxlen=_COSTS)

    def rows(self, count: int) -> list[int]:
        """The chosen of so many samples, in order."""
        with self._lock:
            drawn = [i for i in range(count) if self._random.random() < self._rate]
            most = len(drawn) if self._budget is None else self._affordable(self._budget)
            return drawn if len(drawn) <= most else sorted(self._random.sample(drawn, most))

    def measured(self, samples: int, milliseconds: float) -> None:
        """Take what scoring so many samples has cost."""
        with self._lock:
            self._costs.append(milliseconds / samples)

    def _affordable(self, budget: float) -> int:
        if not self._costs:
            return 1
        fit = int(budget / statistics.median(self._costs))
        if not fit:
            # Forgotten one by one, so that a cost that was too high once is measured again.
            self._costs.popleft()
        return fit


class Worker:
    """Runs tasks one after the other in a thread of its own; what finds the queue full is dropped.

    A forked child starts with an empty queue: what waits is its parent's.

    Args:
        size: The most tasks that wait.

    Raises:
        ValueError: A size below 1.
        TypeError: It is no whole number.
    """

    def __init__(self, size: int) -> None:
        self._size, self._closed = whole("queue_size", size, 1), False
        self.begin()
        after_fork_in_child_of(self, Worker.begin)

    def begin(self) -> None:
        """Have nothing to do, and no thread yet."""
        self._queue: Queue[Callable[[], None]] = Queue(self._size)
        self._idle, self._unfinished = threading.Condition(), 0
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> bool:
        """Put a task into the queue without waiting; False if there is no room."""
        with self._idle:
            if self._closed:
                return False
            try:
                self._queue.put_nowait(task)
            except Full:
                return False
            self._unfinished += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ood-monitor", daemon=True)
                self._thread.start()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until all tasks have run; False if the time is up first."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout)

    def close(self, timeout: float) -> int:
        """Run what waits within so many seconds, take no more; how many tasks were dropped."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._unfinished, timeout)
        return self._dropped()

    def _dropped(self) -> int:
        dropped = 0
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                break
            dropped += 1
            self._finished()
        return dropped

    def _run(self) -> None:
        while not self._closed or not self._queue.empty():
            try:
                task = self._queue.get(timeout=0.1)
            except Empty:
                continue
            try:
                task()
            except Exception:  # the thread must live on; a task reports its own failures
                _log.exception("A task of the monitor's queue failed. [OOD606]")
            finally:
                self._finished()

    def _finished(self) -> None:
        with self._idle:
            self._unfinished -= 1
            self._idle.notify_all()
