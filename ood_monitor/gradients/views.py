"""Parameters whose dimensions are in another order, as of a transposed matrix.

Factors of such a view are the parameter's own, read otherwise: no gradient has to be held.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ood_monitor.gradients.factors import Factor, Materialised, Outer
from ood_monitor.gradients.products import InGroups

__all__ = ["order_of", "reordered"]


def order_of(view: Tensor, base: Tensor) -> tuple[int, ...] | None:
    """Which dimension of ``base`` each of its view is, if that is all that the view changes."""
    if view._base is not base or view.ndim != base.ndim or view.dtype != base.dtype:
        return None
    if view.storage_offset() != base.storage_offset() or view.is_conj() or view.is_neg():
        return None
    left = list(zip(base.shape, base.stride(), range(base.ndim), strict=True))
    order = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        found = next((each for each in left if each[:2] == (size, stride)), None)
        if found is None or (stride == 0 and size > 1):
            return None
        left.remove(found)
        order.append(found[2])
    return tuple(order)


def reordered(factor: Factor, order: tuple[int, ...], shape: torch.Size) -> Factor:
    """The factor of a parameter of that shape, from that of its view ``base.permute(order)``."""
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    if isinstance(factor, Materialised):
        return Materialised(factor.values.permute(0, *(1 + i for i in back)))
    if isinstance(factor, Outer) and order == (1, 0):
        return Outer(factor.columns, factor.rows, shape)
    if isinstance(factor, InGroups):
        long = [i for i, size in enumerate(factor.shape) if size > 1]
        places = tuple(factor.places[long.index(i)] for i in back if i in long)
        return replace(factor, places=places, shape=shape)
    return _Reordered(factor, back)


@dataclass(frozen=True)
class _Reordered:
    """Gradients of a view as those of the tensor, whose dimensions are at ``back`` in it."""

    of_view: Factor
    back: tuple[int, ...]

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.of_view.gradients(start, stop).permute(0, *(1 + i for i in self.back))

    def row_norms(self) -> Tensor:
        return self._norms_along(0)

    def column_norms(self) -> Tensor:
        return self._norms_along(1)

    def _norms_along(self, dimension: int) -> Tensor:
        place = self.back[dimension] if dimension < len(self.back) else None
        if place is None:
            return self.of_view.row_norms().sum(1, keepdim=True)
        if place == 0:
            return self.of_view.row_norms()
        if place == 1:
            return self.of_view.column_norms()
        raise NotImplementedError("norms along a further dimension of a view")
