"""The exact reference: one backward pass per sample."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch, batch_size, checked_terms, pieces
from ood_monitor.gradients.factors import Granularity, full_precision, norms_of_gradient
from ood_monitor.modules import Passes, leaf_parameters

__all__ = ["loop_norms"]


def loop_norms(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and squared gradient norms, sample by sample (group by group).

    Args:
        passes: The model.
        batch: B = n * group samples.
        n: Number of groups of consecutive samples; the gradient is that of a group's sum.
        selected: Which parameters, by name.
        by: The granularity of each.

    Returns:
        ``{term: (B,)}`` in nats, and ``{"term/parameter": (n,)}``, or ``(n, rows)``.
    """
    values: dict[str, list[Tensor]] = {}
    norms: dict[str, list[Tensor]] = {}
    for group in pieces(batch, batch_size(batch) // n):
        adapter = passes.fresh()
        with leaf_parameters(adapter.module) as parameters:
            leaves = {name: p for name, p in parameters.items() if selected(name)}
            for term, value in checked_terms(adapter, group):
                values.setdefault(term, []).append(value.detach())
                for name, gradient in _gradients(value.sum(), leaves):
                    with torch._C.DisableTorchFunction():  # no call of the model's
                        squared = norms_of_gradient(by(name), gradient)
                    norms.setdefault(f"{term}/{name}", []).append(squared)
                del value  # frees the term's graph before the next forward pass
    return (
        {k: torch.cat(v) for k, v in values.items()},
        {k: torch.stack(v) for k, v in norms.items()},
    )


def _gradients(value: Tensor, leaves: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    gradients: Iterable[Tensor | None] = (
        torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        if value.requires_grad and leaves
        else [None] * len(leaves)
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        gradient = leaf.new_zeros(leaf.shape) if gradient is None else gradient
        yield name, full_precision(gradient)
