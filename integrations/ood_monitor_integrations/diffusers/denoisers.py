"""A pipeline's denoiser, and which pipelines there is no replaying for.

Two transformers of one call, one for much noise and one for little, are one denoiser of two
experts.
"""

import weakref
from typing import Any

from torch import nn

from ood_monitor import NoiseSchedule
from ood_monitor.processes import Lock

__all__ = [
    "Experts",
    "boundary_of",
    "called_in",
    "check_pipeline",
    "denoiser_of",
    "expert_in",
    "experts_of",
    "original_of",
]

#: Networks that denoise in turn: of much noise, and of little.
_EXPERTS = ("transformer", "transformer_2")

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

#: What settles the watch of what cannot be replayed.
_REMEDY = (
    "Fit a Detector with an adapter of your own, and watch with `monitor_pipeline(batch=...)`."
)


class Experts(nn.Module):
    """Two networks of which each denoises its own noise levels.

    Attributes:
        transformer: Of much noise.
        transformer_2: Of little.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.training = transformer.training  # theirs is not changed


#: One for two networks, however often it is asked for: a detector is of this object.
_known: weakref.WeakValueDictionary[tuple[int, int], Experts] = weakref.WeakValueDictionary()
_lock = Lock()


def experts_of(denoiser: nn.Module) -> tuple[nn.Module, ...]:
    """The networks that a denoiser is: itself, or two."""
    if isinstance(denoiser, Experts):
        return denoiser.transformer, denoiser.transformer_2
    return (denoiser,)


def expert_in(denoiser: nn.Module, index: int) -> nn.Module:
    """The network of a denoiser that is called, by its place in :func:`called_in`."""
    return experts_of(denoiser)[index]


def boundary_of(pipe: Any) -> float | None:
    """The scheduler's time from which on the first of two experts denoises; None of one network.

    A pipeline that has a second without a boundary does not call it.
    """
    config = getattr(pipe, "config", {})
    ratio = config.get("boundary_ratio")
    if ratio is None or len(called_in(pipe)) != len(_EXPERTS):
        return None
    return float(ratio * pipe.scheduler.config.num_train_timesteps)


def called_in(pipe: Any) -> tuple[nn.Module, ...]:
    """What the pipeline calls to denoise, as `torch.compile` may have wrapped it.

    Raises:
        TypeError: Nothing.
    """
    if _has_boundary(pipe):
        found = [getattr(pipe, name, None) for name in _EXPERTS]
        present = tuple(each for each in found if isinstance(each, nn.Module))
        if present:
            return present
    return (_single_of(pipe),)


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's denoiser, as `torch.compile` may have wrapped it; or its two experts.

    Raises:
        TypeError: It has none.
    """
    if boundary_of(pipe) is None:
        return called_in(pipe)[0]
    first, second = map(original_of, called_in(pipe))
    with _lock:
        key = id(first), id(second)
        found = _known.get(key)
        if found is None:
            found = _known[key] = Experts(first, second)
        return found


def _has_boundary(pipe: Any) -> bool:
    return "boundary_ratio" in getattr(pipe, "config", {})


def _single_of(pipe: Any) -> nn.Module:
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
    if further and not (further == list(_EXPERTS[1:]) and _has_boundary(pipe)):
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
    if config.get("prediction_type") == "trigflow":
        raise ValueError(f"{expected} {kind} with prediction_type='trigflow'. {_REMEDY}")
    NoiseSchedule.of(scheduler)
