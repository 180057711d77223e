"""Gradient norms and the likelihood's own terms together: what one misses the other sees."""

from typing import Self

import numpy as np
from scipy.special import entr, softmax

from ood_monitor.checks import whole
from ood_monitor.densities.base import Array, Density, check_fitted, checked_fit
from ood_monitor.densities.gaussian import ShrunkGaussian
from ood_monitor.densities.held_out import checked_folds, held_out
from ood_monitor.densities.mixture import GaussianMixture

__all__ = ["TermsAndNorms"]


class TermsAndNorms:
    r"""Two scores as one: of the log norms, and of the likelihood's terms. The default.

    The norms are scored by :class:`~ood_monitor.ShrunkGaussian`, the terms' values, in nats, by
    :class:`~ood_monitor.densities.GaussianMixture`. Each score less its mean, over its standard
    deviation, over samples that it was not fitted on (cross-fitting in ``folds``) is :math:`z_k`,
    and the score is :math:`\log \sum_k e^{z_k}`: a smooth maximum, so that terms which look all too
    normal, as likelihoods of foreign data do, cannot speak for a sample whose gradients are
    strange.

    The norms are the same however the data are represented; the terms' values are not. Without
    terms the score is that of the norms.

    Features are (N, T + F): the values of ``terms`` terms, then the log norms. A detector sets
    ``terms`` to what the model has.

    Args:
        terms: T, the leading columns that are values of terms. It may be 0.
        folds: Number of folds of the cross-fitting.

    Raises:
        ValueError: A negative number of terms, or fewer than 2 folds.
    """

    def __init__(self, terms: int = 0, folds: int = 5) -> None:
        terms, folds = whole("terms", terms), checked_folds(folds)
        self.minimum_samples = 3 * folds
        self._terms, self._folds = terms, folds

    def of(self, terms: int) -> Self:
        """The same, unfitted, for another number of terms."""
        return type(self)(terms, self._folds)

    def fit(self, features: Array) -> Self:
        blocks = self._blocks(checked_fit(features, self.minimum_samples))
        scores = np.stack(
            [held_out(_part(kind), block, self._folds, _score) for kind, block in blocks.items()]
        )
        # All samples may be equally far, in data without noise.
        self._location, self._scale = scores.mean(1), np.maximum(scores.std(1, ddof=1), 1e-6)
        self._fitted = {kind: _part(kind).fit(block) for kind, block in blocks.items()}
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        check_fitted(self, "_fitted")
        blocks = self._blocks(features)
        parts = [self._fitted[kind].contributions(block) for kind, block in blocks.items()]
        parts = list(map(_standardised, parts, self._location, self._scale))
        z = np.stack([part.sum(1) for part in parts], 1)
        weights = softmax(z, axis=1)
        # log sum exp z = sum w z + the entropy of w, which belongs to no feature.
        entropy = entr(weights).sum(1) / sum(part.shape[1] for part in parts)
        weighted = [weight[:, None] * part for weight, part in zip(weights.T, parts, strict=True)]
        return np.asarray(np.hstack(weighted) + entropy[:, None])

    def state(self) -> dict[str, Array]:
        own = {"location": self._location, "scale": self._scale}
        own["sizes"] = np.array([float(self._terms), float(self._folds)])
        return own | {
            f"{kind}.{name}": value
            for kind, part in self._fitted.items()
            for name, value in part.state().items()
        }

    def load_state(self, state: dict[str, Array]) -> Self:
        self._location, self._scale = state["location"], state["scale"]
        self._terms, self._folds = map(int, state["sizes"])
        self.minimum_samples = 3 * self._folds
        self._fitted = {
            kind: _part(kind).load_state(
                {k.removeprefix(f"{kind}."): v for k, v in state.items() if k.startswith(kind)}
            )
            for kind in self._kinds
        }
        return self

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("terms", "norms") if self._terms else ("norms",)

    def _blocks(self, features: Array) -> dict[str, Array]:
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or features.shape[1] <= self._terms:
            raise ValueError(
                f"Expected features (N, T + F) of {self._terms} terms and of norms, got shape "
                f"{features.shape}."
            )
        parts = np.split(features, [self._terms], axis=1)
        return dict(zip(self._kinds, parts[-len(self._kinds) :], strict=True))


def _part(kind: str) -> Density:
    return GaussianMixture() if kind == "terms" else ShrunkGaussian()


def _score(density: Density, features: Array) -> Array:
    return density.score(features)


def _standardised(contributions: Array, location: float, scale: float) -> Array:
    # The location belongs to no feature: each carries an equal part.
    return np.asarray((contributions - location / contributions.shape[1]) / scale)
