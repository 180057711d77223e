r"""A stream of training batches: flags the unusual ones while the model is still changing.

A calibration goes stale with every step of the optimiser, so nothing here is promised: no
p-value, no false-alarm rate. Each layer's log squared gradient norm, a mean over the batch, is
compared with its own recent past by a location m and a scale s that forget exponentially,

.. math::
    z = (v - m) / s, \quad m \leftarrow m + \eta \, s \, \psi(z), \quad
    s \leftarrow s + \eta \, s \, (\sqrt{\pi / 2} \, |\psi(z)| - 1)

with :math:`\eta = 1 - 2^{-1 / \text{half\_life}}` and psi clipping at 3, so that an outlier moves
neither by more than a batch at three standard deviations does. The score is the root mean square of
z over the layers, about 1 for a usual batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.checks import number, whole
from ood_monitor.densities import Array
from ood_monitor.densities.features import table
from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.layers import Layers, checked_layers

__all__ = ["TrainingScore", "TrainingStream"]

#: Deviations count as at most this, in standard deviations.
_CLIP = 3.0

#: A layer's scale is at least this: in units of the logarithm, a thousandth of a change.
_SMALLEST_SCALE = 1e-3

_STATE_FORMAT = 1


@dataclass(frozen=True)
class TrainingScore:
    """What is said of one batch.

    Attributes:
        score: Root mean square of z over the layers; nan while warming up.
        flagged: Whether it is above the threshold.
        z: ``{"term/parameter": z}``, each layer's deviation from its recent past.
        batches: Batches so far, this one included.
    """

    score: float
    flagged: bool
    z: dict[str, float]
    batches: int


class TrainingStream:
    """Compares each batch's gradient norms with those of the batches before.

    Args:
        adapter: The model in training, which :meth:`update` leaves as it was; None if only
            :meth:`observe` is called.
        layers: Which parameters; all by default. A few, such as those of
            :func:`~ood_monitor.last_layers`, cost less.
        half_life: Batches after which a batch counts half.
        threshold: Score above which a batch is flagged.
        warm_up: Batches that only set the baseline.

    Raises:
        ValueError: A half-life or threshold that is not positive and finite, or a warm-up below 2.
        TypeError: An option of another type.

    Example:
        >>> import torch, ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
        >>> stream = TrainingStream(om.LogLikelihood(flow), warm_up=20)
        >>> generator = torch.Generator().manual_seed(0)
        >>> usual = [stream.update(torch.rand(8, 1, 4, 4, generator=generator)) for _ in range(40)]
        >>> any(score.flagged for score in usual), stream.update(torch.ones(8, 1, 4, 4) * 5).flagged
        (False, True)
    """

    def __init__(
        self,
        adapter: Adapter | None = None,
        *,
        layers: Layers = None,
        half_life: float = 200.0,
        threshold: float = 4.0,
        warm_up: int = 50,
    ) -> None:
        self._adapter, self._layers = adapter, checked_layers(layers)
        self._rate = 1 - 2 ** (-1 / number("half_life", half_life, 0, ends="()"))
        self._threshold = number("threshold", threshold, 0, ends="()")
        self._warm_up = whole("warm_up", warm_up, 2)
        self._names: tuple[str, ...] = ()
        self._location = self._scale = np.zeros(0)
        self._first: list[Array] = []
        self._batches = 0

    def update(self, batch: Batch) -> TrainingScore:
        """Score one batch, and take it in.

        Raises:
            ValueError: No adapter, or a batch that :func:`~ood_monitor.gradient_norms` refuses;
                nothing changes.
        """
        if self._adapter is None:
            raise ValueError("Expected an adapter to take gradients with, got None.")
        names, norms = table(gradient_norms(self._adapter, batch, layers=self._layers))
        # A mean of logs, which one sample of a batch cannot make its own.
        return self._take(names, _log(norms).mean(0))

    def observe(self, norms: Mapping[str, float]) -> TrainingScore:
        """Score one batch by the squared norms of its gradient, and take it in.

        Args:
            norms: Of the mean loss's gradient, ``{layer: squared norm}``, as an optimiser is about
                to use it.

        Raises:
            ValueError: Other layers than before, or a norm that is not finite; nothing changes.
        """
        values = np.array(list(norms.values()), dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite norms, got {int((~np.isfinite(values)).sum())} not.")
        return self._take(tuple(norms), _log(values))

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as primitives that JSON can hold."""
        return {
            "format": _STATE_FORMAT,
            "names": list(self._names),
            "location": self._location.tolist(),
            "scale": self._scale.tolist(),
            "first": [values.tolist() for values in self._first],
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where :meth:`state_dict` was called.

        Raises:
            ValueError: A state of another format.
        """
        if state.get("format") != _STATE_FORMAT:
            found = state.get("format")
            raise ValueError(f"Expected a state of format {_STATE_FORMAT}, got {found!r}.")
        self._names, self._batches = tuple(state["names"]), int(state["batches"])
        self._location, self._scale = np.array(state["location"]), np.array(state["scale"])
        self._first = [np.array(values) for values in state["first"]]

    def _take(self, names: tuple[str, ...], values: Array) -> TrainingScore:
        if self._batches and names != self._names:
            raise ValueError(
                f"Expected the {len(self._names)} layers of the batches before, got {len(names)}."
            )
        self._batches, self._names = self._batches + 1, names
        if self._batches <= self._warm_up:
            self._warm(values)
            return TrainingScore(math.nan, False, {}, self._batches)
        z = (values - self._location) / self._scale
        score = float(np.sqrt(np.mean(np.square(z))))
        self._forget(z)
        named = dict(zip(names, z.tolist(), strict=True))
        return TrainingScore(score, score > self._threshold, named, self._batches)

    def _warm(self, values: Array) -> None:
        self._first.append(values)
        if self._batches == self._warm_up:
            first = np.stack(self._first)
            self._location = np.median(first, axis=0)
            deviation = np.median(np.abs(first - self._location), axis=0)
            self._scale = np.maximum(1.4826 * deviation, _SMALLEST_SCALE)  # of a Normal
            self._first = []

    def _forget(self, z: Array) -> None:
        clipped = np.clip(z, -_CLIP, _CLIP)
        step = self._rate * self._scale
        self._location = self._location + step * clipped
        spread = math.sqrt(math.pi / 2) * np.abs(clipped) - 1
        self._scale = np.maximum(self._scale + step * spread, _SMALLEST_SCALE)


def _log(norms: Array) -> Array:
    return np.log(np.clip(norms, np.finfo(float).tiny, np.finfo(float).max))
