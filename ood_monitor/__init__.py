"""Tells when a deep generative model is fed, or produces, something it never learned."""

from ood_monitor import models
from ood_monitor.adapters import ELBO, Adapter, DenoisingBound, LogLikelihood, SequenceLikelihood
from ood_monitor.alerts import Alert, LoggingSink
from ood_monitor.densities import DiagonalGaussian, Maximum, ShrunkGaussian
from ood_monitor.detector import Detector, Scores
from ood_monitor.drift import EDetector
from ood_monitor.gradients import gradient_norms, last_layers
from ood_monitor.monitor import Monitor

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "Adapter",
    "Alert",
    "DenoisingBound",
    "Detector",
    "DiagonalGaussian",
    "EDetector",
    "LogLikelihood",
    "LoggingSink",
    "Maximum",
    "Monitor",
    "Scores",
    "SequenceLikelihood",
    "ShrunkGaussian",
    "gradient_norms",
    "last_layers",
    "models",
]
