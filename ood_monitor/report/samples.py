"""What a report is about beside the detector: held-out samples, and a stream of scored ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ood_monitor.calibration.diagnostics import Diagnosis
from ood_monitor.calibration.scores import Scores
from ood_monitor.densities import Array

__all__ = ["HeldOut", "Stream"]

#: What :func:`~ood_monitor.diagnose` takes for a bad fit, too.
_POOR = 0.2


@dataclass(frozen=True)
class HeldOut:
    """In-distribution samples, to see how well the layers are fitted.

    Attributes:
        z: ``{layer: (N,)}``, deviations in fitted standard deviations.
        diagnosis: What :func:`~ood_monitor.diagnose` says; or why it says nothing, in words; None
            if it was not asked.
    """

    z: Mapping[str, Array]
    diagnosis: Diagnosis | str | None = None

    @classmethod
    def of(cls, scores: Scores, diagnosis: Diagnosis | str | None = None) -> Self:
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

    @property
    def unknown(self) -> list[str]:
        """Layers without any finite deviation, of which nothing can be said."""
        return [name for name, values in self.z.items() if not np.isfinite(values).any()]

    def distances(self) -> dict[str, float]:
        """Kolmogorov-Smirnov distance of each known layer's z from a standard normal."""
        from scipy.stats import kstest

        return {
            name: float(kstest(values[np.isfinite(values)], "norm").statistic)
            for name, values in self._known().items()
        }

    def correlation(self) -> tuple[list[str], Array]:
        """Known layers, L of them, and the correlation between them, (L, L).

        Of the samples in which all of these are finite; no layer if there are fewer than three.
        """
        known = self._known()
        if len(known) < 2:
            return [], np.zeros((0, 0))
        columns = np.stack(list(known.values()))
        columns = columns[:, np.isfinite(columns).all(0)]
        if columns.shape[1] < 3:
            return [], np.zeros((0, 0))
        with np.errstate(invalid="ignore", divide="ignore"):  # of a layer that is constant here
            return list(known), np.nan_to_num(np.atleast_2d(np.corrcoef(columns)))

    def _known(self) -> dict[str, Array]:
        unknown = set(self.unknown)
        return {name: values for name, values in self.z.items() if name not in unknown}


@dataclass(frozen=True)
class Stream:
    """Samples that were scored, in the order in which they came.

    Attributes:
        name: What they are.
        ids: A name for each, N of them.
        score: (N,), nan for a sample that could not be scored.
        p_value: (N,).
        top_layers: The layer of each that deviates most, where it is known.
        groups: (N,), int, the group of each as :class:`~ood_monitor.Scores` has it, where the
            detector has groups; None where it is not known.
        fpr: The false-positive rate by which its file says what is flagged, if it says any.
    """

    name: str
    ids: Sequence[str]
    score: Array
    p_value: Array
    top_layers: Sequence[str | None]
    groups: NDArray[np.int64] | None = None
    fpr: float | None = None

    def __post_init__(self) -> None:
        lengths = [len(self.ids), len(self.score), len(self.p_value), len(self.top_layers)]
        lengths += [] if self.groups is None else [len(self.groups)]
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
