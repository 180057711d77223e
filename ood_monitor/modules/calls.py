"""How a copy of a module is called: without backward hooks that a process has for all modules."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["call_of"]


def call_of(module: nn.Module) -> Callable[..., Any] | None:
    """What `nn.Module.__call__` is to do instead of its own; None while there are no such hooks.

    Those of the forward pass are kept, as the module's own are: they may be a part of the model.
    """
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return functools.partial(_called, module)
    return None


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module._call_impl` calls a module, without a hook of the backward pass."""
    before = {**torch_module._global_forward_pre_hooks, **module._forward_pre_hooks}
    for key, hook in before.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            continue
        given = hook(module, args)
        if given is not None:
            args = given if isinstance(given, tuple) else (given,)
    result = module.forward(*args, **kwargs)
    with_kwargs = {
        **torch_module._global_forward_hooks_with_kwargs,
        **module._forward_hooks_with_kwargs,
    }
    after = {**torch_module._global_forward_hooks, **module._forward_hooks}
    for key, hook in after.items():
        found = (
            hook(module, args, kwargs, result) if key in with_kwargs else hook(module, args, result)
        )
        result = result if found is None else found
    return result
