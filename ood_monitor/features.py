"""From squared gradient norms to the features that a density sees: logs of the live ones.

A layer can be *constant*, its gradient the same for every sample, or numerically *dead*: zero in
theory and rounding noise in practice, such as an attention's key bias, which a softmax ignores.
Such norms differ between any two correct programs and would be the loudest features of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from ood_monitor.densities import Array

__all__ = ["LogNorms", "layer_of", "table"]


def table(norms: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Array]:
    """Norms as (names, array (N, F)); a layer given by rows has features ``layer[i]``."""
    names: list[str] = []
    columns: list[Array] = []
    for layer, values in norms.items():
        by_row = values.ndim == 2
        names += [f"{layer}[{i}]" for i in range(values.shape[1])] if by_row else [layer]
        array = values.detach().double().cpu().numpy()
        columns.append(array if by_row else array[:, None])
    return tuple(names), np.concatenate(columns, axis=1)


def layer_of(feature: str) -> str:
    """The layer, "term/parameter", that a feature belongs to."""
    return feature.removesuffix("]").rsplit("[", 1)[0] if feature.endswith("]") else feature


@dataclass(frozen=True)
class LogNorms:
    """Logs of the live features, fitted on in-distribution norms and then frozen.

    Attributes:
        names: All features, F of them.
        live: Which are kept, (F,), bool.
        floor: Norms below this are rounding and count as this, (F,).
        dropped: Why each other feature was left out, "constant", "dead" or "not finite".
    """

    names: tuple[str, ...]
    live: np.ndarray
    floor: Array
    dropped: dict[str, str]

    @classmethod
    def fit(cls, names: tuple[str, ...], norms: Array, eps: float) -> Self:
        """Look at in-distribution norms (N, F), computed with machine precision ``eps``.

        A feature is dead if its median is below (32 eps)^2 of the largest in its term: a norm that
        small is made of rounding errors of the numbers that the others are made of.

        Raises:
            ValueError: No feature is live.
        """
        finite = np.isfinite(norms).all(0)
        norms = np.where(finite, norms, 0.0)
        median = np.median(norms, axis=0)
        terms = np.array([name.split("/", 1)[0] for name in names])
        largest = {term: median[terms == term].max() for term in dict.fromkeys(terms)}
        reason = {
            "not finite": ~finite,
            "dead": median <= (32 * eps) ** 2 * np.array([largest[term] for term in terms]),
            "constant": np.ptp(norms, axis=0) <= 8 * eps * median,
        }
        dropped = {
            names[i]: next(why for why, where in reason.items() if where[i])
            for i in np.flatnonzero(np.any(list(reason.values()), axis=0))
        }
        live = np.array([name not in dropped for name in names])
        if not live.any():
            counts = {why: int(where.sum()) for why, where in reason.items()}
            raise ValueError(f"Expected layers whose gradient norms vary, got none: {counts}.")
        return cls(names, live, np.maximum(median * eps**2, np.finfo(float).tiny), dropped)

    def __call__(self, norms: Array) -> Array:
        """Log f of the live features, (N, live)."""
        largest = np.finfo(np.float64).max  # which an overflow counts as
        return np.log(np.clip(norms[:, self.live], self.floor[self.live], largest))

    @property
    def live_names(self) -> tuple[str, ...]:
        """Names of the live features, in order."""
        return tuple(name for name, live in zip(self.names, self.live, strict=True) if live)

    @property
    def live_layers(self) -> tuple[str, ...]:
        """The layers with at least one live feature, in module order within terms."""
        return tuple(dict.fromkeys(map(layer_of, self.live_names)))
