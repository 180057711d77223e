"""By what a Trainer has multiplied gradients before a callback sees them.

It clips them first, all by one factor. So the norm of one gradient before and after tells it.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Clipping"]

#: Parameters that are asked, since a gradient may be zero, and how many of the last they are among:
#: the smallest cost the least.
_ASKED, _LAST = 2, 12


class Clipping:
    """Remembers the norm of a few gradients when they have been accumulated.

    In several processes these are not yet those of the optimiser, and nothing is remembered.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def attach(self, module: nn.Module) -> None:
        """A training of a module begins."""
        self.detach()
        trained = [p for p in module.parameters() if p.requires_grad][-_LAST:]
        for parameter in sorted(trained, key=Tensor.numel)[:_ASKED]:
            hook: Any = parameter.register_post_accumulate_grad_hook  # without annotations
            self._handles.append(hook(self._remember))

    def detach(self) -> None:
        """It is over."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    def factor(self) -> float:
        """What gradients were multiplied with since they were accumulated; 1 if nobody knows."""
        for parameter, before in self._before.values():
            if parameter.grad is None:
                continue
            ratio = float(_norm(parameter.grad) / before)  # of zeros, nan
            if 0 < ratio < float("inf"):
                return ratio
        return 1.0

    def _remember(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._before[id(parameter)] = (parameter, _norm(parameter.grad))  # type: ignore[assignment]


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
    return norm
