"""The detector: the one composition of adapter, features, density and calibration."""

from ood_monitor.detector.detector import Detector
from ood_monitor.detector.explaining import Explanation

__all__ = ["Detector", "Explanation"]
