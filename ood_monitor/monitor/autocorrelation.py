"""Whether neighbouring samples of a stream are alike, which the drift test does not expect."""

import logging
from collections.abc import Sequence

import numpy as np

from ood_monitor.calibration.conformal import autocorrelation_bound, lag1_autocorrelation
from ood_monitor.monitor.memory import LARGEST_PART

__all__ = ["Autocorrelation"]

#: Scores that neighbours are compared in, and how sure a warning of them is: it is looked at often.
_SCORES_TO_CORRELATE, _CONFIDENCE = 200, 1 - 1e-6

_log = logging.getLogger(__name__)


class Autocorrelation:
    """Warns once, in the log, of a stream in control whose neighbouring scores are correlated.

    Args:
        stream: The stream's name.
        thin: Every how many scores one is tested for a drift.
    """

    def __init__(self, stream: str, thin: int) -> None:
        self._stream, self._thin, self._has_warned = stream, thin, False

    def look(self, scores: Sequence[float]) -> None:
        """Look at the latest scores, in order."""
        tested = list(scores)[:: self._thin]
        if self._has_warned or len(tested) < _SCORES_TO_CORRELATE:
            return
        finite = np.clip(tested, -LARGEST_PART, LARGEST_PART)
        found, bound = lag1_autocorrelation(finite), autocorrelation_bound(len(tested), _CONFIDENCE)
        if found > bound:
            self._has_warned = True
            _log.warning(
                "Neighbouring scores of stream %r are correlated (%.2f, expected at most %.2f): "
                "drift alarms come more often than promised. Pass `thin=`, or one sample of each "
                "independent unit (a request, a user).",
                self._stream,
                found,
                bound,
            )
