"""Scores that need no gradient features of their own, for comparison on the same model.

Each has ``fit(values)`` and ``score(values)`` like a density; higher = more anomalous. None of them
is recommended: models give unseen data *higher* likelihood, and one total hides the layers.
"""

from typing import Self

import numpy as np
from scipy.special import logsumexp

from ood_monitor.densities import Array

__all__ = ["LowLikelihood", "TotalNorm", "Typicality"]


class LowLikelihood:
    """-log p(x): anomalous where the model gives little density. Of log-likelihoods (N,)."""

    def fit(self, values: Array) -> Self:
        return self

    def score(self, values: Array) -> Array:
        return -np.asarray(values)


class Typicality:
    """|log p(x) - H|, with H the mean over in-distribution samples. Of log-likelihoods (N,).

    References:
        Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick
        et al., 2019), https://arxiv.org/abs/1906.02994
    """

    def fit(self, values: Array) -> Self:
        self._mean = float(np.mean(values))
        return self

    def score(self, values: Array) -> Array:
        if not hasattr(self, "_mean"):
            raise RuntimeError("Expected Typicality to be fitted, got it unfitted.")
        return np.abs(np.asarray(values) - self._mean)


class TotalNorm:
    """log ||grad log p(x)||^2 over all parameters. Of log squared norms by layer (N, F)."""

    def fit(self, features: Array) -> Self:
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(logsumexp(features, axis=1))
