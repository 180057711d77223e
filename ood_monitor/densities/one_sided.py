"""Anomalous below alone: for what has no paradox, as the likelihood of a table's rows."""

from typing import Self

import numpy as np

from ood_monitor.densities.base import Array, check_fitted, checked, checked_fit

__all__ = ["OneSided"]


class OneSided:
    """The sum of columns, each less its mean in standard deviations, with the sign turned.

    Of a log-likelihood it orders samples as ``-log p`` does.
    """

    minimum_samples = 2

    def fit(self, features: Array) -> Self:
        features = checked_fit(features, self.minimum_samples)
        self._mean, self._sd = features.mean(0), features.std(0, ddof=1)
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        check_fitted(self, "_mean")
        return np.asarray((self._mean - checked(features, self._mean)) / self._sd)

    def state(self) -> dict[str, Array]:
        return {"mean": self._mean, "sd": self._sd}

    def load_state(self, state: dict[str, Array]) -> Self:
        self._mean, self._sd = state["mean"], state["sd"]
        return self
