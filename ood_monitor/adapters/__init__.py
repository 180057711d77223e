"""Foreign models as per-sample log-likelihood terms."""

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.adapters.denoising import DenoisingBound
from ood_monitor.adapters.elbo import ELBO
from ood_monitor.adapters.likelihood import LogLikelihood
from ood_monitor.adapters.sequence import SequenceLikelihood

__all__ = ["ELBO", "Adapter", "Batch", "DenoisingBound", "LogLikelihood", "SequenceLikelihood"]
