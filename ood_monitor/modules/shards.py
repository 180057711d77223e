"""Weights of which each process holds a shard, as PyTorch's `fully_shard` (FSDP2) leaves them.

What gathers them is a collective: all processes come to it, in the same order. The modules are
asked by name and not by class, so that nobody who shards nothing imports what shards.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = [
    "begin_pass",
    "fully_sharded",
    "initialise",
    "is_shard",
    "is_sharded",
    "local_part",
    "resharded",
    "whole",
]


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which a process has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of a shard by a collective, which all processes take part in."""
    shard: Any = tensor
    found: Tensor = shard.full_tensor() if is_shard(tensor) else tensor
    return found


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    shard: Any = tensor
    found: Tensor = shard.to_local() if is_shard(tensor) else tensor
    return found


def fully_sharded(module: nn.Module) -> list[Any]:
    """The parts that `fully_shard` was called on, from the outermost on; of a group the first."""
    states: dict[int, Any] = {}
    parts: list[Any] = [part for part in module.modules() if _is_fsdp(part)]
    for part in parts:
        states.setdefault(id(part._get_fsdp_state()), part)
    return list(states.values())


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are sharded, be they gathered at the moment or not."""
    return any(map(_is_fsdp, module.modules())) or any(map(is_shard, module.parameters()))


def begin_pass(module: nn.Module) -> None:
    """Make ready for a pass that may call methods other than `forward`, which FSDP does not see.

    An outermost module's own weights, without those of parts that are sharded on their own, are
    whole from here on, as they are throughout its forward pass.
    """
    roots = initialise(module)
    for root in roots:
        _settle(root)
        if len(roots) == 1 or len(fully_sharded(root)) > 1:
            root.unshard()


def initialise(module: nn.Module) -> list[Any]:
    """The outermost sharded parts, known to FSDP as such.

    Otherwise the first part to be called would be taken for one, which FSDP never forgives.
    """
    roots = _roots(module)
    for root in roots:
        root._get_fsdp_state()._lazy_init()
    return roots


@contextmanager
def resharded(module: nn.Module) -> Iterator[None]:
    """Weights are shards again afterwards, also after a pass that failed on its way.

    Raises:
        ValueError: A pass of the user's is running.
    """
    parts = fully_sharded(module)
    if any(map(_is_running, parts)):
        raise ValueError(
            f"Expected to score {type(module).__name__} between forward passes, since its weights "
            "are sharded, got a call within one, or after one that failed: call its "
            "`reset_iter_state()` then."
        )
    try:
        yield
    finally:
        for part in parts:
            _settle(part)
            part.reshard()


def _is_fsdp(module: nn.Module) -> bool:
    kind: Any = type(module)
    return _is_kind_of_fsdp(kind)


@functools.lru_cache(maxsize=1024)
def _is_kind_of_fsdp(kind: Any) -> bool:
    return "FSDPModule" in {base.__name__ for base in kind.__mro__}


def _roots(module: nn.Module) -> list[Any]:
    """Those of :func:`fully_sharded` that are in no other."""
    parts = fully_sharded(module)
    inner = {id(part) for root in parts for part in root.modules() if part is not root}
    return [part for part in parts if id(part) not in inner]


def _settle(part: Any) -> None:
    """End a pass that an exception has left, which FSDP would else take for one still running."""
    if _is_running(part):  # not otherwise: it drops what is accumulated of gradients
        states = part._get_fsdp_state()._state_ctx.all_states
        next(state for state in states if state._is_root)._reset_iter_state()


def _is_running(part: Any) -> bool:
    return part._get_fsdp_state()._state_ctx.iter_forward_root is not None
