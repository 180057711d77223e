"""What came, in words."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["describe"]


def describe(batch: Any) -> str:
    """A short description of what came, for error messages."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and dtype {batch.dtype}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)} items"
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    return f"{type(batch).__name__}"
