"""Foreign models as per-sample log-likelihood terms."""

from ood_monitor.adapters import observations
from ood_monitor.adapters.base import Adapter, Batch, Condition, SampleKind
from ood_monitor.adapters.denoising import DenoisingBound
from ood_monitor.adapters.elbo import ELBO
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.flows import latents_and_log_det
from ood_monitor.adapters.latents import latent_mean
from ood_monitor.adapters.likelihood import LogLikelihood
from ood_monitor.adapters.schedules import NoiseSchedule
from ood_monitor.adapters.sequence import SequenceLikelihood

__all__ = [
    "ELBO",
    "Adapter",
    "Batch",
    "Condition",
    "DenoisingBound",
    "Elements",
    "LogLikelihood",
    "NoiseSchedule",
    "SampleKind",
    "SequenceLikelihood",
    "latent_mean",
    "latents_and_log_det",
    "observations",
]
