"""What can be monitored of models whose parameters are sharded, and what is refused by name."""

from torch import nn

from ood_monitor.modules import Lockstep, fully_sharded, is_shard, is_sharded

__all__ = ["refuse_gradients_of_shards", "refuse_shards_of_others"]

_REMEDY = (
    "Score the consolidated checkpoint in one process: load it, fit the detector with "
    "`Detector.fit` or the callback's `calibrate`, then predict."
)


def refuse_shards_of_others(module: nn.Module) -> None:
    """Refuse shards other than those of `fully_shard`, along the batch alone.

    Raises:
        ValueError: A parameter is DeepSpeed's shard, or a DTensor of tensor parallelism; or parts
            are sharded among different processes.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id") or (is_shard(parameter) and _shards(parameter) > 1):
            _refuse(name, parameter)
    gathered = {id(p) for part in fully_sharded(module) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if is_shard(parameter) and id(parameter) not in gathered:
            _refuse(name, parameter)
    Lockstep(module)  # which refuses parts of different processes


def refuse_gradients_of_shards(module: nn.Module, *, takes_gradients: bool) -> None:
    """Refuse a detector that takes gradients of a sharded module.

    Raises:
        ValueError: It is one.
    """
    if takes_gradients and is_sharded(module):
        raise ValueError(
            "Expected a detector of method 'forward' for a model whose parameters are sharded, got "
            f"one that takes gradients of each sample, which are not at hand. {_REMEDY}"
        )


def _shards(parameter: nn.Parameter) -> int:
    """Along how many dimensions of the mesh a DTensor is sharded."""
    return sum(not placement.is_replicate() for placement in parameter.placements)  # type: ignore[attr-defined]


def _refuse(name: str, parameter: nn.Parameter) -> None:
    kind = type(parameter.data).__name__
    raise ValueError(
        f"Expected whole parameters, or shards by `fully_shard` (FSDP2) alone, got {name!r}, a "
        f"shard ({kind}) of another kind. {_REMEDY}"
    )
