"""Passes without gradients, also of a model that differentiates within its own forward pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["gradless"]

_T = TypeVar("_T")

#: What PyTorch says where something is differentiated that was computed without a graph.
_MARK = "does not require grad"

#: Of which it was seen that they differentiate.
_differentiating: WeakIdKeyDictionary = WeakIdKeyDictionary()


def gradless(holder: Any, run: Callable[[], _T]) -> _T:
    """What a pass gives, with no graph where the model can do without.

    A model that differentiates within its pass, such as an energy's score or the exact trace of a
    flow in continuous time, fails under `torch.no_grad`, unless it turns gradients on itself. It
    runs with gradients then, at once from its second pass on; what it gives may have a graph.

    Args:
        holder: What has the model, the same object each time.
        run: The pass, which begins anew whenever it is called.
    """
    if holder not in _differentiating:
        try:
            with torch.no_grad():
                return run()
        except RuntimeError as error:
            if _MARK not in str(error):
                raise
    with torch.enable_grad():
        found = run()
    _differentiating[holder] = True
    return found
