"""A module with other weights for a while: those that a checkpoint is about to hold."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.modules import is_sharded

__all__ = ["holding", "places"]


@contextmanager
def holding(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """The module has the weights of a state dict, and its own again afterwards, bit for bit.

    Both exchange their contents in place, one tensor after the other, as Lightning's weight
    averaging does: there is never a copy of more than two tensors. A tensor that both share, as in
    an ordinary checkpoint, is left alone, and so is one that the state lacks, such as of frozen
    parts that are not saved. Tensors of another type are taken over as loading would, for which
    those of the module are copied. Of a module in shards the state is taken to be its own.

    Raises:
        ValueError: The state has tensors that the module has not, as of pruned weights, or one of
            another shape.
    """
    pairs = [] if is_sharded(module) else list(_pairs(module, state))
    with torch.no_grad(), ExitStack() as stack:
        for own, other in pairs:
            if own.dtype == other.dtype:
                _exchange(own, other)
                stack.callback(_exchange, own, other)
            else:
                stack.callback(own.copy_, own.clone())
                own.copy_(other)
        with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
            yield


def places(state: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """What changes when a state dict gets other tensors."""
    tensors = ((name, value) for name, value in state.items() if isinstance(value, Tensor))
    return tuple((name, value.data_ptr()) for name, value in tensors)


def _pairs(module: nn.Module, state: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    held = module.state_dict()
    if foreign := sorted(state.keys() - held.keys()):
        raise ValueError(
            f"Expected weights that the module has, got {', '.join(foreign[:3])} among those of a "
            "checkpoint, which it has not: they are of a model of another form, as a pruned one."
        )
    for name, other in state.items():
        own = held[name]
        if not (isinstance(own, Tensor) and isinstance(other, Tensor)) or other is own:
            continue
        if other.shape != own.shape:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(own.shape)} among the weights of a checkpoint, "
                f"as the module has it, got {tuple(other.shape)}."
            )
        if other.data_ptr() != own.data_ptr() or other.device != own.device:
            yield own, other


def _exchange(own: Tensor, other: Tensor) -> None:
    """Whatever interrupts it, both are as before or exchanged."""
    kept = own.clone(), other.clone()
    try:
        own.copy_(kept[1])
        other.copy_(kept[0])
    except BaseException:  # an interruption too, which is raised on
        own.copy_(kept[0])
        other.copy_(kept[1])
        raise
