"""The detector: the one composition of adapter, features, density and calibration."""

from ood_monitor.detector.detector import Detector

__all__ = ["Detector"]
