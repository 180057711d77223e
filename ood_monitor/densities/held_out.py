"""Scores of samples that a density was not fitted on, when there are no others."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ood_monitor.densities.base import Array, Density

__all__ = ["check_folds", "held_out"]

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


def check_folds(folds: int) -> None:
    """Refuse a number of folds that leaves nothing to fit on.

    Raises:
        ValueError: Fewer than 2.
    """
    if folds < 2:
        raise ValueError(f"Expected at least 2 folds, got {folds}.")
