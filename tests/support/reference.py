"""The reference for norms: the loop over samples, on views of the model."""

from torch import Tensor

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.modules import scored

__all__ = ["looped"]


def looped(
    adapter: om.Adapter, batch: Batch, n: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms (B,), and norms by row of all parameters, (n, rows), of n groups or of each sample."""
    count = batch_size(batch) if n is None else n
    return scored(
        lambda passes: loop_norms(passes, batch, count, lambda name: True), adapter, adapter.module
    )
