"""Calls of a pipeline for their record alone, which leave neither it nor a random state changed."""

import copy
import inspect
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from ood_monitor.adapters.base import cpu_generator
from ood_monitor.modules import device_of
from ood_monitor_integrations.diffusers.caches import without_caches
from ood_monitor_integrations.diffusers.callbacks import with_callback
from ood_monitor_integrations.diffusers.calls import (
    is_open,
    original_class,
    own_parameters_of,
    parameters_of,
    samples_of,
)
from ood_monitor_integrations.diffusers.capture import Capture, DenoiserCall, Step
from ood_monitor_integrations.diffusers.denoisers import (
    called_in,
    check_pipeline,
    denoiser_of,
    original_of,
)
from ood_monitor_integrations.diffusers.watching import capturing, hooked, stepping

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
    if_taken: Mapping[str, Any] = MappingProxyType({}),
) -> RecordedCall:
    """Call a pipeline and record what it does.

    The generator is its argument, where it takes one; else it draws from the global random states,
    which are seeded for the call and then as they were.

    Args:
        pipe: The pipeline, watched or not.
        arguments: Of the call.
        seed: Of the call's noise.
        extent: How much of its steps is made.
        kept: Of how many last steps the tensors are copied.
        steps: How many they are, if not as few as will do.
        if_taken: Further arguments, of which a call by ``**kwargs`` may refuse some.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: One that cannot be replayed.
    """
    check_pipeline(pipe)
    count = steps or (_STEPS_TO_READ if extent == "reading" else _STEPS)
    added = {**if_taken, **({} if extent == "whole" else _steps(pipe, arguments, count))}
    if "generator" not in arguments and _may_take(pipe, "generator"):
        added["generator"] = None
    while True:
        if "generator" in added:  # another for each trial, which may have drawn from it
            added["generator"] = cpu_generator(seed)
        try:
            return _recorded(pipe, {**arguments, **added}, seed, extent, kept)
        except TypeError as error:
            refused = _refused(pipe, added, error)
            if not refused:
                raise
            added = {name: value for name, value in added.items() if name not in refused}


def _may_take(pipe: Any, name: str) -> bool:
    return name in parameters_of(pipe) or is_open(pipe)


def _refused(pipe: Any, added: Mapping[str, Any], error: TypeError) -> set[str]:
    """Which of our own arguments a call by ``**kwargs`` was found not to take, or to give itself.

    Python names them: an unexpected keyword argument, or multiple values for one.
    """
    own = own_parameters_of(pipe)
    return {name for name in added if name not in own and repr(name) in str(error)}


def _recorded(
    pipe: Any, arguments: dict[str, Any], seed: int, extent: Extent, kept: int
) -> RecordedCall:
    kind, twin = original_class(pipe), _twin(pipe)
    denoiser, controlnet = denoiser_of(twin), getattr(twin, "controlnet", None)
    called, is_read = called_in(twin), extent == "reading"
    capture = Capture(denoiser, controlnet, whole=is_read, kept=kept, called=called)
    with ExitStack() as stack:
        for module in (*called, controlnet):
            if isinstance(module, nn.Module):
                stack.enter_context(hooked(module))
        if extent != "whole":  # what is read, and verified, hangs on no earlier step
            stack.enter_context(without_caches(original_of(denoiser)))
        stack.enter_context(_seeded(device_of(denoiser), seed))
        stack.enter_context(stepping(twin.scheduler))
        stack.enter_context(capturing(capture))
        args, kwargs = with_callback(kind, (twin,), arguments, capture)
        output = kind.__call__(*args, **kwargs)
    call = capture.call()
    return RecordedCall(call, samples_of(output, call.last.stepped))


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random states seeded within the block, and then as they were."""
    drawn, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(of_numpy)


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


def _steps(pipe: Any, arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """As many steps as make so many, of which img2img leaves out a share."""
    named = any(arguments.get(name) is not None for name in OF_STEPS)
    if named or not _may_take(pipe, "num_inference_steps"):
        return {}
    parameters, strength = parameters_of(pipe), 1.0
    if "strength" in parameters:
        strength = float(arguments.get("strength", parameters["strength"].default))
    return {"num_inference_steps": math.ceil(steps / strength)}
