"""What follows an alert: the layers that are not as usual, by gradient norms of a few samples.

Norms by layer cost several passes a sample, so that the alert goes first. Its explanation is
computed with the monitor's next call, in the thread that calls: scoring in a thread of its own
would share the model, and the random state of the process, with the program that is watched.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.alerts.alert import Alert, FlaggedSample, LayerShare
from ood_monitor.alerts.failures import described
from ood_monitor.calibration.scores import Scores
from ood_monitor.densities import Array
from ood_monitor.detector.detector import Detector
from ood_monitor.detector.explaining import Explanation
from ood_monitor.escaping import terminal
from ood_monitor.monitor.memory import strongest_layers
from ood_monitor.processes import after_fork_in_child_of

__all__ = ["Asked", "Explanations", "Found"]

#: Samples by which a younger one may be less anomalous, by one nat of its p-value, and be kept.
_AGE = 30

#: Characters of an error that are told.
_LONGEST = 500

#: Alerts that wait for an explanation at most; the oldest of more is without.
_WAITING = 8

_EXPLAINED = ("drift", "sample")

_GONE = "none of its samples is at hand"


@dataclass(frozen=True)
class Found:
    """An explanation, or why there is none.

    Attributes:
        alert: What it is of.
        message: In words.
        layers: Those furthest from what is usual; empty if there is none.
        samples: Those that it is from.
    """

    alert: Alert
    message: str
    layers: tuple[LayerShare, ...] = ()
    samples: tuple[FlaggedSample, ...] = ()


@dataclass(frozen=True)
class _Kept:
    """A sample that may explain: ``batch`` has no other."""

    rank: float
    sample: FlaggedSample
    batch: Batch


@dataclass(frozen=True)
class _Came:
    """Samples that have come together, which stand in the stream behind so many others."""

    batch: Batch
    p_values: Array
    valid: NDArray[np.bool_]
    names: Sequence[str | None] | None
    before: int

    @functools.cached_property
    def ranks(self) -> Array:
        """What is kept by: anomalous ones first, and younger ones."""
        positions = self.before + 1 + np.arange(len(self.p_values))
        ranks = positions / _AGE - np.log(np.maximum(self.p_values, np.finfo(float).tiny))
        return np.where(self.valid, ranks, -math.inf)

    def row(self, row: int) -> _Kept:
        """One of them, copied."""
        name = None if self.names is None else self.names[row]
        position = self.before + 1 + int(row)
        sample = FlaggedSample(position, float(self.p_values[row]), name)
        return _Kept(float(self.ranks[row]), sample, _copy_of(self.batch, int(row)))


@dataclass(frozen=True)
class Asked:
    """An alert that is to be explained.

    Attributes:
        alert: The alert.
        kept: The samples that may, the most anomalous first.
        budget: Seconds after which no further sample is taken.
    """

    alert: Alert
    kept: Sequence[_Kept]
    budget: float

    def explain(self, detector: Detector, tell: Callable[[Found], None]) -> None:
        """Whatever happens, it is told of."""
        try:
            found = self._explanation(detector)
        except Exception as error:  # of any kind: the model's, the device's, a lack of norms
            why = terminal(" ".join(described(error)[:_LONGEST].split()))
            found = Found(self.alert, f"Explanation: none, because {why}")
        except BaseException:  # an interruption, which is told of and raised on
            tell(Found(self.alert, "Explanation: none, because it was interrupted."))
            raise
        tell(found)

    def _explanation(self, detector: Detector) -> Found:
        if not self.kept:
            return Found(self.alert, f"Explanation: none, because {_GONE}.")
        deadline, found = time.monotonic() + self.budget, list[Explanation]()
        for each in self.kept:
            found.append(detector.explain(each.batch, layers=True, places=False))
            if time.monotonic() >= deadline:
                break
        z = np.mean([_row(each.z) for each in found], 0)
        shares = np.mean([_row(each.shares) for each in found], 0)
        return Found(
            self.alert,
            self._message(len(found)),
            strongest_layers(list(found[0].z), z, shares),
            tuple(sorted((each.sample for each in self.kept[: len(found)]), key=_position)),
        )

    def _message(self, count: int) -> str:
        of = "1 sample" if count == 1 else f"the {count} most anomalous samples"
        since = self.alert.evidence.since
        when = "" if since is None else f" since sample {since:,}"
        return f"Explanation of alert {self.alert.id[:8]}: gradient norms by layer of {of}{when}."


class Explanations:
    """Keeps the samples that may have to explain an alert, in memory only.

    Args:
        keep: Samples that are kept at most.
        budget: Seconds for an explanation; 0 for none at all.
    """

    def __init__(self, keep: int, budget: float) -> None:
        self._keep, self._budget = keep, budget
        self._kept: list[_Kept] = []
        self._asked: deque[Asked] = deque(maxlen=_WAITING)
        # What was asked for before a fork is the parent's to explain.
        after_fork_in_child_of(self, lambda own: own._asked.clear())

    def forget(self) -> None:
        """Keep nothing of what came so far: the stream is another, or begins anew."""
        self._kept.clear()

    def take(
        self,
        batch: Batch,
        scores: Scores,
        ids: Sequence[Any] | None,
        before: int,
        alerts: Iterable[Alert],
    ) -> None:
        """Have the alerts of B samples explained, and keep samples that may have to explain others.

        Drifts and too many flags are explained, by the most anomalous samples since a drift's
        evidence began and up to its alert, or by those that a sample alert names.

        Args:
            batch: The samples.
            scores: Theirs.
            ids: What they are called.
            before: Samples of the stream before them.
            alerts: That they have raised.
        """
        if not (self._budget and self._keep):
            return
        named = None if ids is None else [None if name is None else str(name) for name in ids]
        came = _Came(batch, scores.p_value.numpy(), scores.valid.numpy(), named, before)
        for alert in alerts:
            if alert.kind in _EXPLAINED and alert.severity == "critical":
                self._ask(alert, came)
        rows = np.argsort(-came.ranks, kind="stable")[: self._keep]
        least = self._kept[-1].rank if len(self._kept) == self._keep else -math.inf
        self._kept += [came.row(row) for row in rows if came.ranks[row] > least]
        self._kept.sort(key=lambda kept: -kept.rank)
        del self._kept[self._keep :]

    def _ask(self, alert: Alert, came: "_Came") -> None:
        since = alert.evidence.since or 1
        named = {sample.position for sample in alert.samples}
        found = [each for each in self._kept if each.sample.position >= since]
        rows = np.arange(max(0, since - came.before - 1), alert.samples_seen - came.before)
        if alert.kind == "sample":
            found = [each for each in found if each.sample.position in named]
            rows = np.array([row for row in rows if came.before + 1 + row in named], dtype=int)
        rows = rows[came.valid[rows]]
        worst = rows[np.argsort(came.p_values[rows], kind="stable")][: self._keep]
        found += [came.row(row) for row in worst]
        found.sort(key=lambda each: each.sample.p_value or 0.0)
        self._asked.append(Asked(alert, found[: self._keep], self._budget))

    def next(self) -> Asked | None:
        """The oldest that was asked for and not given; None if there is none."""
        try:
            return self._asked.popleft()
        except IndexError:
            return None


def _row(values: Mapping[str, Tensor]) -> Array:
    """Of one sample, (L,)."""
    return torch.cat(list(values.values())).numpy()


def _position(sample: FlaggedSample) -> int:
    return sample.position


def _copy_of(batch: Batch, row: int) -> Batch:
    return map_tensors(lambda t: t[row : row + 1].detach().clone(), batch)
