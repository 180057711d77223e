r"""Drift: evidence over a stream, as an e-value that bounds the rate of false alarms.

Bets are placed on smoothed ranks :math:`p_n` among all scores before; the log e-value grows where
they stop being uniform. If nothing changes, an alarm comes once in :math:`ert` samples at most, on
average. :func:`expected_delay` says how soon a change is found, and a :class:`TrainingStream` tests
the gradients of a training.
"""

from ood_monitor.drift.e_detector import EDetector
from ood_monitor.drift.evidence import Evidence, pooled_log_e_value
from ood_monitor.drift.power import expected_delay
from ood_monitor.drift.training import TrainingScore, TrainingStream

__all__ = [
    "EDetector",
    "Evidence",
    "TrainingScore",
    "TrainingStream",
    "expected_delay",
    "pooled_log_e_value",
]
