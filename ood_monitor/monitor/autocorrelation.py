"""Whether neighbouring samples of a stream are alike, which the drift test does not expect."""

from collections.abc import Sequence
from dataclasses import dataclass

from ood_monitor.calibration.conformal import autocorrelation_bound, lag1_autocorrelation
from ood_monitor.drift.correlation import expected_run_time

__all__ = ["OFTEN", "ONCE", "Neighbours", "neighbours_of"]

#: How sure it must be that neighbours are alike, where it is looked at once or ever again.
ONCE, OFTEN = 0.999, 1 - 1e-6

#: Samples that neighbours are compared in, at least.
_FEWEST = 10


@dataclass(frozen=True)
class Neighbours:
    """How much neighbouring samples are alike.

    Attributes:
        correlation: Of the ranks of neighbouring tested samples, in (0, 1).
        ert: The run time to a false alarm, in tested samples, to be expected if neighbours were as
            much alike while nothing is wrong.
        promised: What was promised of samples that are not.
    """

    correlation: float
    ert: float
    promised: float

    def __str__(self) -> str:
        """What an alert says of it."""
        return (
            f"Neighbouring samples are alike (correlation {self.correlation:.2f}): the change is "
            f"still going on, or they always are, and then an alarm comes every {self.ert:,.0f} "
            f"samples or so in place of {self.promised:,.0f}."
        )


def neighbours_of(ranks: Sequence[float], ert: float, confidence: float) -> Neighbours | None:
    """How much neighbours are alike, by the drift test's own ranks; None if it may be chance.

    Args:
        ranks: Of the tested samples since the test last began, in order.
        ert: The run time that was promised.
        confidence: How sure it must be.
    """
    if len(ranks) < _FEWEST:
        return None
    found = lag1_autocorrelation(ranks)
    if found <= autocorrelation_bound(len(ranks), confidence):
        return None
    return Neighbours(found, expected_run_time(ert, found), ert)
