r"""Scores for comparison on the same model, from what it gives of a sample.

Each has ``fit(...)`` and ``score(...)`` like a density; higher = more anomalous. By what they take:

- log squared gradient norms by layer (N, F): :class:`TotalNorm`, :class:`LogNormal`,
  :class:`ChiSquare`, :class:`OneClassSVM`, :class:`IsolationForest`;
- a value a level (N, L), as the losses at each noise level, or a term: :class:`DensityOfStates`,
  and :class:`~ood_monitor.densities.GaussianMixture`;
- log-likelihoods (N,): :class:`LowLikelihood`, :class:`Typicality`, :class:`GroupTypicality`, and
  with the bits of a compressor :class:`ComplexityCorrected`.

None of them is recommended: models give unseen data *higher* likelihood, and one total hides the
layers.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from scipy.special import logsumexp, polygamma

from ood_monitor.checks import items, number, seed_of, whole
from ood_monitor.densities import Array, DiagonalGaussian
from ood_monitor.densities.autologging import without_autologging
from ood_monitor.densities.base import check_fitted, checked, checked_fit

__all__ = [
    "ChiSquare",
    "ComplexityCorrected",
    "DensityOfStates",
    "GroupTypicality",
    "IsolationForest",
    "LogNormal",
    "LowLikelihood",
    "OneClassSVM",
    "TotalNorm",
    "Typicality",
    "effective_dof",
]


class LowLikelihood:
    """-log p(x): anomalous where the model gives little density. Of log-likelihoods (N,)."""

    def fit(self, values: Array) -> Self:
        return self

    def score(self, values: Array) -> Array:
        return -np.asarray(values)


class Typicality:
    """``|log p(x) - H|``, with H the mean over in-distribution samples. Of log-likelihoods (N,).

    References:
        Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick
        et al., 2019), https://arxiv.org/abs/1906.02994
    """

    def fit(self, values: Array) -> Self:
        self._mean = float(np.mean(values))
        return self

    def score(self, values: Array) -> Array:
        check_fitted(self, "_mean")
        return np.abs(np.asarray(values) - self._mean)


class GroupTypicality:
    r"""\|mean log p of a group - H\|, in the unit of the log-likelihoods (N,): the test for groups.

    Args:
        group: Samples in a group.
        draws: Groups that are drawn from the fit set for :meth:`threshold`.
        seed: Of the draws.

    Raises:
        ValueError: No samples in a group, or no draws.

    References:
        Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick
        et al., 2019), https://arxiv.org/abs/1906.02994
    """

    def __init__(self, group: int, draws: int = 10_000, seed: int = 0) -> None:
        self._group, self._draws = whole("group", group, 1), whole("draws", draws, 1)
        self._seed = seed_of("seed", seed)
        self.minimum_samples = max(self._group, 2)

    def fit(self, values: Array) -> Self:
        """Fit on log-likelihoods (N,) of in-distribution samples.

        Raises:
            ValueError: Fewer than a group or than 2, not (N,), or not finite.
        """
        values = _checked_values(values, self.minimum_samples)
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite values, got {np.sum(~np.isfinite(values))} not.")
        self._values = values.copy()
        return self

    def score(self, values: Array) -> Array:
        """Scores (N // group,) of consecutive groups; an incomplete last one is left out.

        Raises:
            RuntimeError: Not fitted.
            ValueError: Less than a group, or not (N,).
        """
        check_fitted(self, "_values")
        values = _checked_values(values, self._group)
        complete = values[: len(values) // self._group * self._group]
        means = complete.reshape(-1, self._group).mean(1)
        return np.asarray(np.abs(means - self._values.mean()))

    def threshold(self, fpr: float) -> float:
        """The score that a share ``fpr`` of the groups bootstrapped from the fit set exceeds.

        Raises:
            RuntimeError: Not fitted.
            ValueError: A share outside [1 / draws, 1), which the draws cannot resolve.
        """
        check_fitted(self, "_values")
        fpr = number("fpr", fpr, 1 / self._draws, 1, ends="[)")
        generator = np.random.default_rng(self._seed)
        # One after the other: all draws at once would be large for large groups.
        samples, mean = len(self._values), self._values.mean()
        drawn = (generator.integers(samples, size=self._group) for _ in range(self._draws))
        scores = [abs(self._values[group].mean() - mean) for group in drawn]
        return float(np.quantile(scores, 1 - fpr, method="higher"))


class ComplexityCorrected:
    """-log2 p(x) - complexity, in bits: what the model needs beyond a universal compressor.

    Of log-likelihoods (N,) in nats and of the compressed sizes (N,) in bits, both of whole samples.

    References:
        Input complexity and out-of-distribution detection with likelihood-based generative models
        (Serrà et al., 2020), https://arxiv.org/abs/1909.11480
    """

    def fit(self, log_likelihood: Array, bits: Array) -> Self:
        return self

    def score(self, log_likelihood: Array, bits: Array) -> Array:
        """Scores (N,).

        Raises:
            ValueError: Not (N,), or not as many bits as log-likelihoods.
        """
        log_likelihood, bits = _checked_values(log_likelihood), _checked_values(bits)
        if len(log_likelihood) != len(bits):
            raise ValueError(f"Expected bits of {len(log_likelihood)} samples, got {len(bits)}.")
        return -log_likelihood / math.log(2) - bits


class TotalNorm:
    """log ||grad log p(x)||^2 over all parameters. Of log squared norms by layer (N, F)."""

    def fit(self, features: Array) -> Self:
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(logsumexp(features, axis=1))


class LogNormal:
    """-log density in nats of the squared norms f themselves, of log f by layer (N, F).

    The paper's score is a density of log f, which is larger by the Jacobian f: this one is that
    score + sum_l log f_l, to which small gradients are therefore less anomalous.
    """

    def fit(self, features: Array) -> Self:
        self._gaussian = DiagonalGaussian().fit(features)
        return self

    def score(self, features: Array) -> Array:
        check_fitted(self, "_gaussian")
        return np.asarray(self._gaussian.score(features) + np.sum(features, axis=1))


class ChiSquare:
    """-log density in nats of log f (N, F), for squared norms f_l ~ s_l chi2_k of each layer.

    So a layer would be whose k gradients were independent Normals of one variance. The scale is
    the likeliest, s = mean(f) / k. Of v = log f the density has the Jacobian f; v is the log of a
    Gamma(k / 2) variable of scale 2 s.

    Args:
        dof: k of each layer, its number of parameters; without, :func:`effective_dof`.

    Raises:
        ValueError: Not a list of positive numbers.

    References:
        Approximations to the Fisher Information Metric of Deep Generative Models for
        Out-Of-Distribution Detection (Dauncey et al., 2024), https://arxiv.org/abs/2403.01485
    """

    def __init__(self, dof: Sequence[float] | None = None) -> None:
        of_layers = None if dof is None else items("dof", dof)
        self._given = (
            None
            if of_layers is None
            else np.array(
                [number("dof", each, 0, ends="()") for each in of_layers], dtype=np.float64
            )
        )

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, 2)
        dof = effective_dof(features) if self._given is None else self._given
        if len(dof) != features.shape[1]:
            raise ValueError(f"Expected dof of {features.shape[1]} layers, got {len(dof)}.")
        log_mean = logsumexp(features, axis=0) - math.log(len(features))
        self._dof, self._log_scale = dof, log_mean - np.log(dof)
        return self

    def score(self, features: Array) -> Array:
        check_fitted(self, "_dof")
        from scipy.stats import loggamma

        features = checked(features, self._dof)
        # Squared norms beyond all numbers are infinitely anomalous.
        with np.errstate(over="ignore"):
            log_density = loggamma.logpdf(features, self._dof / 2, self._log_scale + math.log(2))
        return np.asarray(-log_density.sum(1))


def effective_dof(features: Array) -> Array:
    """Degrees of freedom (F,) of the chi-square whose log varies as log squared norms (N, F) do.

    They solve var(log f) = trigamma(k / 2). Far fewer than a layer has parameters say that its
    gradients are no independent Normals of one variance.

    Raises:
        ValueError: Fewer than 2 rows, not (N, F), not finite, or a constant one.

    Example:
        >>> features = np.log(np.random.default_rng(0).chisquare([1, 50], (10_000, 2)))
        >>> effective_dof(features).round()
        array([ 1., 50.])
    """
    variances = checked_fit(features, 2).var(0, ddof=1)
    return np.array([2 * _inverse_trigamma(variance) for variance in variances])


def _inverse_trigamma(value: float) -> float:
    from scipy.optimize import brentq

    # Of 1 / y < trigamma(y) < 1 / y + 1 / y^2, with room for rounding.
    low, high = 0.5 / value, 2 / value + 2
    return float(brentq(lambda y: float(polygamma(1, y)) - value, low, high))


class DensityOfStates:
    """-sum of the log densities in nats of each statistic, (N, S), under a kernel estimate of it.

    Statistics are what a model gives of a sample, such as its likelihood's terms.

    References:
        Density of States Estimation for Out-of-Distribution Detection (Morningstar et al., 2021),
        https://arxiv.org/abs/2006.09273
    """

    minimum_samples = 2

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        from scipy.stats import gaussian_kde

        self._kernels = [gaussian_kde(column) for column in features.T.copy()]
        self._mean = features.mean(0)
        return self

    def score(self, features: Array) -> Array:
        check_fitted(self, "_kernels")
        columns = checked(features, self._mean).T
        pairs = zip(self._kernels, columns, strict=True)
        logs = [kernel.logpdf(column) for kernel, column in pairs]
        return np.asarray(-np.sum(logs, axis=0))


class _ByScikitLearn(abc.ABC):
    """-score_samples of a scikit-learn model of standardised columns (N, F)."""

    minimum_samples = 2

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        with without_autologging():
            self._pipeline = make_pipeline(StandardScaler(), self._model()).fit(features)
        self._mean = features.mean(0)
        return self

    def score(self, features: Array) -> Array:
        check_fitted(self, "_pipeline")
        features = checked(features, self._mean)
        with without_autologging():
            return -np.asarray(self._pipeline.score_samples(features))

    @abc.abstractmethod
    def _model(self) -> Any:
        """The unfitted model."""


class OneClassSVM(_ByScikitLearn):
    """A one-class support vector machine (RBF) on log squared norms by layer (N, F).

    Scores have no unit, and end at 0 far from all that was fitted.

    Args:
        nu: The share of the fit set that may lie outside, in (0, 1].

    Raises:
        ValueError: A share outside (0, 1].

    References:
        Estimating the Support of a High-Dimensional Distribution (Schölkopf et al., 2001),
        https://doi.org/10.1162/089976601750264965
    """

    def __init__(self, nu: float = 0.001) -> None:
        self._nu = number("nu", nu, 0, 1, ends="(]")

    def _model(self) -> Any:
        from sklearn import svm

        return svm.OneClassSVM(nu=self._nu)


class IsolationForest(_ByScikitLearn):
    """How few random splits isolate a sample, in (0, 1), of log squared norms by layer (N, F).

    References:
        Isolation Forest (Liu, Ting, Zhou, 2008), https://doi.org/10.1109/ICDM.2008.17
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed_of("seed", seed, 2**32)  # as scikit-learn has it

    def _model(self) -> Any:
        from sklearn import ensemble

        return ensemble.IsolationForest(random_state=self._seed)


def _checked_values(values: Array, minimum: int = 0) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < minimum:
        raise ValueError(f"Expected at least {minimum} values (N,), got shape {values.shape}.")
    return values
