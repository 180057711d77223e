"""`vmap` of the loop over samples: its passes, of single samples, made all at once.

What is differentiated is what the loop differentiates, so norms are as exact where PyTorch can run
the model so: code that looks at a value, picks by a mask or writes into what is not its own raises,
and the loop takes over. Per-sample gradients are held for some samples at a time.
"""

import warnings
from collections.abc import Callable, Set

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, checked_terms, map_tensors, tensors_in
from ood_monitor.gradients.factors import Granularity, full_precision, norms_of_gradient
from ood_monitor.modules import Passes

__all__ = ["is_quick_alone", "vmapped_norms"]

#: Elements of per-sample gradients held at once.
_HELD_ELEMENTS = 2**24

#: Samples at once from which on `vmap` is quick.
_QUICK = 4

#: Layers of which `vmap` takes weights' gradients slowly: by groups, or step by step.
_SLOW = (
    *(nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNBase, nn.RNNCellBase),
)


def is_quick_alone(module: nn.Module, n: int, names: Set[str]) -> bool:
    """Whether `vmap` alone is quicker than what finds whose rows are, or than rules and it.

    Of the models of other packages it is so for all but one that have none of these layers.

    Args:
        module: The model.
        n: How many gradients.
        names: Of which parameters.
    """
    held = min(n, _QUICK) * sum(p.numel() for name, p in module.named_parameters() if name in names)
    return held <= _HELD_ELEMENTS and not any(isinstance(m, _SLOW) for m in module.modules())


def vmapped_norms(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """As :func:`~ood_monitor.gradients.loop.loop_norms`, or None where that cannot be had.

    A model that is scored in place is left to the loop: its own parameters would be replaced while
    other threads may see them.
    """
    if passes.in_place:
        return None
    adapter = passes.fresh()
    # All without their graphs, of which the outputs would be a part.
    every = {name: p.detach() for name, p in adapter.module.named_parameters()}
    continuous = {name for name, p in every.items() if p.is_floating_point() or p.is_complex()}
    parameters = {name: every.pop(name) for name in continuous if selected(name)}
    groups = [t.reshape(n, -1, *t.shape[1:]) for t in tensors_in(batch)]
    held = max(1, sum(p.numel() for p in parameters.values()))

    def of_group(*tensors: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = iter(tensors)
        return _norms(adapter, map_tensors(lambda t: next(own), batch), parameters, every, by)

    try:
        with warnings.catch_warnings():
            # An operation that it does sample by sample is slower, and no less exact.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            mapped = torch.func.vmap(
                of_group, randomness="same", chunk_size=max(1, _HELD_ELEMENTS // held)
            )
            values, norms = mapped(*groups)
    except Exception:  # whatever the model does that cannot be done so
        return None
    return {term: value.flatten(0, 1) for term, value in values.items()}, norms


def _norms(
    adapter: Adapter,
    group: Batch,
    parameters: dict[str, Tensor],
    constants: dict[str, Tensor],
    by: Callable[[str], Granularity],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms (size,) and norms of one group's gradients."""
    model = _Terms(adapter)

    def terms(own: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        named = {f"module.{name}": p for name, p in (own | constants).items()}
        found: dict[str, Tensor] = torch.func.functional_call(model, named, (group,))
        return {term: value.sum() for term, value in found.items()}, found

    sums, pulled_back, values = torch.func.vjp(terms, parameters, has_aux=True)  # type: ignore[misc]
    norms: dict[str, Tensor] = {}
    for term in sums:
        one = {k: torch.ones_like(v) if k == term else torch.zeros_like(v) for k, v in sums.items()}
        (gradients,) = pulled_back(one)
        for name, gradient in gradients.items():
            norms[f"{term}/{name}"] = norms_of_gradient(by(name), full_precision(gradient))
    return values, norms


class _Terms(nn.Module):
    """An adapter's terms as a module's output, whose parameters are replaced for a call."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.module, self._adapter = adapter.module, adapter

    def forward(self, group: Batch) -> dict[str, Tensor]:
        """Terms, shape (size,)."""
        return dict(checked_terms(self._adapter, group))
