"""Calls of a pipeline for their record alone, which leave neither it nor a random state changed."""

import copy
import inspect
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ood_monitor.adapters.base import cpu_generator
from ood_monitor.modules import device_of
from ood_monitor_integrations.diffusers.capture import (
    Capture,
    DenoiserCall,
    capturing,
    hooked,
    stepping,
)
from ood_monitor_integrations.diffusers.families import check_pipeline, denoiser_of
from ood_monitor_integrations.diffusers.pipeline_monitor import original_class, samples_of

__all__ = ["RecordedCall", "record_call"]

#: Of which the first shows how the denoiser is told the time, and the last need not.
_STEPS = 2


@dataclass(frozen=True)
class RecordedCall:
    """A call, and the number of samples that it gave."""

    call: DenoiserCall
    count: int


def record_call(
    pipe: Any, arguments: dict[str, Any], seed: int, *, whole: bool = False
) -> RecordedCall:
    """Call a pipeline and record what it does.

    Args:
        pipe: The pipeline, watched or not.
        arguments: Of the call.
        seed: Of the call's noise.
        whole: Whether all steps are made, or two.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: One that cannot be replayed.
    """
    check_pipeline(pipe)
    kind, twin = original_class(pipe), _twin(pipe)
    parameters = inspect.signature(kind.__call__).parameters
    if "generator" in parameters:
        arguments = {"generator": cpu_generator(seed)} | arguments
    if not whole:
        arguments = _steps(parameters, arguments) | arguments
    denoiser, controlnet = denoiser_of(twin), getattr(twin, "controlnet", None)
    capture, device = Capture(denoiser, controlnet), device_of(denoiser)
    with ExitStack() as stack:
        for module in (denoiser, controlnet):
            if isinstance(module, nn.Module):
                stack.enter_context(hooked(module))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(stepping(twin.scheduler))
        stack.enter_context(capturing(capture))
        output = kind.__call__(twin, **arguments)
    call = capture.call()
    return RecordedCall(call, samples_of(output, len(call.sample)))


def _twin(pipe: Any) -> Any:
    """The pipeline with the same components, but a scheduler of its own and no progress bar."""
    twin = copy.copy(pipe)
    # In __dict__: the pipeline's own __setattr__ would write into the shared configuration.
    twin.__dict__.pop("ood_monitor", None)
    twin.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    twin.__dict__["_progress_bar_config"] = {"disable": True}
    return twin


def _steps(parameters: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """As many steps as make two, of which img2img leaves out a share."""
    if "num_inference_steps" not in parameters:
        return {}
    strength = 1.0
    if "strength" in parameters:
        strength = float(arguments.get("strength", parameters["strength"].default))
    return {"num_inference_steps": math.ceil(_STEPS / strength)}
