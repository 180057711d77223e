"""What is told once: failures by their kind, and states that a service may be in for days."""

import re
from collections import Counter

from ood_monitor.alerts.failures import described
from ood_monitor.processes import Lock

__all__ = ["Failures", "Once"]

#: Kinds that are told apart, after which no more are.
_MOST = 100

#: What differs between failures of one kind.
_NUMBERS = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


class Once:
    """What was told before."""

    def __init__(self) -> None:
        self._told, self._lock = set[str](), Lock()

    def is_new(self, what: str) -> bool:
        """Whether something is still to be told; it is from now on."""
        with self._lock:
            if what in self._told or len(self._told) >= _MOST:
                return False
            self._told.add(what)
            return True


class Failures:
    """Failures by kind: of one are those that differ in numbers alone."""

    def __init__(self) -> None:
        self._counts, self._first, self._lock = Counter[str](), dict[str, str](), Lock()

    @property
    def counts(self) -> dict[str, int]:
        """How many there were of each kind, by its first error."""
        with self._lock:
            return {self._first[kind]: count for kind, count in self._counts.items()}

    def add(self, error: Exception) -> bool:
        """Count one; whether its kind is new."""
        told = described(error)
        kind = _NUMBERS.sub("N", told)
        with self._lock:
            if kind not in self._counts and len(self._counts) >= _MOST:
                kind, told = "", "others"
            self._counts[kind] += 1
            self._first.setdefault(kind, told)
            return self._counts[kind] == 1
