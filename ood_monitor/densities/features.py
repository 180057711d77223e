"""From terms and squared gradient norms to the features that a density sees.

A layer can be *constant*, its gradient the same for every sample, or numerically *dead*: zero in
theory and rounding noise in practice, such as an attention's key bias, which a softmax ignores.
Such norms differ between any two correct programs and would be the loudest features of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from ood_monitor.densities.base import Array
from ood_monitor.densities.measurements import Measurements, dropped_by, told_difference

__all__ = ["Features", "LogNorms", "TermValues", "layer_of", "table"]

#: What an infinite value of a term counts as, in nats.
_LARGEST_VALUE = 1e100


def table(norms: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Array]:
    """Norms as (names, array (N, F)); a layer given by rows has features ``layer[i]``."""
    names: list[str] = []
    columns: list[Array] = []
    for layer, values in norms.items():
        by_row = values.ndim == 2
        names += [f"{layer}[{i}]" for i in range(values.shape[1])] if by_row else [layer]
        array = values.detach().double().cpu().numpy()
        columns.append(array if by_row else array[:, None])
    return tuple(names), np.concatenate(columns, axis=1)


def layer_of(feature: str) -> str:
    """The layer, "term/parameter", that a feature belongs to, or its term."""
    return feature.removesuffix("]").rsplit("[", 1)[0] if feature.endswith("]") else feature


@dataclass(frozen=True)
class LogNorms:
    """Logs of the live features, fitted on in-distribution norms and then frozen.

    Attributes:
        names: All features, F of them.
        live: Which are kept, (F,), bool.
        floor: Norms below this are rounding and count as this, (F,).
        dropped: Why each other feature was left out, "constant", "dead" or "not finite".
    """

    names: tuple[str, ...]
    live: np.ndarray
    floor: Array
    dropped: dict[str, str]

    @classmethod
    def fit(cls, names: tuple[str, ...], norms: Array, eps: float) -> Self:
        """Look at in-distribution norms (N, F), computed with machine precision ``eps``.

        A feature is dead if its median is below (32 eps)^2 of the largest in its term: a norm that
        small is made of rounding errors of the numbers that the others are made of.

        Raises:
            ValueError: No feature is live.
        """
        finite = np.isfinite(norms).all(0)
        norms = np.where(finite, norms, 0.0)
        median = np.median(norms, axis=0)
        terms = np.array([name.split("/", 1)[0] for name in names])
        largest = {term: median[terms == term].max() for term in dict.fromkeys(terms)}
        reasons = {
            "not finite": ~finite,
            "dead": median <= (32 * eps) ** 2 * np.array([largest[term] for term in terms]),
            "constant": np.ptp(norms, axis=0) <= 8 * eps * median,
        }
        dropped = dropped_by(names, reasons, "layers whose gradient norms vary")
        live = np.array([name not in dropped for name in names])
        return cls(names, live, np.maximum(median * eps**2, np.finfo(float).tiny), dropped)

    def __call__(self, norms: Array) -> Array:
        """Log f of the live features, (N, live)."""
        largest = np.finfo(np.float64).max  # which an overflow counts as
        return np.log(np.clip(norms[:, self.live], self.floor[self.live], largest))

    @property
    def live_names(self) -> tuple[str, ...]:
        """Names of the live features, in order."""
        return tuple(name for name, live in zip(self.names, self.live, strict=True) if live)


@dataclass(frozen=True)
class TermValues:
    """The values of the terms that vary, told apart on in-distribution samples and then frozen.

    Attributes:
        names: All terms, T of them.
        live: Which are kept, (T,), bool.
    """

    names: tuple[str, ...]
    live: np.ndarray

    @classmethod
    def fit(cls, names: tuple[str, ...], values: Array, eps: float) -> Self:
        """Look at in-distribution values (N, T) in nats, of machine precision ``eps``.

        A term is constant where rounding alone moves it, as the log-determinant of a flow without
        scales. One alone is none: it is the likelihood itself, whose value is a matter of how the
        data are represented, and which misleads.
        """
        finite = np.isfinite(values).all(0)
        values = np.where(finite, values, 0.0)
        live = finite & (np.ptp(values, axis=0) > 8 * eps * np.abs(values).max(0))
        return cls(names, live & (live.sum() > 1))

    def __call__(self, values: Array) -> Array:
        """The live terms' values (N, live)."""
        return values[:, self.live].clip(-_LARGEST_VALUE, _LARGEST_VALUE)

    @property
    def live_names(self) -> tuple[str, ...]:
        """Names of the live terms, in order."""
        return tuple(name for name, live in zip(self.names, self.live, strict=True) if live)


@dataclass(frozen=True)
class Features:
    """What a density sees of samples: the values of live terms, if they count, then log norms."""

    log_norms: LogNorms
    terms: TermValues | None = None

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of the norms, also those that were left out."""
        return self.log_norms.names

    @property
    def dropped(self) -> dict[str, str]:
        """Why the others were left out, by name."""
        return self.log_norms.dropped

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the features, "term" or "term/parameter", in order."""
        return (*(self.terms.live_names if self.terms else ()), *self.log_norms.live_names)

    def __call__(self, measured: Measurements) -> Array:
        """Features (N, F).

        Raises:
            ValueError: Other terms and layers than fitted.
        """
        names = self.log_norms.names
        if measured.features != names or (self.terms and measured.terms != self.terms.names):
            raise ValueError(
                f"Expected the terms and layers that the detector was fitted on, from "
                f"{names[0]!r} on, got {told_difference(names, measured.features)}"
            )
        logs = self.log_norms(measured.norms)
        if self.terms is None:
            return logs
        return np.hstack([self.terms(measured.log_likelihood), logs])
