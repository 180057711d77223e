"""What is told once: failures by their kind, and states that a service may be in for days."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ood_monitor.alerts.failures import described
from ood_monitor.processes import Lock
from ood_monitor_integrations.diffusers.origin import Origin, settings_in
from ood_monitor_integrations.diffusers.plan import WatchingPlan

__all__ = ["Failures", "UnlikeTheFit"]

_log = logging.getLogger(__name__)

#: Kinds that are told apart, after which no more are.
_MOST = 100

#: What differs between failures of one kind.
_NUMBERS = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


class _Once:
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


class UnlikeTheFit:
    """Tells of calls that are not as those of the fit, once of each way in which they are not.

    Args:
        kind: The pipeline's class.
        origin: What the detector was fitted on; None of one that does not say.
        plan: How calls are watched within a budget; None without one.
    """

    def __init__(self, kind: type, origin: Origin | None, plan: WatchingPlan | None) -> None:
        self._kind, self._origin, self._plan, self._once = kind, origin, plan, _Once()

    def tell_of_settings(self, arguments: Mapping[str, Any]) -> None:
        """Of a call whose samples are made otherwise than those that the detector was fitted on."""
        if self._origin is None or not arguments:
            return
        others = self._origin.others(settings_in(self._kind, arguments))
        told = "; ".join(f"{name}={b!r}, not {a!r}" for name, (a, b) in others.items())
        if told:
            self._tell(
                f"A call unlike those of the fit, whose samples may differ: {told}. [OOD601]"
            )

    def tell_of_group(self, group: str) -> None:
        """Of one that the detector was not fitted on."""
        self._tell(
            f"A size, or adapters, that the detector was not fitted on: {group}. Such samples are "
            "counted and not scored; to watch them, fit with enough of them. "
            "[OOD602]"
        )

    def tell_of_rows(self, rows: float) -> None:
        """Of a call that is shorter than the budget was planned for."""
        if self._plan is not None and rows < self._plan.call_rows:
            self._tell(
                f"A call that gives its denoiser {rows:g} rows a sample, for which watching was "
                "not planned: scoring takes a larger share of its time than of the "
                f"{self._plan.call_rows:g} rows planned. [OOD603]"
            )

    def _tell(self, message: str) -> None:
        if self._once.is_new(message):
            _log.warning("%s", message)


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
