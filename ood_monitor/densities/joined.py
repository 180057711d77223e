r"""Parts joined into one score.

.. math:: s = -\sum_k \log p_k

with :math:`p_k` the p-value of part k among scores of the fit samples, each by a fit to others
(cross-fitting): :math:`(1 + \#\{\ge s_k\}) / (n + 1)` at each of these, and linear between them, so
that rounding of a score stays rounding. Beyond their .9 quantile u it falls as an exponential whose
median excess over u is theirs: :math:`\log p_k(u) - (s_k - u) / b`. The median, since the mean
excess lets a single broken sample silence a part.

The sum is a score. Parts are dependent, so that it is no p-value and follows no chi-square: only
the conformal p-value, by further samples, promises anything.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ood_monitor.densities.base import Array
from ood_monitor.densities.features import layer_of
from ood_monitor.densities.measurements import Measurements
from ood_monitor.densities.parts import FittedPart, Part

__all__ = ["FOLDS", "Joined", "Tail", "minimum_samples"]

_log = logging.getLogger(__name__)

_Indices: TypeAlias = NDArray[np.intp]

#: Of the cross-fitting.
FOLDS = 5

#: Where the tail begins, as a share of scores above, and how many there must be to know it by.
_TAIL, _FEWEST = 0.1, 5


@dataclass(frozen=True)
class Tail:
    """What a part's score is worth among scores of samples that it was not fitted on.

    Attributes:
        scores: (n,), sorted.
    """

    scores: Array

    @cached_property
    def start(self) -> float:
        """u, their .9 quantile."""
        return float(np.quantile(self.scores, 1 - _TAIL))

    @cached_property
    def scale(self) -> float:
        """b, by which the exponential falls; 0 where too few scores tell it."""
        excess = self.scores[self.scores > self.start] - self.start
        return float(np.median(excess)) / math.log(2) if len(excess) >= _FEWEST else 0.0

    def log_p(self, scores: Array) -> Array:
        """Log of the p-values of scores (N,); nan of nan."""
        if self.scale == 0:
            return self._by_rank(scores)
        excess = np.maximum(scores - self.start, 0) / self.scale
        return np.asarray(self._by_rank(np.minimum(scores, self.start)) - excess)

    def _by_rank(self, scores: Array) -> Array:
        known, p_values = self._p_values
        p = np.interp(scores, known, p_values, right=1 / (len(self.scores) + 1))
        return np.asarray(np.where(np.isnan(scores), np.nan, np.log(p)))

    @cached_property
    def _p_values(self) -> tuple[Array, Array]:
        """The known scores, each once, and their p-values."""
        known, first = np.unique(self.scores, return_index=True)
        n = len(self.scores)
        return known, (1 + n - first) / (n + 1)

    def parts(self, contributions: Array) -> Array:
        """Contributions (N, F) to the score as contributions to -log p."""
        scores = contributions.sum(1)
        unit = self.scale or float(np.std(self.scores)) or 1.0
        # What no column says, each carries an equal part of.
        rest = -self.log_p(scores) - scores / unit
        return np.asarray(contributions / unit + rest[:, None] / contributions.shape[1])


@dataclass(frozen=True)
class Joined:
    """Fitted parts, and how their scores become one. Of one part it is that part's own.

    Attributes:
        parts: In order.
        tails: One a part; none of a single part.
    """

    parts: tuple[FittedPart, ...]
    tails: tuple[Tail, ...] = ()

    @classmethod
    def fit(cls, parts: Sequence[Part], measured: Measurements, eps: float) -> Self:
        """Fit parts to normal samples; those that say nothing of this model are left out and told.

        Raises:
            ValueError: No part can be fitted.
        """
        fitted: list[FittedPart] = []
        tails: list[Tail] = []
        reasons: dict[str, str] = {}
        for part in parts:
            try:
                found = part.fit(measured, eps)
                held_out = _held_out(part, measured, eps) if len(parts) > 1 else np.empty(0)
            except ValueError as error:
                reasons[part.kind] = str(error)
                continue
            fitted.append(found)
            tails.append(Tail(np.sort(held_out)))
        if not fitted:
            raise ValueError(next(iter(reasons.values())) if len(parts) == 1 else _none(reasons))
        for kind, reason in reasons.items():
            _log.warning("The detector goes without its part %r: %s [OOD109]", kind, reason)
        return cls(tuple(fitted), tuple(tails) if len(fitted) > 1 else ())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the live columns of all parts, in order."""
        return tuple(name for part in self.parts for name in part.columns.names)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of all columns, also those that were left out."""
        return tuple(name for part in self.parts for name in part.columns.all_names)

    @property
    def dropped(self) -> dict[str, str]:
        """Why the others were left out, by name."""
        return {name: why for part in self.parts for name, why in part.columns.dropped.items()}

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """What the live columns are of, in order."""
        return tuple(name for part in self.parts for name in part.layers)

    @cached_property
    def _layers_of_columns(self) -> tuple[_Indices, _Indices, _Indices]:
        """The columns in the order of their layers, and where each layer begins, and its number."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(layer_of(name), []).append(i)
        counts = np.array([len(columns) for columns in found.values()])
        return np.concatenate(list(found.values())), np.cumsum(counts) - counts, counts

    def sums_by_layer(self, columns: Array) -> Array:
        """Columns (N, F) added up by layer, (N, L)."""
        order, starts, _ = self._layers_of_columns
        found: Array = np.add.reduceat(columns[:, order], starts, axis=1)
        return found

    def means_by_layer(self, columns: Array) -> Array:
        """Means of columns (N, F) by layer, (N, L)."""
        return self.sums_by_layer(columns) / self._layers_of_columns[2]

    def features(self, measured: Measurements) -> Array:
        """The live columns of all parts, (N, F).

        Raises:
            ValueError: Other columns than fitted.
        """
        return np.hstack([part.columns(measured) for part in self.parts])

    def contributions(self, features: Array) -> Array:
        """Each live column's part of the score, (N, F), of ``features``; rows add up to it."""
        ends = np.cumsum([len(part.columns.names) for part in self.parts])
        blocks = np.split(features, ends[:-1], axis=1)
        pairs = zip(self.parts, blocks, strict=True)
        found = [part.density.contributions(block) for part, block in pairs]
        if self.tails:
            found = [tail.parts(each) for tail, each in zip(self.tails, found, strict=True)]
        return np.hstack(found)

    def score(self, measured: Measurements) -> Array:
        """Scores (N,), higher = more anomalous."""
        if not self.tails:
            return self.parts[0].score(measured)
        log_p = [
            tail.log_p(part.score(measured))
            for part, tail in zip(self.parts, self.tails, strict=True)
        ]
        return np.asarray(-np.sum(log_p, axis=0))


def minimum_samples(parts: Sequence[Part]) -> int:
    """The fewest fit samples that parts take: more where they are joined, by cross-fitting."""
    most = max(part.minimum_samples for part in parts)
    return most if len(parts) == 1 else max(-(-most * FOLDS // (FOLDS - 1)), 2 * FOLDS)


def _held_out(part: Part, measured: Measurements, eps: float) -> Array:
    """Scores (N,), each by a fit to the other folds, scales and clipping included."""
    fold = np.arange(len(measured)) % FOLDS
    found = np.empty(len(measured))
    for k in range(FOLDS):
        unseen = np.flatnonzero(fold == k)
        seen = part.fit(measured.take(np.flatnonzero(fold != k)), eps)
        found[unseen] = seen.score(measured.take(unseen))
    return found


def _none(reasons: dict[str, str]) -> str:
    return f"Expected a part that can be fitted, got none: {reasons}."
