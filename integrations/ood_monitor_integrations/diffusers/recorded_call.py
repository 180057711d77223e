"""Calls of a pipeline for their record alone, which leave neither it nor a random state changed."""

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ood_monitor.adapters.base import cpu_generator
from ood_monitor.modules import device_of
from ood_monitor_integrations.diffusers.callbacks import with_callback
from ood_monitor_integrations.diffusers.calls import original_class, parameters_of, samples_of
from ood_monitor_integrations.diffusers.capture import (
    Capture,
    DenoiserCall,
    Step,
    capturing,
    hooked,
    stepping,
)
from ood_monitor_integrations.diffusers.denoisers import (
    called_in,
    check_pipeline,
    denoiser_of,
)

__all__ = ["OF_STEPS", "RecordedCall", "needs_image", "record_call", "unguided_steps"]

#: Of which the first shows how the denoiser is told the time, and the last need not.
_STEPS = 2

#: Of a call that is read: enough to tell one map of the time from another.
_STEPS_TO_READ = 4

#: Arguments that name the steps themselves.
OF_STEPS = ("timesteps", "sigmas")

#: Arguments by which guidance is switched off, and how.
_GUIDANCE, _OFF = ("guidance_scale", "true_cfg_scale", "pag_scale"), (1.0, 0.0)

#: How much of a call's steps is made: a few, and only the last kept; a few, all kept; or all.
Extent: TypeAlias = Literal["conditions", "reading", "whole"]


@dataclass(frozen=True)
class RecordedCall:
    """A call, and the number of samples that it gave."""

    call: DenoiserCall
    count: int


def record_call(
    pipe: Any,
    arguments: dict[str, Any],
    seed: int,
    extent: Extent = "conditions",
    *,
    kept: int = 0,
    steps: int | None = None,
) -> RecordedCall:
    """Call a pipeline and record what it does.

    Args:
        pipe: The pipeline, watched or not.
        arguments: Of the call.
        seed: Of the call's noise.
        extent: How much of its steps is made.
        kept: Of how many last steps the tensors are copied.
        steps: How many they are, if not as few as will do.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: One that cannot be replayed.
    """
    check_pipeline(pipe)
    kind, twin, parameters = original_class(pipe), _twin(pipe), parameters_of(pipe)
    if "generator" in parameters:
        arguments = {"generator": cpu_generator(seed)} | arguments
    if extent != "whole" and not any(arguments.get(name) is not None for name in OF_STEPS):
        few = steps or (_STEPS_TO_READ if extent == "reading" else _STEPS)
        arguments = arguments | _steps(parameters, arguments, few)
    denoiser, controlnet = denoiser_of(twin), getattr(twin, "controlnet", None)
    called, is_read = called_in(twin), extent == "reading"
    capture = Capture(denoiser, controlnet, whole=is_read, kept=kept, called=called)
    device = device_of(denoiser)
    with ExitStack() as stack:
        for module in (*called, controlnet):
            if isinstance(module, nn.Module):
                stack.enter_context(hooked(module))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(stepping(twin.scheduler))
        stack.enter_context(capturing(capture))
        args, kwargs = with_callback(kind, (twin,), arguments, capture)
        output = kind.__call__(*args, **kwargs)
    call = capture.call()
    return RecordedCall(call, samples_of(output, len(call.sample)))


def needs_image(pipe: Any, arguments: dict[str, Any], seed: int) -> bool:
    """Whether a call fails without the user's image, which is then the sample's own.

    A pipeline that can do without, as models for editing can, takes an image as context.
    """
    parameter = parameters_of(pipe).get("image")
    if parameter is None or "image" in arguments or getattr(pipe, "controlnet", None) is not None:
        return False
    if parameter.default is inspect.Parameter.empty:
        return True
    try:
        record_call(pipe, arguments, seed)
    except Exception:  # of any kind, as pipelines check their arguments
        return True
    return False


def unguided_steps(pipe: Any, arguments: dict[str, Any], seed: int) -> Iterator[Step]:
    """Last steps of the call with its guidance switched off, by each value that may do so."""
    parameters = parameters_of(pipe)
    names = [name for name in _GUIDANCE if name in parameters]
    for off in _OFF if names else ():
        found: RecordedCall | None = None
        with suppress(Exception):  # as pipelines refuse a scale: another may do
            found = record_call(pipe, arguments | dict.fromkeys(names, off), seed)
        if found is not None:
            yield found.call.last


def _twin(pipe: Any) -> Any:
    """The pipeline with the same components, but a scheduler of its own and no progress bar."""
    twin = copy.copy(pipe)
    # In __dict__: the pipeline's own __setattr__ would write into the shared configuration.
    twin.__dict__.pop("ood_monitor", None)
    twin.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    twin.__dict__["_progress_bar_config"] = {"disable": True}
    return twin


def _steps(parameters: Any, arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """As many steps as make so many, of which img2img leaves out a share."""
    if "num_inference_steps" not in parameters:
        return {}
    strength = 1.0
    if "strength" in parameters:
        strength = float(arguments.get("strength", parameters["strength"].default))
    return {"num_inference_steps": math.ceil(steps / strength)}
