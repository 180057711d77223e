"""Other ways to per-sample squared gradient norms, each as what a run of it needs done once.

Opacus and BackPACK are not dependencies: `make benchmark-peers` installs them.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size, checked_terms, map_tensors
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.modules import scored

Norms: TypeAlias = dict[str, Tensor]
Method: TypeAlias = Callable[[om.Adapter, Batch], Callable[[], Norms]]


def plain(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    """One training step's forward and backward pass: the unit."""

    def run() -> Norms:
        adapter.module.zero_grad()
        total(adapter, batch).backward()
        return {}

    return run


def total(adapter: om.Adapter, batch: Batch) -> Tensor:
    terms: Iterable[tuple[str, Tensor]] = checked_terms(adapter, batch)
    return torch.stack([value.sum() for _, value in terms]).sum()


def ours(**options: Any) -> Method:
    def method(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
        def run() -> Norms:
            norms = om.gradient_norms(adapter, batch, **options)
            return {key.split("/")[1]: tensor_norms(value) for key, value in norms.items()}

        return run

    return method


def tensor_norms(norms: Tensor) -> Tensor:
    return norms if norms.ndim == 1 else norms.sum(1)


def loop(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    """A backward pass per sample: the paper's way."""

    def run() -> Norms:
        rows = scored(
            lambda passes: loop_norms(
                passes, batch, batch_size(batch), lambda name: True, lambda name: "row"
            )[1],
            adapter,
            adapter.module,
        )
        return {key.split("/")[1]: values.sum(1) for key, values in rows.items()}

    return run


class Total(nn.Module):
    """An adapter's sum as a module's output, for `functional_call`."""

    def __init__(self, adapter: om.Adapter) -> None:
        super().__init__()
        self.module, self._adapter = adapter.module, adapter

    def forward(self, batch: Batch) -> Tensor:
        return total(self._adapter, batch)


def vmapped(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    """`vmap(grad)`, PyTorch's own for per-sample gradients."""
    wrapped = Total(adapter)

    def one(weights: dict[str, Tensor], sample: Batch) -> Tensor:
        alone = map_tensors(lambda x: x.unsqueeze(0), sample)
        return functional_call(wrapped, weights, (alone,))

    def run() -> Norms:
        named = wrapped.named_parameters()
        weights = {name: p.detach() for name, p in named if p.is_floating_point()}
        gradients = vmap(grad(one), in_dims=(None, 0))(weights, batch)
        return squared(gradients, "module.")

    return run


def squared(gradients: dict[str, Tensor], prefix: str = "") -> Norms:
    return {k.removeprefix(prefix): g.flatten(1).square().sum(1) for k, g in gradients.items()}


def opacus(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    """Its per-sample gradients; the model in train mode, as it asks, with dropout at zero."""
    from opacus import GradSampleModule

    hooked = copy.copy(adapter)
    wrapped = GradSampleModule(
        without_dropout(adapter.module).train(), loss_reduction="sum", strict=False
    )
    hooked.module = wrapped._module  # whose layers have the hooks, and which may have `log_prob`

    def run() -> Norms:
        wrapped.zero_grad()
        total(hooked, batch).backward()
        named = hooked.module.named_parameters()
        return squared({name: p.grad_sample for name, p in named if p.is_floating_point()})

    return run


def without_dropout(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for submodule in copied.modules():
        if isinstance(submodule, nn.Dropout):
            submodule.p = 0.0
    return copied


def backpack(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    """Its squared norms, without the gradients."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    extended = copy.copy(adapter)
    extended.module = extend(copy.deepcopy(adapter.module))

    def run() -> Norms:
        extended.module.zero_grad()
        with extensions(BatchL2Grad()):
            total(extended, batch).backward()
        return {name: p.batch_l2 for name, p in extended.module.named_parameters()}

    return run


METHODS: dict[str, Method] = {
    "ours": ours(),
    "ours, by row": ours(granularity="row"),
    "loop": loop,
    "vmap(grad)": vmapped,
    "Opacus": opacus,
    "BackPACK": backpack,
}
