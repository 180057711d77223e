r"""Columns of a forward pass as a density sees them: live ones, on robust scales.

A column is centred by its median and scaled by its median absolute deviation, or by the range that
all but one in a hundred samples on a side are in if that is wider, each as of a Normal: the mean
and the standard deviation hide an outlier among the samples that they are taken of. A density is
fitted to columns that are clipped at 10 on that scale, and scores them as they are. By the median
deviation alone the tails of a column that is nearly constant would be clipped, and the density
blind to what is usual there.

Sums of squares, as the expected norms are, become :math:`\log(s + c)`. The floor c belongs to the
definition: without it a channel that is nearly dead has a logarithm with tails of its own.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, TypeAlias

import numpy as np

from ood_monitor.densities.base import Array
from ood_monitor.densities.measurements import Measurements, Table, dropped_by, told_difference

__all__ = ["FLOORS", "Columns", "Floor", "clipped"]

#: What is added to a sum of squares before its logarithm: .01 of its median over the fit samples;
#: or .1 of its mean, for layers without positions, whose sum is a single square.
Floor: TypeAlias = Literal["median", "mean"]

FLOORS: dict[Floor, float] = {"median": 0.01, "mean": 0.1}

#: What makes a Normal's standard deviation of its median absolute deviation, and of the range of
#: its central 98 %.
_MAD, _RANGE = 1.4826, 1 / 4.6527

#: Where columns are clipped for the fit, on the robust scale; and always, so that squares are
#: finite.
_CLIP, _LARGEST = 10.0, 1e100


@dataclass(frozen=True)
class Columns:
    """What is live among columns, and its scale: fitted on normal samples and then frozen.

    Attributes:
        kind: The table that they are of.
        all_names: All columns, F of them.
        dropped: Why each of the others was left out, "not finite", "not called" or "constant".
        floor: What is added before the logarithm, (F,), or None where none is taken.
        centre: Medians of the live columns.
        scale: Their robust standard deviations.
        rule: What gave the floor.
    """

    kind: str
    all_names: tuple[str, ...]
    dropped: dict[str, str]
    floor: Array | None
    centre: Array
    scale: Array
    rule: Floor | None = None

    @classmethod
    def fit(cls, kind: str, table: Table, eps: float, rule: Floor | None = None) -> Self:
        """Look at columns (N, F) of normal samples, computed with machine precision ``eps``.

        Args:
            kind: The name of the table.
            table: The columns.
            eps: The precision: what varies by a few of these is constant.
            rule: Of the floor of sums of squares, whose logarithm is taken.

        Raises:
            ValueError: No column varies.
        """
        finite = np.asarray(np.isfinite(table.values).all(0))
        values = np.where(finite, table.values, 0.0)
        reasons = {
            "not finite": ~finite,
            "not called": (values == 0).all(0) & (rule is not None),
            "constant": np.ptp(values, axis=0) <= 8 * eps * np.abs(values).max(0, initial=0.0),
        }
        dropped = dropped_by(table.names, reasons, "columns that vary")
        live = np.array([name not in dropped for name in table.names])
        floor = None if rule is None else _floor(values, rule)
        seen = (values if floor is None else np.log(values + floor))[:, live]
        centre = np.median(seen, axis=0)
        spread = np.maximum(_MAD * np.median(np.abs(seen - centre), axis=0), _RANGE * _range(seen))
        scale = np.where(spread > 0, spread, np.maximum(seen.std(0), np.finfo(float).tiny))
        return cls(kind, table.names, dropped, floor, centre, scale, rule)

    def __call__(self, measured: Measurements) -> Array:
        """The live columns on their scales, (N, live).

        Raises:
            ValueError: Other columns than fitted.
        """
        table = measured.tables[self.kind]
        if table.names != self.all_names:
            raise ValueError(
                f"Expected the {len(self.all_names)} columns that the detector was fitted on, from "
                f"{self.all_names[0]!r} on, got {told_difference(self.all_names, table.names)}"
            )
        values = table.values[:, self._live]
        if self.floor is not None:
            values = np.log(np.minimum(values, np.finfo(float).max / 2) + self.floor[self._live])
        return np.asarray(((values - self.centre) / self.scale).clip(-_LARGEST, _LARGEST))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the live columns, in order."""
        return tuple(name for name in self.all_names if name not in self.dropped)

    @cached_property
    def _live(self) -> np.ndarray:
        return np.array([name not in self.dropped for name in self.all_names])


def clipped(columns: Array) -> Array:
    """Columns as a density is fitted to them."""
    return columns.clip(-_CLIP, _CLIP)


def _range(columns: Array) -> Array:
    """Of columns (N, F) without one sample in a hundred, at least one, on each side, (F,)."""
    low = np.quantile(columns, 0.01, axis=0, method="higher")
    return np.asarray(np.quantile(columns, 0.99, axis=0, method="lower") - low)


def _floor(values: Array, rule: Floor) -> Array:
    """What is added to sums of squares (N, F), (F,).

    A layer that is called for fewer than half of the samples has median 0: then by its mean.
    """
    mean = FLOORS["mean"] * values.mean(0)
    by_median = FLOORS["median"] * np.median(values, axis=0)
    found = np.where(by_median > 0, by_median, mean) if rule == "median" else mean
    return np.maximum(found, np.finfo(float).tiny)
