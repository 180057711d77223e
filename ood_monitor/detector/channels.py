"""Realised gradient norms by input channel of each layer: those that expected norms foretell.

The weights are those of the layers that have an expected norm, by the same groups of channels, so
that each realised norm stands beside its expectation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.densities.features import layer_of
from ood_monitor.detector.summed import norms_of
from ood_monitor.gradients import GradientNorms
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.statistics import input_dimensions
from ood_monitor.statistics.hooks import grouped

__all__ = ["channel_norms"]

_AXES: tuple[Literal["row", "column"], ...] = ("row", "column")


def channel_norms(
    adapter: Adapter,
    batch: Batch,
    *,
    differentiated: Adapter,
    layers: Layers,
    chunk_size: int | None,
    fitted: Sequence[str] = (),
) -> GradientNorms:
    """Terms, and squared gradient norms of B samples by groups of input channels.

    Args:
        adapter: The model.
        batch: The samples.
        differentiated: The same model, as gradients are taken of it.
        layers: Which parameters are features.
        chunk_size: Samples a pass.
        fitted: The columns that a detector was fitted on, "term/parameter[group]"; weights of
            layers that this batch calls none of have zeros.

    Returns:
        Norms ``{"term/parameter": (B, G)}``.

    Raises:
        ValueError: As :func:`~ood_monitor.gradient_norms`, or no layer is called as a module.
    """
    chosen = selection(adapter.module, layers)
    by = {
        name: _AXES[dimension]
        for name, dimension in input_dimensions(adapter, batch).items()
        if chosen(name)
    }
    if not by:
        raise ValueError(
            f"Expected layers={layers!r} to choose weights of convolutions or linear maps, got "
            "none; take norms by tensor, the part 'gradient_norms'."
        )
    found = norms_of(
        differentiated, batch, layers=by.__contains__, granularity=by, chunk_size=chunk_size
    )
    norms = {key: grouped(values) for key, values in found.norms.items()}
    return replace(found, norms=_as_fitted(norms, fitted) if fitted else norms)


def _as_fitted(norms: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Tensor]:
    """The norms that a detector knows, in its order."""
    like = next(iter(norms.values()))
    return {
        key: norms[key] if key in norms else like.new_zeros(len(like), width)
        for key, width in Counter(map(layer_of, columns)).items()
    }
