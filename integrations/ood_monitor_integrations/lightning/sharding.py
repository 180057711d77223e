"""What cannot be monitored, told before the first batch: models whose parameters are sharded."""

from torch import nn

__all__ = ["refuse_sharded", "refuse_sharded_parameters"]

_REMEDY = (
    "Score the consolidated checkpoint with a Trainer of another strategy: "
    "`OODMonitor.calibrate(trainer, model, loader)`, then `trainer.predict`."
)


def refuse_sharded(strategy: object) -> None:
    """Refuse a strategy that shards parameters.

    Raises:
        ValueError: FSDP, model parallel, or DeepSpeed at stage 3.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    deepspeed = "DeepSpeedStrategy" in names and getattr(strategy, "zero_stage_3", True)
    if deepspeed or names & {"FSDPStrategy", "ModelParallelStrategy"}:
        raise ValueError(
            "Expected a strategy that keeps whole parameters, such as 'ddp', got "
            f"{type(strategy).__name__}, which shards them: gradients of a sample are not at hand. "
            f"{_REMEDY}"
        )


def refuse_sharded_parameters(module: nn.Module) -> None:
    """Refuse a module that something else than the strategy has sharded.

    Raises:
        ValueError: A parameter is a DTensor or DeepSpeed's shard.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            kind = type(parameter.data).__name__
            raise ValueError(
                f"Expected whole parameters, got {name!r}, a shard ({kind}). {_REMEDY}"
            )
