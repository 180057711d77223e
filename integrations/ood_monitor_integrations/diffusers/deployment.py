"""The denoiser as it is deployed: what has changed, what is refused, what is put aside."""

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ood_monitor import Detector
from ood_monitor.modules import stored_weights
from ood_monitor.processes import Lock
from ood_monitor.saving.fingerprints import digest, marks
from ood_monitor_integrations.diffusers.denoisers import original_of

__all__ = ["Mode", "check_deployment", "scorable", "settings_of", "weights_digest"]

#: When scores are computed: before a call returns, or in a thread of the monitor's own.
Mode: TypeAlias = Literal["sync", "background"]

#: Elements of each parameter that are looked at to see a change.
_ELEMENTS = 16

#: Attributes that `enable_freeu` sets on up blocks.
_FREEU = ("s1", "s2", "b1", "b2")


@dataclass
class _Known:
    """What was last seen of a module, and digests of the states that it was seen in."""

    marks: int = 0
    state: str = ""
    digests: dict[str, str] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = Lock()


def weights_digest(module: nn.Module) -> str:
    """The digest of a module's weights, as a detector remembers it; cheap unless they changed.

    All weights are read when a few elements of each say that the state is new, and these when a
    parameter was written to or moved.
    """
    with _lock:
        known, seen = _known.setdefault(module, _Known()), marks(module)
        if seen != known.marks:
            known.marks, known.state = seen, _sampled(module)
        if known.state not in known.digests:
            known.digests[known.state] = digest(module)
        return known.digests[known.state]


def settings_of(module: nn.Module) -> str:
    """What changes a denoiser beside its weights: FreeU, and which adapters are on."""
    blocks = getattr(module, "up_blocks", ())
    freeu = [[getattr(block, name, None) for name in _FREEU] for block in blocks]
    adapters = [
        (str(m.active_adapters), bool(m.disable_adapters), str(m.scaling))
        for m in module.modules()
        if hasattr(m, "active_adapters") and hasattr(m, "scaling")
    ]
    return repr((freeu, adapters))


def _sampled(module: nn.Module) -> str:
    state, parts = hashlib.sha256(), dict[torch.device, list[Tensor]]()
    for name, parameter in stored_weights(module):
        state.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        flat = parameter.detach().flatten()
        chosen = flat[:: max(1, len(flat) // _ELEMENTS)]
        parts.setdefault(parameter.device, []).append(chosen.double())
    for tensors in parts.values():
        state.update(torch.cat(tensors).cpu().numpy().tobytes())
    return state.hexdigest()


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
            taken of them; or, in the background, what the calls themselves move or cache.
    """
    module = original_of(module)
    if detector.takes_gradients:
        _check_differentiable(module)
        if detector.layers is None:
            _check_floating(module)
    elif mode == "background" and (moves := _moves(module)):
        raise ValueError(f"Expected mode='sync' with {moves}, which calls rely on.")
    if mode == "background" and _is_cached(module):
        name = type(module).__name__
        raise ValueError(f"Expected mode='sync' for {name} with a cache, which scoring suspends.")
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
        if _is_cached(module):
            stack.enter_context(_without_cache(module))
        if _is_offloaded(pipe):
            stack.callback(pipe.maybe_free_model_hooks)
            module.to(pipe._offload_device)
        yield


@contextmanager
def _without_cache(module: Any) -> Iterator[None]:
    config = module._cache_config
    module.disable_cache()
    try:
        yield
    finally:
        module.enable_cache(config)


def _is_cached(module: Any) -> bool:
    return bool(getattr(module, "is_cache_enabled", False))


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
