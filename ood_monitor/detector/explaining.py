"""Why samples are unusual: the surprise by place, and layers whose norms are not as usual."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.calibration.usual import Usual
from ood_monitor.detector.summed import norms_of
from ood_monitor.gradients.layers import Layers
from ood_monitor.statistics import surprise_by_place

__all__ = ["Explanation", "explained_by"]


@dataclass(frozen=True)
class Explanation:
    """Where B samples are unusual, and which layers say so; on the CPU, in float64.

    Attributes:
        surprise: ``{term: (B, *places)}``, nats, of each term that comes by element: log p less
            what the model expected of it at each pixel, token or column, summed over what is at one
            place: below 0, it is less likely than expected. Where no expectation is known, log p.
        surprise_z: The same in standard deviations from the mean of held-out samples at that place.
            Not of sequences, whose places differ from text to text, nor of more than 65 536 places.
        z: ``{"term/parameter": (B,)}``, the log squared gradient norm of each layer in standard
            deviations from its mean over held-out samples; empty unless it was asked for.
        shares: Of each layer its part of the sum of z^2, (B,), which add up to 1.
    """

    surprise: dict[str, Tensor]
    surprise_z: dict[str, Tensor]
    z: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)


def explained_by(
    usual: Usual,
    adapter: Adapter,
    batch: Batch,
    *,
    norms: Adapter | None,
    places: bool,
    layers: Layers,
    chunk_size: int | None,
) -> Explanation:
    """The explanation of a batch by what is usual.

    Args:
        usual: Of held-out samples.
        adapter: The model.
        batch: B samples.
        norms: The same model, as gradients are taken of it; None for no explanation by layer.
        places: Whether to explain by place.
        layers: Which parameters are features.
        chunk_size: Samples a pass.

    Raises:
        ValueError: Norms are asked for that held-out samples have not, or of a model or a batch
            that :func:`~ood_monitor.gradient_norms` refuses.
    """
    if norms is not None and not usual.layers:
        raise ValueError(
            "Expected a detector that was fitted with gradient norms of some held-out samples to "
            f"explain by layer, got one without: {usual.without or 'explain=0'}"
        )
    surprise, z = dict[str, Tensor](), dict[str, Tensor]()
    if places:
        surprise = surprise_by_place(adapter, batch, chunk_size=chunk_size)
    for term, (mean, sd) in usual.places.items():
        if term in surprise and surprise[term].shape[1:] == mean.shape:
            z[term] = (surprise[term] - torch.from_numpy(mean)) / torch.from_numpy(sd)
    if norms is None:
        return Explanation(surprise, z)
    came = norms_of(norms, batch, layers=layers, chunk_size=chunk_size).norms
    found = usual.z({name: each.double().cpu().numpy() for name, each in came.items()})
    squares = np.square(found)
    parts = squares / np.maximum(squares.sum(1, keepdims=True), np.finfo(float).tiny)
    return Explanation(surprise, z, _by(usual.layers, found), _by(usual.layers, parts))


def _by(layers: tuple[str, ...], values: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[:, i].copy()) for i, name in enumerate(layers)}
