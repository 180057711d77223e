"""The training stream: the gradients that an optimiser is about to use are already there."""

import copy
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor import TrainingStream
from ood_monitor.drift import TrainingScore
from ood_monitor.gradients.layers import Layers, selection

__all__ = ["FlaggedBatch", "Step", "TrainingWatch"]

_log = logging.getLogger(__name__)

#: Flagged batches that are kept, layers named of each, and log lines written.
_KEPT, _NAMED_LAYERS, _LINES = 1000, 5, 20

#: What an infinite score counts as in a mean.
_LARGEST = 1e6


@dataclass(frozen=True)
class FlaggedBatch:
    """A training batch whose gradient is unlike those of the batches before.

    With gradients accumulated over batches, the last of them; in several processes the gradient is
    the mean over all.

    Attributes:
        epoch: Of the batch, from 0.
        batch_idx: In the epoch, from 0.
        score: Root mean square of z over the layers; infinite if a gradient was not finite.
        layers: ``((name, z), ...)`` of the layers furthest from their recent past.
    """

    epoch: int
    batch_idx: int
    score: float
    layers: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Step:
    """An optimiser's step that is about to be made.

    Attributes:
        optimizer: Has the parameters that it steps, as `param_groups`.
        which: Number of the optimiser, where a training has several.
        epoch: Of the batch, from 0.
        batch_idx: In the epoch, from 0.
        skips_infinite: Whether the step is left out where a gradient is not finite, as the gradient
            scaler of mixed precision does while it looks for its scale.
        is_told: Whether this process writes what it finds to the log.
        factor: What gradients were multiplied with, as by clipping, before they are seen.
    """

    optimizer: Any
    which: int
    epoch: int
    batch_idx: int
    skips_infinite: bool
    is_told: bool
    factor: float = 1.0


class TrainingWatch:
    """Compares each step's gradient with those of the steps before, one stream per optimiser.

    A heuristic: nothing is promised of how often a batch is flagged.

    Args:
        template: A fresh stream, of the settings that all streams have.
        layers: Which parameters; all by default.
        name: In the log.

    Attributes:
        flagged: The latest flagged batches, the oldest first.
        count: How many were flagged.
        scored: How many were scored since :meth:`summary`.
    """

    def __init__(self, template: TrainingStream, layers: Layers, name: str) -> None:
        self.flagged: deque[FlaggedBatch] = deque(maxlen=_KEPT)
        self.count = 0
        self._template, self._layers, self._name = template, layers, name
        self._streams: dict[int, TrainingStream] = {}
        self._flagged_before, self._total, self.scored = 0, 0.0, 0
        self.begin()

    def begin(self) -> None:
        """Training begins, maybe of another model."""
        self._parameters: dict[int, list[tuple[str, nn.Parameter]]] = {}

    def take(self, module: nn.Module, step: Step) -> TrainingScore | None:
        """Score the gradient that an optimiser is about to use; None if nothing is said of it."""
        which = step.which
        if which not in self._parameters:
            self._parameters[which] = _of(step.optimizer, module, self._layers)
        norms = squared_norms(self._parameters[which])
        if not norms:
            return None
        if step.factor != 1:
            norms = {name: norm / step.factor**2 for name, norm in norms.items()}
        score = self._score(which, norms)
        if math.isnan(score.score) or (step.skips_infinite and math.isinf(score.score)):
            return None
        self.scored, self._total = self.scored + 1, self._total + min(score.score, _LARGEST)
        if score.flagged:
            self._flag(step, score)
        return score

    def summary(self) -> dict[str, float]:
        """Mean score and share of flagged steps since this was last asked for; 0 without steps."""
        flagged, scored = self.count - self._flagged_before, max(self.scored, 1)
        found = {"score_mean": self._total / scored, "flagged_rate": flagged / scored}
        self._flagged_before, self._total, self.scored = self.count, 0.0, 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """Of the streams, as primitives."""
        return {str(which): stream.state_dict() for which, stream in self._streams.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the streams."""
        for which, stream in state.items():
            self._streams[int(which)] = copy.deepcopy(self._template)
            self._streams[int(which)].load_state_dict(stream)

    def _score(self, which: int, norms: dict[str, float]) -> TrainingScore:
        if not all(map(math.isfinite, norms.values())):
            # It must not enter the baseline, nor pass unseen.
            return TrainingScore(math.inf, True, {}, 0)
        if which not in self._streams:
            self._streams[which] = copy.deepcopy(self._template)
        try:
            return self._streams[which].observe(norms)
        except ValueError:  # other parameters are trained now: their past is another
            self._streams[which] = copy.deepcopy(self._template)
            return self._streams[which].observe(norms)

    def _flag(self, step: Step, score: TrainingScore) -> None:
        furthest = sorted(score.z.items(), key=lambda item: -abs(item[1]))[:_NAMED_LAYERS]
        batch = FlaggedBatch(step.epoch, step.batch_idx, score.score, tuple(furthest))
        self.flagged.append(batch)
        self.count += 1
        if step.is_told and self.count <= _LINES:
            _log.warning(
                "%s: unusual gradient of training batch %d in epoch %d, score %.1f, most in %s. "
                "[OOD512]",
                *(self._name, batch.batch_idx, batch.epoch, batch.score),
                ", ".join(name for name, _ in batch.layers) or "values that are not finite",
            )


def squared_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Squared norm of each gradient there is, with one transfer from the device."""
    found = [(name, p.grad) for name, p in parameters]  # asking for a gradient takes its time
    named = {name: grad for name, grad in found if grad is not None and not grad.is_sparse}
    if not named:
        return {}
    norms = _norms(list(named.values()))
    first, precision = norms[0].device, reduce(torch.promote_types, (n.dtype for n in norms))
    together = torch.stack([norm.to(first, precision) for norm in norms]).cpu()
    # Squared here: not every device has double precision.
    return dict(zip(named, together.double().square().tolist(), strict=True))


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """The norm of each, (); in single precision, or in its own if that holds more."""
    is_low = [torch.promote_types(g.dtype, torch.float32) is torch.float32 for g in gradients]
    low = [gradient for gradient, chosen in zip(gradients, is_low, strict=True) if chosen]
    high = [gradient for gradient, chosen in zip(gradients, is_low, strict=True) if not chosen]
    lows = iter(torch._foreach_norm(low, 2, torch.float32) if low else ())
    highs = iter(torch._foreach_norm(high, 2) if high else ())  # double precision, and complex
    return [next(lows if chosen else highs) for chosen in is_low]


def _of(optimizer: Any, module: nn.Module, layers: Layers) -> list[tuple[str, nn.Parameter]]:
    """The chosen parameters that an optimiser steps; by default all, a tuner's own among them."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if layers is None:
        return [(name, p) for name, p in module.named_parameters() if id(p) in own]
    chosen = selection(module, layers)
    return [(name, p) for name, p in module.named_parameters() if id(p) in own and chosen(name)]
