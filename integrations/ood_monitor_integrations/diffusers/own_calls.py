"""What a pipeline's own last steps show of its samples, at no pass of the denoiser more.

A scheduler is given a sample and a prediction, and gives the next sample. How their energy lies
tells how they were made: by too few steps, by guidance that is too strong, by another LoRA. It
tells little of weights that are slightly wrong: ``benchmarks/integrations/own_calls.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_monitor import Detector
from ood_monitor.statistics.spectrum import band_energies, lag_cosines

__all__ = [
    "OWN_CALLS",
    "STEPS",
    "Update",
    "checked_updates",
    "columns_in",
    "columns_of",
    "steps_kept",
]

#: What columns are called in a batch, before their own names.
OWN_CALLS = "own_calls/"

#: Last steps of a call that are looked at.
STEPS = 3

#: An image of fewer pixels a side has no neighbours at all shifts.
_LEAST_SIDE = 3


@dataclass(frozen=True)
class Update:
    """A step of the scheduler.

    Attributes:
        given: The sample that it was given, shape (S, ...).
        prediction: What it was told of it, guidance included, shape (S, ...) or, of a learned
            variance, more channels.
        sample: What it made of that, shape (S, ...).
    """

    given: Tensor
    prediction: Tensor
    sample: Tensor

    @classmethod
    def copied(cls, given: Tensor, prediction: Tensor, sample: Tensor) -> "Update":
        """Of tensors that a pipeline may write into."""
        return cls(*(each.detach().clone() for each in (given, prediction, sample)))


def steps_kept(detector: Detector) -> int:
    """How many last steps of a call a fitted detector looks at."""
    parts = (part for part in detector.fitted.joined.parts if part.kind == "own_calls")
    names = (name for part in parts for name in part.columns.all_names)
    return max((-int(name.removeprefix(OWN_CALLS).split(".")[0]) for name in names), default=0)


def checked_updates(updates: Sequence[Update], detector: Detector) -> tuple[Update, ...]:
    """Those of a call's last updates that a detector looks at.

    Raises:
        ValueError: The call has made fewer.
    """
    kept = steps_kept(detector)
    if len(updates) < kept:
        raise ValueError(
            f"Expected a call of {kept} steps at least, which the part 'own_calls' looks at, got "
            f"one of {len(updates)}: fit on calls with as few."
        )
    return tuple(updates[len(updates) - kept :])


def columns_of(updates: Sequence[Update], count: int) -> dict[str, Tensor]:
    """Of a call's last updates, the first to the last, the columns of its B samples.

    Args:
        updates: Them.
        count: B.

    Returns:
        ``{"own_calls/-1.prediction.energy": (B, k)}``: by step from the last, -1, logarithms of the
        prediction's and the next sample's energies, by band if they are images; and cosines, with
        themselves shifted and of the sample with the prediction.
    """
    found: dict[str, Tensor] = {}
    for step, update in enumerate(updates, -len(updates)):
        channels = update.given.shape[1]
        given, prediction, sample = (
            each[:count, :channels].to(torch.promote_types(each.dtype, torch.float32))
            for each in (update.given, update.prediction, update.sample)
        )
        for name, values in (("prediction", prediction), ("sample", sample)):
            found |= {f"{step}.{name}.{k}": each for k, each in _spread_of(values).items()}
        cosine = F.cosine_similarity(given.flatten(1), prediction.flatten(1), dim=1)
        found[f"{step}.cosine"] = cosine[:, None]
    return {f"{OWN_CALLS}{name}": values.double() for name, values in found.items()}


def columns_in(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch, by their own names."""
    return {k.removeprefix(OWN_CALLS): v for k, v in batch.items() if k.startswith(OWN_CALLS)}


def _spread_of(values: Tensor) -> dict[str, Tensor]:
    """How a tensor's energy lies; a video's frames count as channels."""
    if values.ndim < 4 or min(values.shape[-2:]) < _LEAST_SIDE:
        return {"energy": _logs(values.flatten(1).square().sum(1, keepdim=True))}
    images = values.flatten(1, -3)
    return {"energy": _logs(band_energies(images)), "lag": lag_cosines(images)}


def _logs(energies: Tensor) -> Tensor:
    return energies.double().clamp_min(torch.finfo(torch.float64).tiny).log()
