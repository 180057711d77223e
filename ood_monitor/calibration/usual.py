"""What is usual of layers and places: means and deviations of held-out samples, to explain by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ood_monitor.densities.base import Array
from ood_monitor.densities.features import LogNorms
from ood_monitor.densities.measurements import Explaining

__all__ = ["Usual"]

#: Samples that deviations take more than, and the least of them, relative to their largest: a
#: place that never varies is no surprise.
_FEWEST, _SMALLEST = 1, 1e-6


@dataclass(frozen=True)
class Usual:
    """Means and deviations of held-out samples.

    Attributes:
        count: How many samples they are of.
        layers: "term/parameter" of each live norm, L of them; none if there are no norms.
        floor: Squared norms below this are rounding and count as this, (L,).
        mean: Of the logs of squared norms, (L,).
        sd: Their standard deviations, (L,).
        places: Of each term that comes by element, means and deviations of its surprise by place.
        without: Why there are no norms, in words.
    """

    count: int
    layers: tuple[str, ...] = ()
    floor: Array = field(default_factory=lambda: np.zeros(0))
    mean: Array = field(default_factory=lambda: np.zeros(0))
    sd: Array = field(default_factory=lambda: np.zeros(0))
    places: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    without: str = ""

    @classmethod
    def of(cls, samples: Explaining, eps: float) -> Self:
        """Of samples whose norms were computed with machine precision ``eps``."""
        enough = len(samples) > _FEWEST
        places = {term: _moments(values) for term, values in samples.places.items() if enough}
        if samples.norms is None:
            return cls(len(samples), places=places, without=samples.without)
        try:
            norms = _finite(samples.norms.values)
            live = LogNorms.fit(samples.norms.names, norms, eps)
        except ValueError as error:
            return cls(len(samples), places=places, without=str(error))
        logs = live(norms)
        mean, sd = logs.mean(0), np.maximum(logs.std(0, ddof=1), eps)
        return cls(len(samples), live.live_names, live.floor[live.live], mean, sd, places)

    def dump(self) -> dict[str, Any]:
        """What it is, JSON-able, but for :meth:`arrays`."""
        return {
            "count": self.count,
            "layers": list(self.layers),
            "places": {term: list(mean.shape) for term, (mean, _) in self.places.items()},
            "without": self.without,
        }

    def arrays(self) -> dict[str, Array]:
        """Means and deviations by name."""
        found = {"floor": self.floor, "mean": self.mean, "sd": self.sd}
        for term, (mean, sd) in self.places.items():
            found |= {f"{term}.place_mean": mean, f"{term}.place_sd": sd}
        return found

    @classmethod
    def parse(cls, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> Self:
        """What :meth:`dump` and :meth:`arrays` gave."""
        return cls(
            count=told["count"],
            layers=tuple(told["layers"]),
            floor=arrays["floor"],
            mean=arrays["mean"],
            sd=arrays["sd"],
            places={
                term: (arrays[f"{term}.place_mean"], arrays[f"{term}.place_sd"])
                for term in told["places"]
            },
            without=told["without"],
        )

    def z(self, norms: Mapping[str, Array]) -> Array:
        """Logs of squared norms, (B,) by layer, in deviations from the mean: (B, L)."""
        values = np.stack([norms[layer] for layer in self.layers], 1)
        largest = np.finfo(np.float64).max  # which an overflow counts as
        return np.asarray((np.log(np.clip(values, self.floor, largest)) - self.mean) / self.sd)


def _finite(values: Array) -> Array:
    """Of the samples that are.

    Raises:
        ValueError: There are too few.
    """
    found = values[np.isfinite(values).reshape(len(values), -1).all(1)]
    if len(found) <= _FEWEST:
        raise ValueError(f"Expected {_FEWEST + 1} samples at least, got {len(found)}.")
    return found


def _moments(values: Array) -> tuple[Array, Array]:
    """Of the samples that are finite."""
    values = _finite(values)
    sd = values.std(0, ddof=1)
    least = max(float(sd.max(initial=0.0)) * _SMALLEST, np.finfo(float).tiny)
    return values.mean(0), np.maximum(sd, least)
