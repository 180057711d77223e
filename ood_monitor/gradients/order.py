"""Operations after which the rows of a tensor may be the samples in an order that the data decide.

The comparison with the loop on first use cannot see that: its two samples may be in order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["may_reorder"]


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """The functions and tensor methods of these names, with their in-place variants."""
    spellings = [spelling for name in names for spelling in (name, f"{name}_")]
    found = (getattr(owner, n, None) for owner in (torch, Tensor) for n in spellings)
    return frozenset(function for function in found if function is not None)


#: Functions (tensor, dimension, index) that take or put rows by an index along a dimension.
_INDEXED = _functions(
    "gather", "index_add", "index_copy", "index_fill", "index_select", "scatter", "scatter_add"
)

#: Functions (tensor, size, dimension) that give rows out in pieces, to be put together anyhow.
_SPLIT = _functions("chunk", "split", "split_with_sizes", "tensor_split")

#: The same, (tensor, dimension).
_UNBOUND = _functions("unbind") | {Tensor.__iter__}

#: Functions (tensor, index, dimension) that take rows by an index.
_TAKEN = _functions("take_along_dim")

#: Functions whose index runs over all dimensions at once.
_CHOOSING = _functions("index_put", "masked_select", "take")

_ITEMS = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_SUSPECTS = _INDEXED | _SPLIT | _UNBOUND | _TAKEN | _CHOOSING | _ITEMS


def may_reorder(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    n: int,
    is_data: Callable[[Tensor], bool],
) -> bool:
    """Whether the result's rows, for n gradients, may be in another order than the batch's."""
    if n == 1 or func not in _SUSPECTS:
        return False  # one gradient has no order
    rows = args[0].ndim > 0 and len(args[0]) % n == 0
    if func in _ITEMS:
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if isinstance(index, Tensor):
            return is_data(index)
        # A number or a list may come from the data, by `tolist` or `item`.
        return isinstance(index, int | list) and rows
    if func in _UNBOUND or func in _SPLIT:
        return rows and _along_rows(args, kwargs, 1 if func in _UNBOUND else 2)
    if func in _TAKEN or func in _INDEXED:
        return _along_rows(args, kwargs, 2 if func in _TAKEN else 1)
    return True


def _along_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> bool:
    """Whether a call's dimension, 0 if not given, is the first."""
    dimension = args[position] if len(args) > position else kwargs.get("dim", 0)
    return dimension in (0, -args[0].ndim)
