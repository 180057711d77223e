"""A pipeline's call: what it takes, what it was given, how many samples it gave, of which size."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

__all__ = [
    "can_carry",
    "given_to",
    "is_open",
    "original_class",
    "own_parameters_of",
    "parameters_in",
    "parameters_of",
    "samples_of",
    "size_of",
]

#: Names of an output's samples; without one of them its first item holds them.
_SAMPLES = ("images", "image", "frames", "videos", "video", "samples", "sample", "latents")

#: Channels of an image, by which an array of three dimensions is told from a batch.
_CHANNELS = (1, 3, 4)

#: Dimensions of a scheduler's sample of a video, whose frames an output may be.
_OF_VIDEO = 5


def original_class(pipe: Any) -> type[DiffusionPipeline]:
    """The pipeline's own class, also of one that is watched."""
    kind = type(pipe)
    found: type[DiffusionPipeline] = kind.__dict__.get("_ood_monitor_original", kind)
    return found


def own_parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's own call names."""
    return inspect.signature(original_class(pipe).__call__).parameters


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes, by :func:`parameters_in`."""
    return parameters_in(original_class(pipe))


def parameters_in(kind: type) -> Mapping[str, inspect.Parameter]:
    """What the call of a pipeline's class takes.

    Of one that takes ``**kwargs``, also what the call of the class takes that it overrides: it
    hands them on.
    """
    return _taken(kind)[0]


def is_open(pipe: Any) -> bool:
    """Whether nothing says which arguments the pipeline's call takes beside those it names."""
    return _taken(original_class(pipe))[1]


def _taken(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if "__call__" not in each.__dict__:
            continue
        parameters = inspect.signature(each.__dict__["__call__"]).parameters
        found = {k: p for k, p in parameters.items() if _is_named(p)} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return found, False
    return found, True


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def given_to(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name, those by default left out."""
    signature = inspect.signature(original_class(pipe).__call__)
    bound: dict[str, Any] = dict(signature.bind(pipe, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def samples_of(output: Any, stepped: Tensor, *, is_settled: bool = False) -> int:
    """B: the samples that a call returned; of two copies for guidance, one is returned.

    Args:
        output: The call's, of any kind: an output of diffusers, a list, tuple, mapping, array,
            tensor or image, or what holds none of these, as of a pipeline that writes files.
        stepped: The sample that the scheduler was given last, (S, ...).
        is_settled: Whether the user's own function says which samples are scored: as many as are
            shown are then taken.

    Raises:
        ValueError: The output shows another number than were denoised, so that some were chosen,
            or made by several runs.
    """
    shown = _shown(output)
    fitting = [count for count in shown if count and len(stepped) % count == 0]
    if shown and is_settled:
        return next(iter(fitting), shown[-1])
    for count in fitting:
        if _are_copies(stepped, count):
            return count
    are_frames = stepped.ndim == _OF_VIDEO and shown and min(shown) > len(stepped)
    if not shown or are_frames:
        return _distinct(stepped)
    raise ValueError(
        f"Expected all samples that were denoised to be returned, got {shown[-1]} of "
        f"{len(stepped)}, which are not copies, in a {type(output).__name__}: have the call return "
        "a list or batch of them all, or say by `monitor_pipeline(batch=...)` which are scored."
    )


def _shown(output: Any) -> list[int]:
    """How many samples an output may hold, the likelier first; empty if it does not show it."""
    if isinstance(output, Mapping):
        named = [name for name in _SAMPLES if name in output]
        return _shown(output[named[0]] if named else tuple(output.values()))
    if isinstance(output, tuple):
        are_images = len(output) > 1 and all(map(_is_image, output))
        return [len(output)] * are_images + (_shown(output[0]) if output else [])
    if isinstance(output, list):
        return [len(output)]
    dimensions = getattr(output, "ndim", None)
    if isinstance(dimensions, int) and dimensions > 1:
        return [len(output)] + [1] * (_is_image(output) or dimensions == 2)
    if isinstance(output, Image):
        return [1]
    named = [name for name in _SAMPLES if name in getattr(output, "__dict__", {})]
    return _shown(getattr(output, named[0])) if named else []


def _is_image(value: Any) -> bool:
    if isinstance(value, Image):
        return True
    shape = tuple(getattr(value, "shape", ()))
    return len(shape) == 3 and (shape[0] in _CHANNELS or shape[-1] in _CHANNELS)


def _distinct(stepped: Tensor) -> int:
    """The rows, without a copy for guidance."""
    half, odd = divmod(len(stepped), 2)
    return half if half and not odd and _are_copies(stepped, half) else len(stepped)


def _are_copies(stepped: Tensor, count: int) -> bool:
    """Whether rows are the first so many, repeated."""
    first, *copies = torch.split(stepped.nan_to_num(), count)
    return all(each.equal(first) for each in copies)


def can_carry(output: Any) -> bool:
    """Whether an attribute can be put on an output.

    Not on what is saved, compared or shown as data: tensors, images, arrays, plain containers.
    """
    is_data = isinstance(output, Tensor | Image | nn.Module | type) or (
        type(output).__module__ in ("builtins", "collections", "numpy")
    )
    return not is_data and isinstance(getattr(output, "__dict__", None), dict)


def size_of(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what a call makes, as it was asked to, or by the pipeline's default."""
    height, width = arguments.get("height"), arguments.get("width")
    default = getattr(pipe, "default_sample_size", None)
    if default is not None and hasattr(pipe, "vae_scale_factor"):
        side = int(default * pipe.vae_scale_factor)
        height, width = height or side, width or side
    return None if height is None or width is None else (height, width)
