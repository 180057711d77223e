"""Short names of what numbers are: twelve hexadecimal digits of SHA-256."""

import hashlib
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn, uint8

__all__ = ["digest", "digest_of_tensors", "marks"]


def digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits of the weights' names, shapes, types and bytes.

    Persistent buffers are weights too: a batch norm's statistics change what a model says.
    """
    saved = module.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if name in saved)
    return digest_of_tensors(chain(module.named_parameters(), buffers))


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Twelve hexadecimal digits of tensors' names, shapes, types and bytes, in their order."""
    state = hashlib.sha256()
    for name, tensor in named:
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(uint8)
        state.update(raw.numpy().tobytes())
    return state.hexdigest()[:12]


def marks(module: nn.Module) -> int:
    """What changes when a parameter or buffer is replaced, moved or written to; in milliseconds.

    What is written past autograd, through ``tensor.data`` or a NumPy view, is not seen.
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    return hash(tuple((name, id(t), t.data_ptr(), _version(t)) for name, t in tensors))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
