"""Private copies of a model's buffers and of other tensors that a forward pass may write into."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Tensors", "TensorsOfAPass"]


#: Numbers up to which each pass has a copy of its own: a write through `.data` has no version.
_SMALL = 1 << 16


class Tensors:
    """Copies for all passes of a scoring, of values as they were at the first of them.

    Attributes:
        made: The copies by the original's identity, each with the original and its own version.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, Tensor, int]] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values as a tensor of our own, which requires no gradient."""
        known = self.made.get(id(tensor))
        if known is None or known[1]._version != known[2]:
            with torch.no_grad():
                copied = tensor.clone()
            known = self.made[id(tensor)] = tensor, copied, copied._version
        if tensor.numel() > _SMALL:
            return known[1]
        with torch.no_grad():
            return known[1].clone()


class TensorsOfAPass:
    """Copies for one pass: what shares a storage shares one there, too.

    Args:
        tensors: The copies of all passes.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        # By the address of the original: the copy, and the tensor that it was first made for.
        self._storages: dict[int, tuple[Any, Tensor]] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """As :meth:`Tensors.copy`."""
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.numel():
            return self._tensors.copy(tensor)
        storage: Any = tensor.untyped_storage()
        known = self._storages.get(storage.data_ptr())
        if tensor.is_meta or (known is None and storage.nbytes() == tensor.nbytes):
            copied = self._tensors.copy(tensor)
            self._storages[storage.data_ptr()] = copied.untyped_storage(), tensor
            return copied
        own, first = (storage.clone(), tensor) if known is None else known
        self._storages[storage.data_ptr()] = own, first
        self._tensors.made.pop(id(first), None)  # a write elsewhere would not change its version
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return tensor.new_empty(0).set_(own, *place)
