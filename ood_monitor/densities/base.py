"""What a density is, and the checks that all of them make."""

from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Density", "check_fitted", "checked", "checked_fit"]

#: A NumPy array of float64.
Array: TypeAlias = NDArray[np.float64]


class Density(Protocol):
    """What a detector asks of a density. Hold no state before :meth:`fit` but what was given."""

    minimum_samples: int

    def fit(self, features: Array) -> Self:
        """Fit on features (N, F) of in-distribution samples.

        Raises:
            ValueError: Fewer than ``minimum_samples``, not (N, F), not finite, or a constant one.
        """

    def score(self, features: Array) -> Array:
        """Scores (N,), higher = more anomalous, of features (N, F).

        Raises:
            RuntimeError: Not fitted.
            ValueError: Another number of features than fitted.
        """

    def contributions(self, features: Array) -> Array:
        """Each feature's part of the score, (N, F); a row adds up to its score."""

    def state(self) -> dict[str, Array]:
        """What :meth:`fit` learned, as named arrays."""

    def load_state(self, state: dict[str, Array]) -> Self:
        """Take over what :meth:`state` gave."""


def check_fitted(density: object, attribute: str) -> None:
    """Refuse a density that has not learned the attribute.

    Raises:
        RuntimeError: It has not.
    """
    if not hasattr(density, attribute):
        raise RuntimeError(f"Expected {type(density).__name__} to be fitted, got it unfitted.")


def checked(features: Array, mean: Array) -> Array:
    """Features (N, F), of as many columns as the mean (F,).

    Raises:
        ValueError: Of another shape.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[1] != len(mean):
        raise ValueError(f"Expected features (N, {len(mean)}), got shape {features.shape}.")
    return features


def checked_fit(features: Array, minimum: int) -> Array:
    """Features (N, F) that are fit to fit on.

    Raises:
        ValueError: As :meth:`Density.fit`.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < minimum:
        raise ValueError(f"Expected at least {minimum} rows (N, F), got shape {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError(
            f"Expected finite features, got {int((~np.isfinite(features)).sum())} not."
        )
    constant = np.flatnonzero(np.ptp(features, axis=0) == 0)
    if len(constant):
        raise ValueError(f"Expected features that vary, got constant columns {constant.tolist()}.")
    return features
