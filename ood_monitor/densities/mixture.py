"""A mixture of Gaussians, for a few features: the values of a likelihood's terms."""

import math
from typing import Self

import numpy as np
from scipy.special import logsumexp, softmax

from ood_monitor.checks import number, seed_of, whole
from ood_monitor.densities.autologging import without_autologging
from ood_monitor.densities.base import Array, check_fitted, checked, checked_fit

__all__ = ["GaussianMixture"]

#: Deviations count as at most this, in standard deviations, so that their squares are finite.
_FURTHEST = 1e100


class GaussianMixture:
    """-log density in nats of a mixture of Gaussians, fitted to standardised features.

    Of the losses at each noise level it is the score of multiscale score matching.

    Args:
        components: Gaussians in the mixture.
        regularisation: Variance that is added to each standardised feature.
        seed: Of the mixture's start.

    Raises:
        ValueError: No component, or a negative regularisation.

    References:
        Multiscale Score Matching for Out-of-Distribution Detection (Mahmood, Oliva, Styner, 2021),
        https://arxiv.org/abs/2010.13132
    """

    def __init__(self, components: int = 2, regularisation: float = 0.03, seed: int = 0) -> None:
        self._components, self._seed = (
            whole("components", components, 1),
            seed_of("seed", seed, 2**32),
        )
        self._regularisation = number("regularisation", regularisation, 0, ends="[)")
        self.minimum_samples = self._components + 1

    def fit(self, features: Array) -> Self:
        from sklearn import mixture

        features = checked_fit(features, self.minimum_samples)
        self._mean, self._sd = features.mean(0), features.std(0)
        model = mixture.GaussianMixture(
            self._components,
            reg_covar=self._regularisation,
            max_iter=1000,
            random_state=self._seed,
        )
        with without_autologging():
            fitted = model.fit((features - self._mean) / self._sd)
        self._weights, self._centres = fitted.weights_, fitted.means_
        self._precisions_cholesky = fitted.precisions_cholesky_
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        # Each Gaussian speaks with its share of the sample; what is left of the score, its
        # constants and the mixture's own, belongs to no feature: each carries an equal part.
        parts, log_density = self._by_component(features)
        shares = softmax(log_density, axis=1)
        spoken = (shares[:, :, None] * parts).sum(1)
        score = np.log(self._sd).sum() - logsumexp(log_density, axis=1)
        return np.asarray(spoken + (score - spoken.sum(1))[:, None] / spoken.shape[1])

    def state(self) -> dict[str, Array]:
        return {
            "mean": self._mean,
            "sd": self._sd,
            "weights": self._weights,
            "centres": self._centres,
            "precisions_cholesky": self._precisions_cholesky,
            "options": np.array([float(self._regularisation), float(self._seed)]),
        }

    def load_state(self, state: dict[str, Array]) -> Self:
        self._mean, self._sd = state["mean"], state["sd"]
        self._weights, self._centres = state["weights"], state["centres"]
        self._precisions_cholesky = state["precisions_cholesky"]
        self._components = len(self._weights)
        self.minimum_samples = self._components + 1
        self._regularisation, self._seed = float(state["options"][0]), int(state["options"][1])
        return self

    def _by_component(self, features: Array) -> tuple[Array, Array]:
        """Parts of half the squared distances, (N, K, F), and log w_k N_k of z, (N, K)."""
        check_fitted(self, "_mean")
        z = (checked(features, self._mean) - self._mean) / self._sd
        offsets = z.clip(-_FURTHEST, _FURTHEST)[:, None] - self._centres
        roots = self._precisions_cholesky
        whitened = np.einsum("nkf,kfg->nkg", offsets, roots)
        parts = offsets * np.einsum("nkg,kfg->nkf", whitened, roots) / 2
        log_determinant = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)
        constant = np.log(self._weights) + log_determinant - z.shape[1] / 2 * math.log(2 * math.pi)
        return parts, constant - (whitened**2).sum(2) / 2
