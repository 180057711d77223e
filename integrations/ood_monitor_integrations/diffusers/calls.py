"""A pipeline's call: what it takes, what it was given, how many samples it gave, of which size."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

__all__ = ["given_to", "original_class", "parameters_of", "samples_of", "size_of"]


def original_class(pipe: Any) -> type[DiffusionPipeline]:
    """The pipeline's own class, also of one that is watched."""
    kind = type(pipe)
    found: type[DiffusionPipeline] = kind.__dict__.get("_ood_monitor_original", kind)
    return found


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes."""
    return inspect.signature(original_class(pipe).__call__).parameters


def given_to(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name, those by default left out."""
    signature = inspect.signature(original_class(pipe).__call__)
    bound: Mapping[str, Any] = signature.bind(pipe, *args, **kwargs).arguments
    return bound


def samples_of(output: Any, stepped: int) -> int:
    """B: the samples that a call returned; of two copies for guidance, one is returned."""
    first = output[0] if isinstance(output, tuple | Mapping) else output
    is_batch = isinstance(first, list) or getattr(first, "ndim", 0) > 2
    return len(first) if is_batch else stepped


def size_of(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what a call makes, as it was asked to, or by the pipeline's default."""
    height, width = arguments.get("height"), arguments.get("width")
    default = getattr(pipe, "default_sample_size", None)
    if default is not None and hasattr(pipe, "vae_scale_factor"):
        side = int(default * pipe.vae_scale_factor)
        height, width = height or side, width or side
    return None if height is None or width is None else (height, width)
