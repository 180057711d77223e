"""What a report is about beside the detector: held-out samples, and a stream of scored ones."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ood_monitor.calibration.diagnostics import Diagnosis
from ood_monitor.calibration.scores import Scores
from ood_monitor.densities import Array
from ood_monitor.drift.e_detector import EDetector
from ood_monitor.saving.fitted import Fitted

__all__ = ["Drift", "HeldOut", "Stream", "drift_of"]

#: Samples without an alarm after which the next one is news, as a monitor's `recovery`.
_RECOVERY = 500

#: What :func:`~ood_monitor.diagnose` takes for a bad fit, too.
_POOR = 0.2


@dataclass(frozen=True)
class HeldOut:
    """In-distribution samples, to see how well the layers are fitted.

    Attributes:
        z: ``{layer: (N,)}``, deviations in fitted standard deviations.
        diagnosis: What :func:`~ood_monitor.diagnose` says, if it was asked.
    """

    z: Mapping[str, Array]
    diagnosis: Diagnosis | None = None

    @classmethod
    def of(cls, scores: Scores, diagnosis: Diagnosis | None = None) -> Self:
        """Of scored samples, the valid ones."""
        valid = scores.valid.numpy()
        return cls({name: z.numpy()[valid] for name, z in scores.z.items()}, diagnosis)

    @property
    def count(self) -> int:
        """Samples."""
        return min((len(z) for z in self.z.values()), default=0)

    @property
    def limit(self) -> float:
        """Kolmogorov-Smirnov distance above which a layer counts as badly fitted.

        With few samples, what one of a hundred well fitted layers exceeds by chance.
        """
        from scipy.stats import kstwo

        return max(_POOR, float(kstwo.isf(0.01, max(self.count, 1))))

    def distances(self) -> dict[str, float]:
        """Kolmogorov-Smirnov distance of each layer's z from a standard normal."""
        from scipy.stats import kstest

        return {
            name: float(kstest(values[np.isfinite(values)], "norm").statistic)
            for name, values in self.z.items()
        }

    def correlation(self) -> Array:
        """Between layers, (L, L)."""
        matrix = np.atleast_2d(np.corrcoef(np.stack(list(self.z.values()))))
        return np.nan_to_num(matrix)


@dataclass(frozen=True)
class Stream:
    """Samples that were scored, in the order in which they came.

    Attributes:
        name: What they are.
        ids: A name for each, N of them.
        score: (N,), nan for a sample that could not be scored.
        p_value: (N,).
        top_layers: The layer of each that deviates most, where it is known.
    """

    name: str
    ids: Sequence[str]
    score: Array
    p_value: Array
    top_layers: Sequence[str | None]

    def __post_init__(self) -> None:
        lengths = [len(self.ids), len(self.score), len(self.p_value), len(self.top_layers)]
        if len(set(lengths)) > 1:
            raise ValueError(f"Expected one value of each kind a sample, got {lengths}.")

    @property
    def valid(self) -> np.ndarray:
        """Which could be scored, (N,), bool."""
        return ~np.isnan(self.score)

    def flagged(self, fpr: float) -> list[int]:
        """Indices of the samples with a p-value of at most fpr, the smallest first."""
        found = np.flatnonzero(self.p_value <= fpr)
        return [int(i) for i in found[np.argsort(self.p_value[found], kind="stable")]]

    def counted_layers(self, fpr: float, most: int) -> dict[str, int]:
        """Flagged samples by the layer that deviates most, for so many layers."""
        layers = (self.top_layers[i] for i in self.flagged(fpr))
        return dict(Counter(layer for layer in layers if layer).most_common(most))


@dataclass(frozen=True)
class Drift:
    """What the drift test says of a stream.

    Attributes:
        log_e_values: After each valid sample.
        alarms: Valid samples seen at each alarm that is news.
    """

    log_e_values: Array
    alarms: tuple[int, ...]


def drift_of(fitted: Fitted, stream: Stream, ert: float) -> Drift:
    """The drift test on a stream, as a :class:`~ood_monitor.Monitor` makes it.

    Raises:
        ValueError: An ``ert`` below 2.
    """
    test = EDetector(fitted.calibration.scores, ert=ert)
    values: list[float] = []
    alarms: list[int] = []
    last = -math.inf
    for seen, score in enumerate(stream.score[stream.valid].tolist(), 1):
        evidence = test.update(score)
        values.append(evidence.log_e_value)
        if evidence.alarm:
            if seen - last > _RECOVERY:
                alarms.append(seen)
            last = seen
            test.restart()
    return Drift(np.array(values), tuple(alarms))
