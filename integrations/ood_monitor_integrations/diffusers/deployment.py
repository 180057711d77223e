"""The denoiser as it is deployed: what has changed, what is refused, what is put aside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

from torch import nn

from ood_monitor import Detector
from ood_monitor.modules import Names, tuners_in
from ood_monitor_integrations.diffusers.caches import without_caches
from ood_monitor_integrations.diffusers.denoisers import original_of

__all__ = ["Mode", "check_denoiser", "check_deployment", "scorable", "settings_of"]

#: When scores are computed: before a call returns, or in a thread of the monitor's own.
Mode: TypeAlias = Literal["sync", "background"]

#: Attributes that `enable_freeu` sets on up blocks.
_FREEU = ("s1", "s2", "b1", "b2")

#: What the names of processors begin with that look at an image beside the prompt.
_IMAGE_PROMPT = "IPAdapter"


def settings_of(module: nn.Module, *, with_adapters: bool = True) -> str:
    """What changes a denoiser beside its weights.

    FreeU, which adapters are on and how strongly, image prompts' scales, and fused projections.
    """
    blocks = getattr(module, "up_blocks", ())
    freeu = [[getattr(block, name, None) for name in _FREEU] for block in blocks]
    # Not by `getattr`, which a module that has no such attribute answers a hundred times slower.
    processors: Iterator[Any] = (
        m.__dict__.get("processor", m._modules.get("processor")) for m in module.modules()
    )
    prompted = [repr(p.scale) for p in processors if type(p).__name__.startswith(_IMAGE_PROMPT)]
    fused = sorted(Names.of(module).fused)
    tuners = tuners_in(module) if with_adapters else {}
    return repr((freeu, tuners, prompted, fused))


def check_denoiser(module: nn.Module, detector: Detector) -> None:
    """Refuse a denoiser that was put in the place of the detector's own.

    Raises:
        ValueError: It is another object.
    """
    own = detector.adapter.module
    if original_of(module) is not own:
        raise ValueError(
            f"Expected the {type(own).__name__} that the detector is of, got another "
            f"{type(original_of(module)).__name__} in its place: detach, and watch the pipeline "
            "with a detector of that."
        )


def check_deployment(pipe: Any, module: nn.Module, mode: Mode, detector: Detector) -> None:
    """Refuse, by name, a denoiser that cannot be scored as it is deployed.

    Args:
        pipe: The pipeline.
        module: Its denoiser.
        mode: When scores are computed.
        detector: What scores it. One that takes gradients of some layers alone leaves others to be
            quantised.

    Raises:
        ValueError: Its weights are elsewhere, cast or quantised while it runs, where gradients are
            taken of them; or, in the background, what the calls themselves move.
    """
    module = original_of(module)
    if detector.takes_gradients:
        _check_differentiable(module)
        if detector.layers is None:
            _check_floating(module)
    elif mode == "background" and (moves := _moves(module)):
        raise ValueError(f"Expected mode='sync' with {moves}, which calls rely on.")
    if mode == "background" and module.training and (hooks := _all_registered(module)):
        raise ValueError(
            f"Expected a denoiser in eval mode with mode='background' and {sorted(hooks)}, got "
            f"{type(module).__name__} in train mode: call its `eval()`."
        )
    if mode == "background" and _is_offloaded(pipe):
        raise ValueError("Expected mode='sync' with model offloading, which calls rely on.")


def _check_differentiable(module: nn.Module) -> None:
    name = type(module).__name__
    if moves := _moves(module):
        raise ValueError(
            f"Expected {name} with its weights in place, got {moves}: fit with method='forward'."
        )
    if "layerwise_casting" in _all_registered(module):
        raise ValueError(
            f"Expected {name} in 16 bits or more, got layerwise casting: fit with method='forward'."
        )


def _moves(module: nn.Module) -> str:
    """What takes weights away between the layers' calls, in words; empty if nothing does."""
    if any("group_offloading" in hook for hook in _all_registered(module)):
        return "group offloading"
    return "sequential offloading" if any(map(_moves_weights, module.modules())) else ""


def _all_registered(module: nn.Module) -> set[str]:
    return {hook for m in module.modules() for hook in _registered(m)}


@contextmanager
def scorable(pipe: Any, module: nn.Module) -> Iterator[None]:
    """The denoiser ready to be scored: outside caches, and where it computes; then as it was."""
    module = original_of(module)
    with ExitStack() as stack:
        stack.enter_context(without_caches(module))
        if _is_offloaded(pipe):
            stack.callback(pipe.maybe_free_model_hooks)
            module.to(pipe._offload_device)
        yield


def _is_offloaded(pipe: Any) -> bool:
    """Whether whole models move between devices (`enable_model_cpu_offload`)."""
    return bool(getattr(pipe, "_all_hooks", None))


def _registered(module: nn.Module) -> list[str]:
    """Names of diffusers' own hooks."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks)


def _moves_weights(module: nn.Module) -> bool:
    """Whether accelerate takes the module's weights away after each forward pass."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(h, "offload", False) is True for h in hooks)


def _check_floating(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ValueError(
                f"Expected weights in 16 bits or more, got {name!r} of {parameter.dtype}; fit with "
                "`layers=` to score others, or with method='forward'."
            )
