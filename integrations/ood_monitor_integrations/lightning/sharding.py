"""Strategies of Lightning that shard parameters: what can be monitored, and what is refused."""

__all__ = ["refuse_strategy"]

_REMEDY = (
    "Score the consolidated checkpoint with a Trainer of another strategy: "
    "`OODMonitor.calibrate(trainer, model, loader)`, then `trainer.predict`."
)


def refuse_strategy(strategy: object, *, watches_training: bool) -> None:
    """Refuse a strategy that shards parameters, unless forward passes are all that is needed.

    Args:
        strategy: The Trainer's.
        watches_training: Whether gradients of training are looked at.

    Raises:
        ValueError: FSDP's wrapper, or DeepSpeed at stage 3; or model parallel, where training is
            watched.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    deepspeed = "DeepSpeedStrategy" in names and getattr(strategy, "zero_stage_3", True)
    if deepspeed or "FSDPStrategy" in names:
        raise ValueError(
            "Expected a strategy that keeps whole parameters, such as 'ddp', or "
            f"ModelParallelStrategy with `fully_shard` (FSDP2), got {type(strategy).__name__}, "
            f"which shards them in another way. {_REMEDY}"
        )
    if watches_training and "ModelParallelStrategy" in names:
        raise ValueError(
            "Expected `watch=` without 'train' under a strategy that shards parameters, got "
            f"{type(strategy).__name__}: a process has shards of their gradients alone."
        )
