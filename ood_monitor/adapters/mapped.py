"""Looks at the values of a batch, also where `torch.func.vmap` maps over its samples.

A tensor there is one sample's, and has no value to ask for: an `if` on it raises. What stands
behind it holds the values of all samples, and those are what a check or a choice for a whole batch
asks for anyway.
"""

import torch
from torch import Tensor

__all__ = ["of_all"]


def of_all(tensor: Tensor) -> Tensor:
    """The tensor itself, or that of all samples which `vmap` maps over, of more dimensions.

    Only for what does not depend on dimensions: ``of_all(x).any()``, ``of_all(x).max()``.

    Example:
        >>> def checked(x):
        ...     assert of_all(x).max() < 3
        ...     return 2 * x
        >>> torch.func.vmap(checked)(torch.arange(3))
        tensor([0, 2, 4])
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
