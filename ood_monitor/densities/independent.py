r"""Densities that take layers as independent, on log squared norms v.

With mean mu, standard deviation sd and :math:`z = (v - \mu) / sd` of each layer, in-distribution:

- :class:`DiagonalGaussian`, the paper's: :math:`-\sum_l \log N(v_l; \mu_l, sd_l^2)`;
- :class:`StudentT`: the same with heavier tails;
- :class:`FisherCombination`: :math:`-2 \sum_l \log p_l` of each layer's two-sided p-value.
"""

import math
from typing import Self

import numpy as np
from scipy.special import log_ndtr

from ood_monitor.checks import number
from ood_monitor.densities.base import Array, check_fitted, checked, checked_fit

__all__ = ["DiagonalGaussian", "FisherCombination", "StudentT"]


class _Standardised:
    """What is learned of a mean and a standard deviation by layer."""

    minimum_samples = 2

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        self._mean, self._sd = features.mean(0), features.std(0, ddof=1)
        return self

    def state(self) -> dict[str, Array]:
        return {"mean": self._mean, "sd": self._sd}

    def load_state(self, state: dict[str, Array]) -> Self:
        self._mean, self._sd = state["mean"], state["sd"]
        return self

    def _z(self, features: Array) -> Array:
        """Deviations from the mean, in standard deviations, (N, F)."""
        check_fitted(self, "_mean")
        return np.asarray((checked(features, self._mean) - self._mean) / self._sd)


class DiagonalGaussian(_Standardised):
    """Independent Normals on the log squared norms: the paper's score.

    References:
        Approximations to the Fisher Information Metric of Deep Generative Models for
        Out-Of-Distribution Detection (Dauncey et al., 2024), https://arxiv.org/abs/2403.01485

    Example:
        >>> features = np.random.default_rng(0).normal(size=(100, 3))
        >>> density = DiagonalGaussian().fit(features)
        >>> density.score(np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])).round(1)
        array([2.8, 9.9])
    """

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        parts = self.distance_parts(features)
        return np.asarray(parts / 2 + np.log(self._sd) + 0.5 * math.log(2 * math.pi))

    def distance_parts(self, features: Array) -> Array:
        """Squared standardised deviations (N, F), whose sum is the squared distance."""
        return np.asarray(self._z(features) ** 2)


class StudentT:
    """Independent Student-t laws, each with the tails that its layer's kurtosis asks for.

    Degrees of freedom and scale are those with the sample's variance and kurtosis, nu = 4 + 6 /
    (excess kurtosis), at most ``largest_dof`` where tails are no heavier than a Normal's.

    Args:
        largest_dof: An upper bound on the degrees of freedom.

    References:
        Robust Statistical Modeling Using the t Distribution (Lange, Little, Taylor, 1989),
        https://doi.org/10.1080/01621459.1989.10478852
    """

    minimum_samples = 4

    def __init__(self, largest_dof: float = 1000.0) -> None:
        self._largest_dof = number("largest_dof", largest_dof, 4, ends="()")

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        from scipy.stats import kurtosis

        excess = np.maximum(kurtosis(features, axis=0), 0.0)
        with np.errstate(divide="ignore"):
            self._dof = np.minimum(4 + 6 / excess, self._largest_dof)
        self._mean = features.mean(0)
        self._scale = features.std(0, ddof=1) * np.sqrt((self._dof - 2) / self._dof)
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        check_fitted(self, "_mean")
        from scipy.stats import t

        features = checked(features, self._mean)
        return np.asarray(-t.logpdf(features, self._dof, self._mean, self._scale))

    def state(self) -> dict[str, Array]:
        options = {"largest_dof": np.array([self._largest_dof])}
        return options | {"mean": self._mean, "scale": self._scale, "dof": self._dof}

    def load_state(self, state: dict[str, Array]) -> Self:
        self._mean, self._scale, self._dof = state["mean"], state["scale"], state["dof"]
        self._largest_dof = float(state["largest_dof"][0])
        return self


class FisherCombination(_Standardised):
    """Fisher's combination of each layer's two-sided p-value under a Normal, -2 sum log p.

    (The paper's comparison sums the p-values themselves, which is another statistic.)

    References:
        Statistical Methods for Research Workers (Fisher, 1925), section 21.1.
    """

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        return np.asarray(-2 * (math.log(2) + log_ndtr(-np.abs(self._z(features)))))
