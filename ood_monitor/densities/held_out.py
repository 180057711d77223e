"""Scores of samples that a density was not fitted on, when there are no others."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ood_monitor.checks import whole
from ood_monitor.densities.base import Array, Density

__all__ = ["checked_folds", "held_out"]

D = TypeVar("D", bound=Density)


def held_out(density: D, features: Array, folds: int, score: Callable[[D, Array], Array]) -> Array:
    """Scores (N,) of features (N, F), each by a fit to the other folds; in the folds' order.

    Features that do not vary among those that are fitted on are left out for the fold.

    Raises:
        ValueError: In one fold no feature varies.
    """
    fold = np.arange(len(features)) % folds
    pieces = [_unseen(density, features, fold == k, score) for k in range(folds)]
    return np.concatenate(pieces)


def _unseen(
    density: D, features: Array, unseen: np.ndarray, score: Callable[[D, Array], Array]
) -> Array:
    seen = features[~unseen]
    varies = np.ptp(seen, axis=0) > 0
    if not varies.any():
        raise ValueError(
            f"Expected features that vary in every fold, got none among {len(seen)} of "
            f"{len(features)} samples: fit on more samples."
        )
    return score(density.fit(seen[:, varies]), features[unseen][:, varies])


def checked_folds(folds: int) -> int:
    """A number of folds, of which each leaves something to fit on.

    Raises:
        ValueError: Fewer than 2.
        TypeError: No whole number.
    """
    return whole("folds", folds, 2)
