"""References for norms: plain autograd by sample, and the loop on views of the model; and calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size, checked_terms, map_tensors, pieces
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.modules import scored

__all__ = ["counted", "gradients", "looped"]


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """A list that grows with each call of a module or of a view of it.

    A hook on the module itself would run in the view with a list of its own.
    """
    calls: list[int] = []
    kind = type(module)
    handle = register_module_forward_pre_hook(
        lambda called, _: calls.append(1) if type(called) is kind else None
    )
    try:
        yield calls
    finally:
        handle.remove()


def gradients(adapter: om.Adapter, batch: Batch, group: int = 1) -> dict[str, Tensor]:
    """What autograd gives for each group of samples on its own, {"term/parameter": (n, ...)}."""
    parameters = dict(adapter.module.named_parameters())
    found: dict[str, list[Tensor]] = {}
    for samples in pieces(batch, group):
        for term, value in checked_terms(adapter, map_tensors(torch.clone, samples)):
            parts = torch.autograd.grad(
                value.sum(), list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for name, part in zip(parameters, parts, strict=True):
                found.setdefault(f"{term}/{name}", []).append(part)
    return {key: torch.stack(parts) for key, parts in found.items()}


def looped(
    adapter: om.Adapter, batch: Batch, n: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms (B,), and norms by row of all parameters, (n, rows), of n groups or of each sample."""
    count = batch_size(batch) if n is None else n
    return scored(
        lambda passes: loop_norms(passes, batch, count, lambda name: True, lambda name: "row"),
        adapter,
        adapter.module,
    )
