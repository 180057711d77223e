"""What of a Trainer cannot be monitored, refused by name before anything is trained."""

from transformers import TrainingArguments

__all__ = ["refuse_arguments"]


def refuse_arguments(args: TrainingArguments, *, watches_training: bool) -> None:
    """Refuse a Trainer that shards parameters, or that scores in replicas; or scaled gradients.

    Args:
        args: The Trainer's.
        watches_training: Whether gradients of training are looked at.

    Raises:
        ValueError: It is one.
    """
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    if sharded:
        raise ValueError(
            f"Expected a Trainer that keeps whole parameters, got {sharded[0]}=: score the "
            "consolidated checkpoint in one process, `OODCallback.calibrate(model, batches)`."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Expected one device a process, got {args.n_gpu} by `nn.DataParallel`, whose replicas "
            "see a part of a batch each: start a process for each, by `torchrun` or `accelerate "
            "launch`."
        )
    if watches_training and args.fp16 and not args.max_grad_norm:
        raise ValueError(
            "Expected max_grad_norm above 0 with fp16=True to watch 'train', got 0: gradients are "
            "then still scaled where a callback sees them. Give a large one, 1e9, or bf16=True."
        )
