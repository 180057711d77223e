r"""Gaussians with a full covariance of the standardised log squared norms, kept by its axes.

From N samples of F features at most N axes can be known. A covariance

.. math:: \Sigma = \sum_j v_j a_j a_j^\top + v_0 (I - \sum_j a_j a_j^\top)

with r = min(N, F) of them is stored in r F numbers and gives :math:`\Sigma^{-1} z` in O(r F)
operations (Woodbury's identity), where the F squared of a precision matrix would be 170 MB for a
small VAE's rows.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, get_args

import numpy as np

from ood_monitor.checks import number, word
from ood_monitor.densities.autologging import without_autologging
from ood_monitor.densities.base import Array, check_fitted, checked, checked_fit

__all__ = ["PrincipalGaussian", "Shrinkage", "ShrunkGaussian"]

#: How much a covariance is shrunk to a multiple of the identity: by a rule, or in (0, 1].
Shrinkage: TypeAlias = Literal["ledoit_wolf", "oas", "leave_one_out"] | float

_RULES: tuple[Literal["ledoit_wolf", "oas", "leave_one_out"], ...] = get_args(
    get_args(Shrinkage)[0]
)

#: The amounts of shrinkage that are compared.
_GRID = np.logspace(-4, 0, 41)


@dataclass(frozen=True)
class _Covariance:
    """A covariance by its axes.

    Attributes:
        axes: Orthonormal, (r, F).
        variances: Along them, (r,).
        rest: Along all other directions.
    """

    axes: Array
    variances: Array
    rest: float

    def solve(self, z: Array) -> Array:
        """The inverse covariance times z, (N, F)."""
        # Without other directions their variance is none of the matrix's.
        base = 1 / self.rest if self._others else 0.0
        return np.asarray(base * z + ((z @ self.axes.T) * (1 / self.variances - base)) @ self.axes)

    @property
    def log_determinant(self) -> float:
        others = self._others * math.log(self.rest) if self._others else 0.0
        return float(np.log(self.variances).sum()) + others

    @property
    def _others(self) -> int:
        return int(self.axes.shape[1]) - len(self.axes)


class _Gaussian:
    """What a fitted mean, standard deviation and covariance give."""

    _mean: Array
    _sd: Array
    _covariance: _Covariance

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        # The normalising constant belongs to no feature: each carries an equal part.
        parts = self.distance_parts(features)
        log_determinant = self._covariance.log_determinant + 2 * np.log(self._sd).sum()
        constant = log_determinant / len(self._sd) + math.log(2 * math.pi)
        return np.asarray((parts + constant) / 2)

    def distance_parts(self, features: Array) -> Array:
        """z_l (inverse covariance z)_l, (N, F), whose sum is the squared Mahalanobis distance."""
        check_fitted(self, "_mean")
        z = (checked(features, self._mean) - self._mean) / self._sd
        return np.asarray(z * self._covariance.solve(z))

    def state(self) -> dict[str, Array]:
        covariance = self._covariance
        return {
            "mean": self._mean,
            "sd": self._sd,
            "axes": covariance.axes,
            "variances": covariance.variances,
            "rest": np.array([covariance.rest]),
        }

    def load_state(self, state: dict[str, Array]) -> Self:
        self._mean, self._sd = state["mean"], state["sd"]
        self._covariance = _Covariance(state["axes"], state["variances"], float(state["rest"][0]))
        return self


class ShrunkGaussian(_Gaussian):
    """A Gaussian whose covariance is shrunk to a multiple of the identity.

    Half-way between independent layers, as in the paper, and what their correlations say: what is
    best for estimating a covariance is not best for detecting, and on the three models of
    ``benchmarks/detection/densities.py`` half was near the best there is.

    Args:
        shrinkage: A number in (0, 1]; or a rule: ``"ledoit_wolf"`` and ``"oas"`` estimate what is
            nearest to the true covariance, ``"leave_one_out"`` takes what gives each sample the
            highest likelihood under a fit to the others, in closed form.

    Raises:
        ValueError: An unknown rule, or a number outside (0, 1].

    References:
        | A well-conditioned estimator for large-dimensional covariance matrices (Ledoit, Wolf,
          2004)
        | https://doi.org/10.1016/S0047-259X(03)00096-4
        | Shrinkage Algorithms for MMSE Covariance Estimation (Chen, Wiesel, Eldar, Hero, 2010)
        | https://arxiv.org/abs/0907.4698
        | Covariance matrix estimation and classification with limited training data (Hoffbeck,
          Landgrebe, 1996)
        | https://doi.org/10.1109/34.506799
    """

    minimum_samples = 3

    def __init__(self, shrinkage: Shrinkage = 0.5) -> None:
        self._shrinkage: Shrinkage = (
            word("shrinkage", shrinkage, _RULES)
            if isinstance(shrinkage, str)
            else number("shrinkage", shrinkage, 0, 1, ends="(]")
        )

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        self._mean, self._sd = features.mean(0), features.std(0, ddof=1)
        z = (features - self._mean) / self._sd
        axes, variances = _axes(z)
        mean_variance = variances.sum() / z.shape[1]
        shrinkage = _amount(self._shrinkage, z, axes, variances)
        rest = shrinkage * mean_variance
        self._covariance = _Covariance(axes, (1 - shrinkage) * variances + rest, rest)
        return self

    def state(self) -> dict[str, Array]:
        rule = isinstance(self._shrinkage, str)
        # Rules are the whole numbers after the amounts, which end at 1.
        code = 2 + _RULES.index(self._shrinkage) if rule else float(self._shrinkage)
        return super().state() | {"shrinkage": np.array([float(code)])}

    def load_state(self, state: dict[str, Array]) -> Self:
        code = float(state["shrinkage"][0])
        self._shrinkage = _RULES[int(code) - 2] if code > 1 else code
        return super().load_state(state)


class PrincipalGaussian(_Gaussian):
    """A Gaussian of principal components, with one variance for all that they leave.

    Args:
        explained: The share of the variance that the components kept explain, in (0, 1).

    Raises:
        ValueError: A share outside (0, 1).

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999),
        https://doi.org/10.1111/1467-9868.00196
    """

    minimum_samples = 3

    def __init__(self, explained: float = 0.9) -> None:
        self._explained = number("explained", explained, 0, 1, ends="()")

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        self._mean, self._sd = features.mean(0), features.std(0, ddof=1)
        z = (features - self._mean) / self._sd
        axes, variances = _axes(z)
        share = np.cumsum(variances) / variances.sum()
        kept = min(int(np.searchsorted(share, self._explained)) + 1, z.shape[1])
        left, others = variances[kept:].sum(), z.shape[1] - kept
        # Components may explain all that there is, up to rounding.
        rest = max(left / others, np.finfo(float).eps) if others else 1.0
        self._covariance = _Covariance(axes[:kept], variances[:kept], rest)
        return self

    def state(self) -> dict[str, Array]:
        return super().state() | {"explained": np.array([self._explained])}

    def load_state(self, state: dict[str, Array]) -> Self:
        self._explained = float(state["explained"][0])
        return super().load_state(state)


def _axes(z: Array) -> tuple[Array, Array]:
    """Principal axes (r, F) of centred samples and the variances along them (r,), falling."""
    _, singular, axes = np.linalg.svd(z / math.sqrt(len(z)), full_matrices=False)
    return axes, singular**2


def _amount(shrinkage: Shrinkage, z: Array, axes: Array, variances: Array) -> float:
    from sklearn.covariance import ledoit_wolf_shrinkage, oas

    if shrinkage == "ledoit_wolf":
        with without_autologging():
            amount = float(ledoit_wolf_shrinkage(z, assume_centered=True))
    elif shrinkage == "oas":
        with without_autologging():
            amount = float(oas(z, assume_centered=True)[1])
    elif shrinkage == "leave_one_out":
        amount = _leave_one_out(z, axes, variances)
    else:
        amount = float(shrinkage)
    # None at all leaves directions without any variance.
    return max(amount, float(_GRID[0]) if len(axes) <= z.shape[1] else 0.0)


def _leave_one_out(z: Array, axes: Array, variances: Array) -> float:
    """The shrinkage of the grid under which samples are likeliest, each given the others."""
    n, features = z.shape
    squares = (z @ axes.T) ** 2
    outside = np.maximum((z**2).sum(1) - squares.sum(1), 0.0)
    mean_variance = variances.sum() / features

    def log_likelihood(shrinkage: float) -> float:
        weight, rest = (1 - shrinkage) / (n - 1), shrinkage * mean_variance
        # The covariance of all samples, from which one is taken by a change of rank one.
        shrunk = n * weight * variances + rest
        distance = (squares / shrunk).sum(1) + outside / rest
        taken = 1 - weight * distance
        if (taken <= 0).any():
            return -math.inf
        log_determinant = np.log(shrunk).sum() + (features - len(axes)) * math.log(rest)
        return float(-(log_determinant + np.log(taken) + distance / taken).sum())

    return float(max(_GRID, key=log_likelihood))
