"""What a drift test knows after a sample, and what it may promise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ood_monitor.checks import number

__all__ = ["Cause", "Evidence", "checked_ert", "pooled_log_e_value"]

Cause: TypeAlias = Literal["data", "mix"]


@dataclass(frozen=True, slots=True)
class Evidence:
    r"""What is known after one sample.

    Attributes:
        p_value: The sequential smoothed rank :math:`p_n`, in (0, 1]; small = anomalous.
        log_e_value: :math:`\log R_n` in nats, of the average Shiryaev-Roberts sum.
        alarm: Whether :math:`R_n` is at least the expected run time asked for.
        n: Samples since the start of this episode, this one included.
        cause: What most of the evidence is of: the data, or the mix of groups.
    """

    p_value: float
    log_e_value: float
    alarm: bool
    n: int
    cause: Cause = "data"


def pooled_log_e_value(log_e_values: Iterable[float]) -> float:
    r"""Returns the log of the mean e-value of several workers, each with a stream of its own.

    An average of e-detectors is one: alarming when it is at least ``log(ert)`` promises ``ert``
    samples a worker, on average over workers, to a false alarm. It sees at once what they see
    together, where each alone would still wait.

    Args:
        log_e_values: Each worker's latest :attr:`Evidence.log_e_value`, in nats; -inf before its
            first sample.

    Returns:
        The log of their mean, in nats.

    Raises:
        ValueError: If there is none, or one is nan.
    """
    values = np.array(list(log_e_values), dtype=np.float64)
    if not len(values) or np.isnan(values).any():
        raise ValueError(f"Expected log e-values of at least one worker, got {values.tolist()}.")
    return float(np.logaddexp.reduce(values) - math.log(len(values)))


def checked_ert(ert: float) -> float:
    """Returns an expected run time that a test can promise.

    Raises:
        ValueError: If it is below 2 or not finite.
        TypeError: If it is no number.
    """
    found = number("ert", ert, 2.0)
    if math.isinf(found):
        raise ValueError(f"Expected a finite ert, got {ert}.")
    return found
