r"""Calibration: what a score is worth, judged against scores of held-out data.

A score :math:`s(x)`, higher for the more anomalous, becomes a conformal p-value :math:`p(s)` by the
scores :math:`s_1, \ldots, s_n` of data that the detector was not fitted on; within groups, by those
of the sample's own group. :func:`diagnose` tells which of the paper's assumptions hold on them.
"""

from ood_monitor.calibration.conformal import ConformalPValue, binomial_interval
from ood_monitor.calibration.diagnostics import Diagnosis, diagnose
from ood_monitor.calibration.groups import GroupedPValue
from ood_monitor.calibration.scores import Scores

__all__ = [
    "ConformalPValue",
    "Diagnosis",
    "GroupedPValue",
    "Scores",
    "binomial_interval",
    "diagnose",
]
