"""How families of denoisers are called, and which pipelines there is no replaying for."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ood_monitor import NoiseSchedule
from ood_monitor_integrations.diffusers.capture import sample_argument

__all__ = ["Family", "check_pipeline", "denoiser_of", "family_of", "original_of"]


@dataclass(frozen=True)
class Family:
    """How denoisers of one kind are called, where it cannot be seen from a call.

    Attributes:
        conditional: Which copy of a batch that is doubled for guidance has the condition.
        constants: Arguments without a batch, which one of so many rows may seem to have.
        control: The arguments that are a ControlNet's outputs, in their order.
    """

    conditional: int = -1
    constants: frozenset[str] = frozenset()
    control: tuple[str, ...] = ()


_FAMILIES = {
    "UNet2DConditionModel": Family(
        control=("down_block_additional_residuals", "mid_block_additional_residual")
    ),
    "DiTTransformer2DModel": Family(conditional=0),
    "SD3Transformer2DModel": Family(control=("block_controlnet_hidden_states",)),
    "FluxTransformer2DModel": Family(
        constants=frozenset({"img_ids", "txt_ids"}),
        control=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
}

#: Components beside which one denoiser is not the whole model.
_FURTHER_DENOISERS = (
    "transformer_2",
    "unet_2",
    "prior",
    "decoder",
    "prior_prior",
    "super_res_first",
)

#: Parts of the names of denoisers of videos.
_VIDEO = ("3D", "Video", "Motion", "SpatioTemporal")

#: Parts of the names of schedulers of tokens, which have no Gaussian noise.
_DISCRETE = ("VQDiffusion", "Amused", "BlockRefinement", "DiscreteState")


def family_of(denoiser: nn.Module) -> Family:
    """What is known of a denoiser's kind; the default of most for one that is not known."""
    return _FAMILIES.get(type(original_of(denoiser)).__name__, Family())


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

    Raises:
        TypeError: No denoiser or no scheduler.
        ValueError: Several denoisers, a video, or a schedule that is neither variance-preserving
            nor a straight line.
    """
    name = type(pipe).__name__
    further = [k for k in _FURTHER_DENOISERS if isinstance(getattr(pipe, k, None), nn.Module)]
    if further:
        raise ValueError(
            f"Expected a pipeline with one denoiser, got {name} with {', '.join(further)}: watch "
            "its stages as pipelines of their own."
        )
    denoiser = original_of(denoiser_of(pipe))
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"Expected a pipeline with a scheduler, got {name} without one.")
    kind = type(denoiser).__name__
    if any(part in kind for part in _VIDEO):
        raise ValueError(f"Expected a denoiser of images, got {kind}, one of videos.")
    sample_argument(denoiser)
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
