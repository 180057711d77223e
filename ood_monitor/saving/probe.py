"""Sixteen calibration samples, by name, and what was said of them: to be asked again elsewhere."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Probe", "Verification"]

_COUNT = 16


@dataclass(frozen=True)
class Probe:
    """What a detector said of some calibration samples where it was fitted.

    Attributes:
        samples: SHA-256 of each, 32 hexadecimal digits of it; never the sample.
        scores: Of each.
        groups: Of each, its place among the detector's; 0 without groups.
    """

    samples: tuple[str, ...]
    scores: tuple[float, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(
        cls, samples: Sequence[str], scores: NDArray[np.float64], groups: NDArray[np.int64] | None
    ) -> Self | None:
        """Of n calibration samples: some from the least to the most anomalous; None without names.

        A sample that comes twice is no name of one score, and left out.
        """
        counts = Counter(samples)
        once = [i for i, name in enumerate(samples) if counts[name] == 1]
        if not once:
            return None
        order = np.array(once)[np.argsort(scores[once], kind="stable")]
        chosen = order[np.unique(np.linspace(0, len(order) - 1, _COUNT).round().astype(int))]
        own = np.zeros(len(samples), dtype=np.int64) if groups is None else groups
        return cls(
            tuple(samples[i] for i in chosen),
            tuple(scores[chosen].tolist()),
            tuple(own[chosen].tolist()),
        )

    def dump(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {name: list(getattr(self, name)) for name in ("samples", "scores", "groups")}

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Self:
        """What :meth:`dump` gave."""
        return cls(
            tuple(map(str, told["samples"])),
            tuple(map(float, told["scores"])),
            tuple(map(int, told["groups"])),
        )


@dataclass(frozen=True)
class Verification:
    """How far a detector's p-values here are from those where it was fitted.

    A remembered sample is judged by the other calibration samples, since of itself it would be now
    just above and now just below.

    Attributes:
        found: How many of the remembered samples were among those given.
        remembered: How many there are.
        difference: The largest of their p-values' differences, between 0 and 1.
        steps: The most calibration samples by which a rank among them differs.
    """

    found: int
    remembered: int
    difference: float
    steps: int
