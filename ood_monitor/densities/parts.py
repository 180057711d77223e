"""Parts of a detector: some columns of what was measured, with a density of their own.

What a part can be of is a line of ``KINDS``. All parts are fitted in the same way: which of the
columns are live, on which scale, then the density of these.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from ood_monitor.checks import having, word
from ood_monitor.densities.base import Array, Density
from ood_monitor.densities.columns import Columns, Floor, clipped
from ood_monitor.densities.features import Features, LogNorms, TermValues, layer_of
from ood_monitor.densities.gaussian import ShrunkGaussian
from ood_monitor.densities.measurements import Measurements
from ood_monitor.densities.mixture import GaussianMixture
from ood_monitor.densities.one_sided import OneSided
from ood_monitor.densities.terms import TermsAndNorms

__all__ = [
    "CHOSEN",
    "KINDS",
    "OF_CALLS",
    "OF_DENOISERS",
    "OF_GRADIENTS",
    "OF_SQUARES",
    "FittedPart",
    "Kind",
    "Method",
    "Part",
]

#: What a detector goes by: realised gradient norms as in the paper, what a forward pass gives, or
#: both joined.
Method: TypeAlias = Literal["gradient_norms", "forward", "both"]

#: The word for parts that were chosen one by one.
CHOSEN: Literal["parts"] = "parts"

#: What a part is of: the likelihood's values, its expectation by place, expected norms, low
#: likelihood, realised gradient norms by tensor and by input channel; and of denoisers without
#: noise the last layer, energies, and how well a sample fits its condition; and what was seen of
#: the calls that made a sample.
Kind: TypeAlias = Literal[
    "values",
    "map",
    "expected_norms",
    "log_likelihood",
    "gradient_norms",
    "channel_norms",
    "output_layer",
    "energies",
    "condition",
    "own_calls",
]


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
    "channel_norms": _Of(lambda: ShrunkGaussian("ledoit_wolf"), floor="median"),
    "output_layer": _Of(lambda: ShrunkGaussian("ledoit_wolf"), floor="median"),
    "energies": _Of(lambda: ShrunkGaussian("ledoit_wolf")),
    "condition": _Of(OneSided),
    "own_calls": _Of(lambda: ShrunkGaussian("ledoit_wolf")),
}

#: Those that are sums of squares, whose logarithm is taken above a floor.
OF_SQUARES: frozenset[Kind] = frozenset(kind for kind, of in KINDS.items() if of.floor is not None)

#: Those of what denoisers leave of samples without noise.
OF_DENOISERS: frozenset[Kind] = frozenset({"output_layer", "energies", "condition"})

#: Those of what samples come with, which no pass gives.
OF_CALLS: frozenset[Kind] = frozenset({"own_calls"})

#: Those that take a backward pass.
OF_GRADIENTS: frozenset[Kind] = frozenset({"gradient_norms", "channel_norms"})


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
        """The rule of its floor, if it is of sums of squares."""
        return self.columns.rule if isinstance(self.columns, Columns) else None

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """What the live columns are of, in order: "term/parameter", "term" or "kind/name"."""
        return tuple(dict.fromkeys(map(layer_of, self.columns.names)))

    def score(self, measured: Measurements) -> Array:
        """Scores (N,), higher = more anomalous.

        Raises:
            ValueError: Other columns than fitted.
        """
        return self.density.score(self.columns(measured))


@dataclass(frozen=True)
class Part:
    """Some columns of what is measured, and the density that they are scored by.

    Attributes:
        kind: ``"values"``: expected and surprise of each term, or its value where no law is known,
            and an image's bits. ``"map"``: what was expected by place, on a grid of 4 by 4.
            ``"expected_norms"``: expected squared gradient norms by layer. ``"log_likelihood"``:
            low likelihood, one-sided. ``"gradient_norms"``: realised squared gradient norms by
            layer, as in the paper. ``"channel_norms"``: these of weights, by groups of input
            channels. ``"output_layer"`` and ``"energies"``: of a denoiser without noise, the last
            layer's gradient expected and realised, and the energies of layers' inputs and of the
            residual's frequencies. ``"condition"``: of one with a null condition, a low gain from
            its own, one-sided.
        density: Of which a copy is fitted; by default :class:`~ood_monitor.TermsAndNorms` of
            gradient norms, a mixture of two Gaussians of values, the log-likelihood itself, and a
            Gaussian with the covariance of Ledoit and Wolf of the others.
        floor: Of expected norms, those by channel and the last layer's: ``"median"``, the default,
            or ``"mean"`` for layers without positions, as of models of a table's rows.

    Raises:
        ValueError: An unknown kind, or a floor of what are no sums of squares.

    Example:
        >>> Part("expected_norms").minimum_samples
        3
    """

    kind: Kind
    density: Density | None = None
    floor: Floor | None = None

    def __post_init__(self) -> None:
        word("a part", self.kind, KINDS)
        if self.density is not None:
            having("density", self.density, "fit", "score")
        if self.floor is not None:
            word("floor", self.floor, get_args(Floor))
        if self.floor is not None and self.kind not in OF_SQUARES:
            raise ValueError(f"Expected no floor of {self.kind!r}, which are no sums of squares.")

    @property
    def minimum_samples(self) -> int:
        """The fewest samples that its density is fitted to."""
        return self._unfitted().minimum_samples

    @property
    def needs_gradients(self) -> bool:
        """Whether it takes a backward pass."""
        return self.kind in OF_GRADIENTS

    def fit(self, measured: Measurements, eps: float) -> FittedPart:
        """Learn from normal samples, computed with machine precision ``eps``.

        Raises:
            ValueError: No column varies, or too few that say something.
        """
        if self.kind == "gradient_norms":
            return self._fit_norms(measured, eps)
        of = KINDS[self.kind]
        columns = Columns.fit(self.kind, measured.tables[self.kind], eps, self.floor or of.floor)
        if len(columns.names) < of.fewest:
            raise ValueError(
                f"Expected at least {of.fewest} columns that vary, got {columns.names} alone."
            )
        density = self._unfitted().fit(clipped(columns(measured)))
        return FittedPart(self.kind, columns, density)

    def _fit_norms(self, measured: Measurements, eps: float) -> FittedPart:
        density = self._unfitted()
        features = Features(LogNorms.fit(measured.features, measured.norms, eps))
        if isinstance(density, TermsAndNorms):
            terms = TermValues.fit(measured.terms, measured.log_likelihood, eps)
            density = density.of(int(terms.live.sum()))
            features = replace(features, terms=terms)
        return FittedPart(self.kind, features, density.fit(features(measured)))

    def _unfitted(self) -> Density:
        return copy.deepcopy(self.density) if self.density else KINDS[self.kind].density()
