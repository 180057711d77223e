"""`vmap` of the loop over samples: its passes, of single samples, made all at once.

What is differentiated is what the loop differentiates, so norms are as exact where PyTorch can run
the model so: code that looks at a value, picks by a mask or writes into what is not its own raises,
and the loop takes over. Per-sample gradients are held for some samples at a time.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, checked_terms, map_tensors, tensors_in
from ood_monitor.gradients.factors import Granularity, full_precision, norms_of_gradient
from ood_monitor.gradients.kept import is_keeping, noting
from ood_monitor.modules import Passes, leaf_parameters

__all__ = ["is_quick_alone", "vmapped_norms"]

#: Elements of per-sample gradients held at once.
_HELD_ELEMENTS = 2**24

#: Samples at once from which on `vmap` is quick.
_QUICK = 4

#: Elements of gradients of all samples that take little time, for each position of a sample: a
#: layer's products with that many tokens take as long. And those that are never passed.
_QUICK_ELEMENTS, _MOST_ELEMENTS = 2**22, 2**26

#: Layers of which `vmap` takes weights' gradients slowly: by groups, or step by step.
_SLOW = (
    *(nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNBase, nn.RNNCellBase),
)


def is_quick_alone(module: nn.Module, n: int, names: Set[str], positions: int = 1) -> bool:
    """Whether `vmap` alone is quicker than what finds whose rows are, or than rules and it.

    The bounds are from models of other packages (`benchmarks.cost.foreign`). Of wide layers that
    are used once a sample it is many times slower: rules hold no gradient.

    Args:
        module: The model.
        n: How many gradients.
        names: Of which parameters.
        positions: How many tokens there are in a gradient's samples.
    """
    one = sum(p.numel() for name, p in module.named_parameters() if name in names)
    if min(n, _QUICK) * one > _HELD_ELEMENTS:
        return False
    if n * one > min(_QUICK_ELEMENTS * max(1, positions), _MOST_ELEMENTS):
        return False
    return not any(isinstance(m, _SLOW) for m in module.modules())


def vmapped_norms(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """As :func:`~ood_monitor.gradients.loop.loop_norms`, or None where that cannot be had.

    A model that is scored in place is left to the loop: its own parameters would be replaced while
    other threads may see them. So is one that keeps what it computed where no view of it reaches,
    by a global variable: what it keeps would be of `vmap`, and raise when its user looks at it.
    """
    if passes.in_place or is_keeping(passes):
        return None
    try:
        with _no_word_of_speed(), noting(passes):
            found = _mapped(passes, batch, n, selected, by)
    except Exception:  # whatever the model does that cannot be done so
        return None
    return None if is_keeping(passes) else found


def _mapped(
    passes: Passes[Adapter],
    batch: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
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

    of_all = torch.func.vmap(of_group, randomness="same", chunk_size=max(1, _HELD_ELEMENTS // held))
    with leaf_parameters(adapter.module) as leaves:
        values, norms = of_all(*groups)
        if _are_used(leaves.values(), values.values()):
            return None  # a weight that was not replaced: held by a list beside, say
    return {term: value.detach().flatten(0, 1) for term, value in values.items()}, norms


def _are_used(leaves: Iterable[Tensor], values: Iterable[Tensor]) -> bool:
    with_graph = [value.sum() for value in values if value.requires_grad]
    if not with_graph:
        return False
    found = torch.autograd.grad(with_graph, list(leaves), allow_unused=True)
    return any(gradient is not None for gradient in found)


@contextmanager
def _no_word_of_speed() -> Iterator[None]:
    """Without PyTorch's warning of an operation that is done sample by sample: as exact, slower.

    The filter is put in by hand. `catch_warnings` would have each warning of the model that is
    shown once shown again, at every pass.
    """
    filters = cast(list[Any], warnings.filters)  # one for all threads
    ours = ("ignore", re.compile("There is a performance drop"), UserWarning, None, 0)
    filters.insert(0, ours)
    try:
        yield
    finally:
        filters.remove(ours)


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
            norms[f"{term}/{name}"] = norms_of_gradient(by(name), full_precision(gradient.detach()))
    return values, norms


class _Terms(nn.Module):
    """An adapter's terms as a module's output, whose parameters are replaced for a call."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.module, self._adapter = adapter.module, adapter
        # Called without hooks: those of all modules of a process are not of this one.
        self._compiled_call_impl = self.forward

    def forward(self, group: Batch) -> dict[str, Tensor]:
        """Terms, shape (size,)."""
        return dict(checked_terms(self._adapter, group))
