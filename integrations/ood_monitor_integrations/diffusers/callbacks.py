"""What a pipeline and its user make of latents after a step, seen by the pipeline's callback.

Inpainting puts the image back around its mask, and a user's callback may write latents of its own:
what the scheduler gave last is then not what is decoded.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ood_monitor_integrations.diffusers.capture import Capture

__all__ = ["with_callback"]

_CALLBACK, _INPUTS, _LATENTS = (
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "latents",
)


def with_callback(
    kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any], capture: Capture
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with a callback that shows the latents to a capture.

    Args:
        kind: The pipeline's class. One without callbacks, or whose callbacks are not given the
            latents, is called as it was; as is one whose call fails anyway.
        args: Of the call, the pipeline first.
        kwargs: Of the call.
        capture: Takes the latents that each step ends with, after the user's own callback.
    """
    signature = inspect.signature(kind.__call__)
    unchanged = tuple(args), dict(kwargs)
    if not {_CALLBACK, _INPUTS} <= signature.parameters.keys():
        return tuple(args), _handed_on(signature, kwargs, capture)
    if _LATENTS not in getattr(kind, "_callback_tensor_inputs", ()):
        return unchanged
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return unchanged
    given, users = bound.arguments, bound.arguments.get(_CALLBACK)
    names = getattr(users, "tensor_inputs", None) or given.get(_INPUTS, [_LATENTS])
    if isinstance(names, list | tuple):  # else for the pipeline to refuse
        given[_CALLBACK] = _after_step(users, names, capture)
        given[_INPUTS] = list(dict.fromkeys([*names, _LATENTS]))
    return bound.args, bound.kwargs


def _handed_on(
    signature: inspect.Signature, kwargs: Mapping[str, Any], capture: Capture
) -> dict[str, Any]:
    """Keywords of a call by ``**kwargs``, with its user's callback watched if there is one.

    None is added: nothing says that the call would take it.
    """
    users = kwargs.get(_CALLBACK)
    is_open = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if users is None or not is_open:
        return dict(kwargs)
    if getattr(users, "tensor_inputs", None):  # which the pipeline itself would ask it for
        error = ValueError(
            f"Expected a call that names {_CALLBACK!r} and {_INPUTS!r}, to see what a "
            f"{type(users).__name__} makes of its latents, got one of **kwargs: name both, or "
            "give a function."
        )
        capture.fail(error)
        return dict(kwargs)
    names = kwargs.get(_INPUTS, [_LATENTS])
    if not isinstance(names, list | tuple):
        return dict(kwargs)
    asked = {_INPUTS: list(dict.fromkeys([*names, _LATENTS]))} if _INPUTS in kwargs else {}
    return {**kwargs, **asked, _CALLBACK: _after_step(users, names, capture)}


def _after_step(users: Any, names: Sequence[str], capture: Capture) -> Any:
    def after_step(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> Any:
        changed = {}
        if users is not None:
            changed = users(pipe, step, time, {k: v for k, v in tensors.items() if k in names})
        with capture.recording():
            latents = changed.get(_LATENTS) if isinstance(changed, Mapping) else None
            latents = tensors.get(_LATENTS) if latents is None else latents
            if isinstance(latents, Tensor):
                capture.after(latents)
        return changed

    return after_step
