"""Whether a model keeps what its passes compute, where no view of it reaches.

An activation that a hook puts into a global dictionary is there after the pass. Of `vmap` it would
be a tensor that raises whenever its user looks at it.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.modules import Passes

__all__ = ["is_keeping", "noting"]

#: What holds a model that keeps something; False where only a cycle of objects of a view did.
_keeping: WeakIdKeyDictionary = WeakIdKeyDictionary()


@contextmanager
def noting(passes: Passes[Any]) -> Iterator[None]:
    """Note whether something that passes within make is kept after them.

    Not of a model that is scored in place, which `vmap` never is.
    """
    if passes.in_place or passes.holder in _keeping:
        yield
        return
    made = _Made()
    with made:
        yield
    passes.forget()
    if made.are_left():
        gc.collect()  # a view may hold itself: by a hook, say
        _keeping[passes.holder] = made.are_left()


def is_keeping(passes: Passes[Any]) -> bool:
    """Whether that was noted."""
    return bool(_keeping.get(passes.holder))  # type: ignore[no-untyped-call]


class _Made(TorchFunctionMode):
    """Knows which tensors passes made that depend on weights, or on what `vmap` maps over."""

    def __init__(self) -> None:
        super().__init__()
        self._references: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # of a compiled function's tracer, which knows no `vmap`
            return result
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and _depends(tensor):
                self._references.append(weakref.ref(tensor))
        return result

    def are_left(self) -> bool:
        """Whether one of them is still there."""
        return any(reference() is not None for reference in self._references)


def _depends(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        is_mapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        return is_mapped or tensor.grad_fn is not None
