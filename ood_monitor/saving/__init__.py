"""Saving: what a detector learned as safetensors and JSON, where it comes from, and where it goes.

:class:`Fitted` is all that a fit learned. It belongs to weights, by :func:`digest`.
"""

from ood_monitor.saving.fingerprints import digest, sample_hashes
from ood_monitor.saving.fitted import CONFIG, FORMAT, TENSORS, Fitted
from ood_monitor.saving.provenance import Provenance

__all__ = ["CONFIG", "FORMAT", "TENSORS", "Fitted", "Provenance", "digest", "sample_hashes"]
