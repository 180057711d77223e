"""Single samples of a stream, named such that few of those named are normal."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ood_monitor.calibration.conformal import samples_for
from ood_monitor.calibration.scores import Scores
from ood_monitor.checks import number, whole
from ood_monitor.detector.detector import Detector

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Discoveries"]

#: By how much a p-value may round above its threshold, relatively; the next one is further above.
_ROUNDING = 1e-9


class Discoveries:
    r"""Names anomalous samples, a window at a time, by Benjamini and Hochberg's procedure.

    A false-positive rate counts among all samples: where one in a thousand is anomalous, most flags
    at fpr .01 are false. The false-discovery rate counts among those named:

    .. math:: E\left[\frac{\#\text{normal samples named}}{\max(1, \#\text{samples named})}\right]
              \leq \text{fdr}

    of each window, on average over streams and calibration sets. It is a theorem: conformal
    p-values that share their calibration scores are positively dependent (PRDS). It says nothing of
    several windows together: in a window without an anomaly a normal sample is named with
    probability at most ``fdr``, and in a long quiet stream most of those named are such.

    With n calibration scores no p-value is below 1 / (n + 1). A lone anomaly of a window can be
    named only where that is at most ``fdr / window``.

    Args:
        calibration: A fitted detector, or how many scores its p-values are made by. Of groups, one
            must be large enough; a log line names those that are not, in which a lone anomaly is
            not named.
        fdr: The rate promised, in (0, 1).
        window: Valid samples judged together.

    Raises:
        ValueError: A rate outside (0, 1), an empty window, or too few calibration scores for it.
        TypeError: An option of another type.
        RuntimeError: The detector is not fitted.

    References:
        Testing for Outliers with Conformal p-values (Bates, Candès, Lei, Romano, Sesia, 2023),
        https://arxiv.org/abs/2104.08279

    Example:
        >>> import torch
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> images = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> detector = om.Detector(om.LogLikelihood(flow)).fit([images[:400]], progress=False)
        >>> found = om.Discoveries(detector, fdr=0.1, window=20)
        >>> stream = images[400:420].clone()
        >>> stream[7] /= 4
        >>> found.update(detector.score(stream))
        [7]
    """

    def __init__(self, calibration: Detector | int, *, fdr: float = 0.1, window: int = 100) -> None:
        fdr, window = number("fdr", fdr, 0, 1, ends="()"), whole("window", window, 1)
        _check_enough(_count(calibration), fdr, window)
        if isinstance(calibration, Detector):
            calibration.fitted.check_fpr(fdr / window)
        self._fdr, self._window = fdr, window
        self._waiting: list[tuple[int, float]] = []
        self._seen = 0

    def update(self, scores: Scores) -> list[int]:
        """Take in scores, in the order of the stream.

        Returns:
            Which samples of the stream, counted from 0, the windows that are full now name. One
            that could not be scored counts in the stream, is in no window, and is never named.
        """
        for p_value in scores.p_value.tolist():
            if not math.isnan(p_value):
                self._waiting.append((self._seen, p_value))
            self._seen += 1
        named: list[int] = []
        while len(self._waiting) >= self._window:
            named += self._judge(self._window)
        return named

    def flush(self) -> list[int]:
        """Judge what waits as a smaller window of its own, as at the end of a stream.

        The promise holds for it, if when this is called does not depend on the scores.
        """
        return self._judge(len(self._waiting)) if self._waiting else []

    def _judge(self, count: int) -> list[int]:
        judged, self._waiting = self._waiting[:count], self._waiting[count:]
        named = _named(np.array([p_value for _, p_value in judged]), self._fdr)
        return [at for (at, _), is_named in zip(judged, named, strict=True) if is_named]


def _named(p_values: "NDArray[np.float64]", fdr: float) -> "NDArray[np.bool_]":
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p_values, method="bh") <= fdr * (1 + _ROUNDING))


def _count(calibration: Detector | int) -> int:
    if not isinstance(calibration, Detector):
        return whole("calibration", calibration)
    fitted = calibration.fitted
    return fitted.grouped.most if fitted.grouped else len(fitted.calibration.scores)


def _check_enough(count: int, fdr: float, window: int) -> None:
    needed = samples_for(fdr / window)
    if count < needed:
        raise ValueError(
            f"Expected at least {needed} calibration scores, in a group if there are any, to "
            f"name a lone sample of a window of {window} at a rate of {fdr}, got {count}: take "
            f"more held-out samples, or a window of at most {math.floor(fdr * (count + 1))}."
        )
