"""The larger of several distances: near the best density on every model, whichever that is."""

from typing import Self

import numpy as np

from ood_monitor.densities.base import Array, check_fitted, checked_fit
from ood_monitor.densities.gaussian import ShrunkGaussian
from ood_monitor.densities.held_out import checked_folds, held_out
from ood_monitor.densities.independent import DiagonalGaussian

__all__ = ["Maximum"]


class Maximum:
    """The larger of the log distances under a diagonal and a full Gaussian, each standardised.

    A distance is standardised by its mean and standard deviation over samples that the density
    was not fitted on (cross-fitting in ``folds``), since a full covariance is closer to the samples
    it has seen than to new ones.

    Args:
        folds: Number of folds of the cross-fitting.

    Raises:
        ValueError: Fewer than 2 folds.
    """

    def __init__(self, folds: int = 5) -> None:
        folds = checked_folds(folds)
        self.minimum_samples = 3 * folds
        self._folds = folds

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        distances = np.stack([held_out(p, features, self._folds, _distance) for p in _parts()])
        # All samples may be equally far, in data without noise.
        log = _log(distances)
        self._location, self._scale = log.mean(1), np.maximum(log.std(1, ddof=1), 1e-6)
        self._fitted = tuple(part.fit(features) for part in _parts())
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self._standardised(_squared_distances(self, features)).max(0))

    def contributions(self, features: Array) -> Array:
        distances = _squared_distances(self, features)
        standardised = self._standardised(distances)
        shares = np.stack([part.distance_parts(features) for part in self._fitted])
        # At the very mean no feature deviates: each carries an equal part.
        at_mean = (distances <= np.finfo(float).tiny)[:, :, None]
        shares = np.where(at_mean, 1 / shares.shape[2], shares) / np.where(
            at_mean, 1, distances[:, :, None]
        )
        winner = standardised.argmax(0)
        samples = np.arange(len(winner))
        return np.asarray(shares[winner, samples] * standardised[winner, samples][:, None])

    def state(self) -> dict[str, Array]:
        own = {"location": self._location, "scale": self._scale, "folds": np.array([self._folds])}
        return own | {
            f"{i}.{name}": value
            for i, part in enumerate(self._fitted)
            for name, value in part.state().items()
        }

    def load_state(self, state: dict[str, Array]) -> Self:
        self._location, self._scale = state["location"], state["scale"]
        self._folds = int(state["folds"][0])
        self.minimum_samples = 3 * self._folds
        self._fitted = tuple(
            part.load_state({k[2:]: v for k, v in state.items() if k.startswith(f"{i}.")})
            for i, part in enumerate(_parts())
        )
        return self

    def _standardised(self, distances: Array) -> Array:
        return np.asarray((_log(distances) - self._location[:, None]) / self._scale[:, None])


def _parts() -> tuple[DiagonalGaussian | ShrunkGaussian, ...]:
    return DiagonalGaussian(), ShrunkGaussian("ledoit_wolf")


def _squared_distances(density: Maximum, features: Array) -> Array:
    """(2, N): under the diagonal and under the full Gaussian."""
    check_fitted(density, "_fitted")
    return np.stack([_distance(part, features) for part in density._fitted])


def _distance(part: DiagonalGaussian | ShrunkGaussian, features: Array) -> Array:
    return np.asarray(part.distance_parts(features).sum(1))


def _log(distances: Array) -> Array:
    return np.log(np.maximum(distances, np.finfo(float).tiny))
