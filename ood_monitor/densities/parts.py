"""Parts of a detector: some columns of what was measured, with a density of their own.

What a part can be of is a line of ``KINDS``. All parts are fitted in the same way: which of the
columns are live, on which scale, then the density of these.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from ood_monitor.densities.base import Array, Density
from ood_monitor.densities.columns import Columns, Floor, clipped
from ood_monitor.densities.features import Features, LogNorms, TermValues, layer_of
from ood_monitor.densities.gaussian import ShrunkGaussian
from ood_monitor.densities.measurements import Measurements
from ood_monitor.densities.mixture import GaussianMixture
from ood_monitor.densities.one_sided import OneSided
from ood_monitor.densities.terms import TermsAndNorms

__all__ = ["CHOSEN", "KINDS", "FittedPart", "Kind", "Method", "Part", "by_layer"]

#: What a detector goes by: realised gradient norms as in the paper, what a forward pass gives, or
#: both joined.
Method: TypeAlias = Literal["gradient_norms", "forward", "both"]

#: The word for parts that were chosen one by one.
CHOSEN: Literal["parts"] = "parts"

#: What a part is of: the likelihood's values, its expectation by place, expected norms, low
#: likelihood, realised gradient norms.
Kind: TypeAlias = Literal["values", "map", "expected_norms", "log_likelihood", "gradient_norms"]


@dataclass(frozen=True)
class _Of:
    """What a kind of part is by default.

    Attributes:
        density: Makes its density.
        floor: Of sums of squares, whose logarithm is taken; None for other columns.
        fewest: The fewest live columns that say something.
    """

    density: Callable[[], Density]
    floor: Floor | None = None
    fewest: int = 1


KINDS: dict[Kind, _Of] = {
    # One value alone is the likelihood itself, which misleads.
    "values": _Of(GaussianMixture, fewest=2),
    "map": _Of(lambda: ShrunkGaussian("ledoit_wolf")),
    "expected_norms": _Of(lambda: ShrunkGaussian("ledoit_wolf"), floor="median"),
    "log_likelihood": _Of(OneSided),
    "gradient_norms": _Of(TermsAndNorms),
}


@dataclass(frozen=True)
class FittedPart:
    """A part that has learned.

    Attributes:
        kind: What it is of.
        columns: Which columns are live, and their scales.
        density: Of the live columns.
    """

    kind: Kind
    columns: Features | Columns
    density: Density

    @property
    def floor(self) -> Floor | None:
        """Of its sums of squares."""
        return None if isinstance(self.columns, Features) else self.columns.rule

    @property
    def names(self) -> tuple[str, ...]:
        """Of the live columns; those of gradient norms are "term/parameter", others "kind/name"."""
        if isinstance(self.columns, Features):
            return self.columns.names
        return tuple(f"{self.kind}/{name}" for name in self.columns.live_names)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of the columns, also those that were left out."""
        if isinstance(self.columns, Features):
            return self.columns.log_norms.names
        return tuple(f"{self.kind}/{name}" for name in self.columns.names)

    @property
    def dropped(self) -> dict[str, str]:
        """Why the others were left out, by name."""
        if isinstance(self.columns, Features):
            return self.columns.log_norms.dropped
        return {f"{self.kind}/{name}": why for name, why in self.columns.dropped.items()}

    @property
    def layers(self) -> tuple[str, ...]:
        """What the live columns are of, in order."""
        return tuple(dict.fromkeys(map(layer_of, self.names)))

    def features(self, measured: Measurements) -> Array:
        """What the density sees, (N, F).

        Raises:
            ValueError: Other columns than fitted.
        """
        if isinstance(self.columns, Features):
            return self.columns(measured)
        return self.columns(measured.tables[self.kind])

    def score(self, measured: Measurements) -> Array:
        """Scores (N,), higher = more anomalous."""
        return self.density.score(self.features(measured))


@dataclass(frozen=True)
class Part:
    """Some columns of what is measured, and the density that they are scored by.

    Attributes:
        kind: ``"values"``: expected and surprise of each term, or its value where no law is known,
            and an image's bits. ``"map"``: what was expected by place, on a grid of 4 by 4.
            ``"expected_norms"``: expected squared gradient norms by layer. ``"log_likelihood"``:
            low likelihood, one-sided. ``"gradient_norms"``: realised squared gradient norms by
            layer, as in the paper.
        density: Unfitted, a copy is fitted; by default :class:`~ood_monitor.TermsAndNorms` of
            gradient norms, a mixture of two Gaussians of values, and a Gaussian with the covariance
            of Ledoit and Wolf of the others.
        floor: Of expected norms: ``"median"``, or ``"mean"`` for layers without positions, as of
            models of a table's rows.

    Raises:
        ValueError: An unknown kind.

    Example:
        >>> Part("expected_norms").minimum_samples
        3
    """

    kind: Kind
    density: Density | None = None
    floor: Floor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Expected a part of {get_args(Kind)}, got {self.kind!r}.")
        of = KINDS[self.kind]
        if self.floor is not None and of.floor is None:
            raise ValueError(f"Expected no floor of {self.kind!r}, which are no sums of squares.")
        if self.density is None:
            object.__setattr__(self, "density", of.density())

    @property
    def minimum_samples(self) -> int:
        """The fewest samples that its density is fitted to."""
        return self._density.minimum_samples

    @property
    def needs_gradients(self) -> bool:
        """Whether it takes a backward pass."""
        return self.kind == "gradient_norms"

    def fit(self, measured: Measurements, eps: float) -> FittedPart:
        """Learn from normal samples, computed with machine precision ``eps``.

        Raises:
            ValueError: No column varies, or too few that say something.
        """
        if self.needs_gradients:
            return self._fit_norms(measured, eps)
        of, table = KINDS[self.kind], measured.tables[self.kind]
        columns = Columns.fit(table, eps, of.floor and (self.floor or of.floor))
        if len(columns.live_names) < of.fewest:
            raise ValueError(
                f"Expected at least {of.fewest} columns that vary, got {columns.live_names} alone."
            )
        density = copy.deepcopy(self._density).fit(clipped(columns(table)))
        return FittedPart(self.kind, columns, density)

    def _fit_norms(self, measured: Measurements, eps: float) -> FittedPart:
        density = copy.deepcopy(self._density)
        features = Features(LogNorms.fit(measured.features, measured.norms, eps))
        if isinstance(density, TermsAndNorms):
            terms = TermValues.fit(measured.terms, measured.log_likelihood, eps)
            density = density.of(int(terms.live.sum()))
            features = replace(features, terms=terms)
        return FittedPart(self.kind, features, density.fit(features(measured)))

    @property
    def _density(self) -> Density:
        assert self.density is not None
        return self.density


def by_layer(names: tuple[str, ...], columns: Array, how: Callable[..., Array]) -> Array:
    """Columns (N, F) brought together by layer, (N, L), by a function with ``axis=``."""
    positions: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        positions.setdefault(layer_of(name), []).append(i)
    return np.stack([how(columns[:, at], axis=1) for at in positions.values()], 1)
