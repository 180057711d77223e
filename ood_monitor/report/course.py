"""The drift test over a stream: what a monitor would have said, and how its evidence went."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_monitor.alerts.alert import Alert, Status
from ood_monitor.densities import Array
from ood_monitor.monitor.decisions import Decisions
from ood_monitor.monitor.memory import Row
from ood_monitor.monitor.rules import Rules
from ood_monitor.report.samples import Stream
from ood_monitor.saving.fitted import Fitted

__all__ = ["Drift", "drift_of"]


@dataclass(frozen=True)
class Drift:
    r"""What a monitor says of a stream.

    While nothing has changed, the evidence :math:`R_n` less n is a martingale, so that the chance
    that it has reached c within n samples is at most n / c: :attr:`chance`.

    Attributes:
        log_e_values: (N,), nats, the evidence after each sample; nan for an invalid one.
        tested: (N,), samples that this evidence is from, since the test last began.
        alerts: What a monitor would have told, in order.
        status: Where the stream stands at its end.
        is_long_enough: Whether so many samples could have raised an alarm, had each been further
            off than all that was known.
    """

    log_e_values: Array
    tested: NDArray[np.int64]
    alerts: tuple[Alert, ...]
    status: Status
    is_long_enough: bool

    @property
    def drifts(self) -> tuple[Alert, ...]:
        """The alerts of a drift."""
        return tuple(alert for alert in self.alerts if alert.kind == "drift")

    @property
    def alarms(self) -> tuple[int, ...]:
        """Samples seen at each of them."""
        return tuple(alert.samples_seen for alert in self.drifts)

    @property
    def since(self) -> int:
        """The sample with which a drift that stands began; 1 if none does."""
        stands = self.status == "ALERT" and self.drifts
        return (self.drifts[-1].evidence.since if stands else None) or 1

    @property
    def highest(self) -> int:
        """The sample with the most evidence, from 1; 0 if none has any."""
        known = np.nan_to_num(self.log_e_values, nan=-math.inf, neginf=-math.inf)
        return int(known.argmax()) + 1 if np.isfinite(known).any() else 0

    @property
    def last(self) -> int:
        """The last sample with evidence, from 1; 0 if none has any."""
        known = np.flatnonzero(np.isfinite(self.log_e_values))
        return int(known[-1]) + 1 if len(known) else 0

    def value(self, sample: int) -> float:
        """The evidence after a sample, counted from 1, in nats."""
        return float(self.log_e_values[sample - 1])

    def chance(self, sample: int) -> float:
        """At most the chance of as much evidence up to this sample, while nothing has changed."""
        return min(1.0, float(self.tested[sample - 1]) * math.exp(-self.value(sample)))


def drift_of(fitted: Fitted, stream: Stream, *, ert: float, fpr: float) -> Drift | None:
    """What a :class:`~ood_monitor.Monitor` says of a stream, one sample after the other.

    Returns:
        None where nothing can be said, as no sample is valid, or the detector has groups and the
        stream does not say which sample is of which.

    Raises:
        ValueError: An ``ert`` below 2, or an ``fpr`` not in (0, 1).
    """
    if not stream.valid.any() or (fitted.grouped is not None and stream.groups is None):
        return None
    decisions = Decisions.of(Rules(name="stream", fpr=fpr, ert=ert), fitted, seed=0)
    is_long_enough = _can_alarm(decisions, int(stream.valid.sum()))
    values, tested = np.full(len(stream.ids), math.nan), np.zeros(len(stream.ids), dtype=np.int64)
    unknown = np.full((2, len(fitted.layers)), math.nan)
    groups = np.zeros(len(stream.ids), dtype=int) if stream.groups is None else stream.groups
    columns = stream.score.tolist(), stream.p_value.tolist(), stream.valid.tolist()
    for i, (score, p_value, valid) in enumerate(zip(*columns, strict=True)):
        before = decisions.test.n
        row = Row(score, p_value, valid, unknown, stream.ids[i], int(groups[i]) if valid else 0)
        decisions.take([row], stale=None)
        if valid:
            values[i], tested[i] = decisions.memory.log_e_value, before + 1
    memory = decisions.memory
    return Drift(values, tested, tuple(memory.owed), memory.overall, is_long_enough)


def _can_alarm(decisions: Decisions, count: int) -> bool:
    """Whether so many samples of the largest score that there is raise an alarm."""
    test = decisions.test.copy()
    return any(test.update(math.inf).alarm for _ in range(count))
