"""What is usual of layers and places: means and deviations of held-out samples, to explain by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ood_monitor.densities.base import Array
from ood_monitor.densities.features import LogNorms
from ood_monitor.densities.measurements import Explaining

__all__ = ["Usual"]

#: The fewest samples that have a deviation, and the least of a place's, relative to the largest: a
#: place that never varies is no surprise.
_FEWEST, _SMALLEST = 2, 1e-6


@dataclass(frozen=True)
class Usual:
    """Means and deviations of held-out samples.

    Attributes:
        count: How many samples they are of.
        norms: Takes logs of the L live squared norms "term/parameter"; None if there are none.
        mean: Of these logs, (L,).
        sd: Their standard deviations, (L,).
        places: Of each term that comes by element, means and deviations of its surprise by place.
        without: Why there are no norms, in words.
    """

    count: int
    norms: LogNorms | None = None
    mean: Array = field(default_factory=lambda: np.zeros(0))
    sd: Array = field(default_factory=lambda: np.zeros(0))
    places: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    without: str = ""

    @classmethod
    def of(cls, samples: Explaining, eps: float) -> Self:
        """Of samples whose norms were computed with machine precision ``eps``."""
        finite = {term: _finite(values) for term, values in samples.places.items()}
        places = {term: _moments(it) for term, it in finite.items() if len(it) >= _FEWEST}
        if samples.norms is None:
            return cls(samples.count, places=places, without=samples.without)
        norms = _finite(samples.norms.values)
        if len(norms) < _FEWEST:
            few = f"finite norms of {len(norms)} of {samples.count} samples"
            return cls(samples.count, places=places, without=few)
        try:
            known = LogNorms.fit(samples.norms.names, norms, eps)
        except ValueError as error:
            return cls(samples.count, places=places, without=str(error))
        logs, live = known(norms), known.live
        return cls(
            samples.count,
            _log_norms(known.live_names, known.floor[live]),
            logs.mean(0),
            np.maximum(logs.std(0, ddof=1), eps),
            places,
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """What the norms are of; nothing if there are none."""
        return () if self.norms is None else self.norms.names

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
        floor = self.mean if self.norms is None else self.norms.floor
        found = {"floor": floor, "mean": self.mean, "sd": self.sd}
        for term, (mean, sd) in self.places.items():
            found |= {f"{term}.place_mean": mean, f"{term}.place_sd": sd}
        return found

    @classmethod
    def parse(cls, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> Self:
        """What :meth:`dump` and :meth:`arrays` gave."""
        layers = tuple(told["layers"])
        return cls(
            count=told["count"],
            norms=_log_norms(layers, arrays["floor"]) if layers else None,
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
        assert self.norms is not None, "asked for layers that `layers` has not"
        logs = self.norms(np.stack([norms[layer] for layer in self.layers], 1))
        return np.asarray((logs - self.mean) / self.sd)


def _log_norms(layers: tuple[str, ...], floor: Array) -> LogNorms:
    """Of layers that are all live."""
    return LogNorms(layers, np.ones(len(layers), dtype=bool), floor, {})


def _finite(values: Array) -> Array:
    """The samples that are."""
    return np.asarray(values[np.isfinite(values).reshape(len(values), -1).all(1)])


def _moments(values: Array) -> tuple[Array, Array]:
    sd = values.std(0, ddof=1)
    least = max(float(sd.max(initial=0.0)) * _SMALLEST, np.finfo(float).tiny)
    return values.mean(0), np.maximum(sd, least)
