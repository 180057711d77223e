"""Tells when a deep generative model is fed, or produces, something it never learned."""

from ood_monitor import models
from ood_monitor.adapters import (
    ELBO,
    Adapter,
    DenoisingBound,
    Elements,
    LogLikelihood,
    NoiseSchedule,
    SequenceLikelihood,
    latent_mean,
    latents_and_log_det,
    observations,
)
from ood_monitor.alerts import Alert, LoggingSink, WebhookSink
from ood_monitor.calibration import Diagnosis, Scores, diagnose
from ood_monitor.densities import DiagonalGaussian, Maximum, ShrunkGaussian, TermsAndNorms
from ood_monitor.densities.parts import Part
from ood_monitor.detector import Detector, Explanation
from ood_monitor.drift import EDetector, TrainingStream
from ood_monitor.gradients import gradient_norms, last_layers
from ood_monitor.monitor import Discoveries, Monitor

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "Adapter",
    "Alert",
    "DenoisingBound",
    "Detector",
    "Diagnosis",
    "DiagonalGaussian",
    "Discoveries",
    "EDetector",
    "Elements",
    "Explanation",
    "LogLikelihood",
    "LoggingSink",
    "Maximum",
    "Monitor",
    "NoiseSchedule",
    "Part",
    "Scores",
    "SequenceLikelihood",
    "ShrunkGaussian",
    "TermsAndNorms",
    "TrainingStream",
    "WebhookSink",
    "diagnose",
    "gradient_norms",
    "last_layers",
    "latent_mean",
    "latents_and_log_det",
    "models",
    "observations",
]
