"""A pipeline's denoiser, and which pipelines there is no replaying for."""

from typing import Any

from torch import nn

from ood_monitor import NoiseSchedule

__all__ = ["check_pipeline", "denoiser_of", "original_of"]

#: Components beside which one denoiser is not the whole model.
_FURTHER_DENOISERS = (
    "transformer_2",
    "unet_2",
    "prior",
    "decoder",
    "prior_prior",
    "super_res_first",
)

#: Parts of the names of schedulers of tokens, which have no Gaussian noise.
_DISCRETE = ("VQDiffusion", "Amused", "BlockRefinement", "DiscreteState")


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's denoiser, as `torch.compile` may have wrapped it.

    Raises:
        TypeError: It has none.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise TypeError(
        f"Expected a pipeline with a denoiser (`unet` or `transformer`) and a scheduler, got "
        f"{type(pipe).__name__}."
    )


def original_of(module: nn.Module) -> nn.Module:
    """The module itself, without what `torch.compile` put around it."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def check_pipeline(pipe: Any) -> None:
    """Refuse, by name, a pipeline whose denoiser cannot be replayed as a denoising bound.

    How it is called is read off a call, and not asked here.

    Raises:
        TypeError: No denoiser or no scheduler.
        ValueError: Several denoisers, or a schedule that is neither variance-preserving nor a
            straight line.
    """
    name = type(pipe).__name__
    further = [k for k in _FURTHER_DENOISERS if isinstance(getattr(pipe, k, None), nn.Module)]
    if further:
        raise ValueError(
            f"Expected a pipeline with one denoiser, got {name} with {', '.join(further)}: watch "
            "its stages as pipelines of their own."
        )
    denoiser_of(pipe)
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"Expected a pipeline with a scheduler, got {name} without one.")
    _check_scheduler(pipe.scheduler)


def _check_scheduler(scheduler: Any) -> None:
    kind, config = type(scheduler).__name__, dict(scheduler.config)
    expected = "Expected a scheduler that is variance-preserving or for flow matching, got"
    if any(part in kind for part in _DISCRETE):
        raise ValueError(f"{expected} {kind}, whose noise is discrete.")
    if hasattr(scheduler, "precondition_inputs"):
        raise ValueError(f"{expected} {kind}, which preconditions the denoiser (EDM).")
    if config.get("prediction_type") == "trigflow":
        raise ValueError(f"{expected} {kind} with prediction_type='trigflow'.")
    NoiseSchedule.of(scheduler)
