"""What a pipeline's own last steps show of its samples, at no pass of the denoiser more.

A scheduler is given a sample and a prediction, and gives the next sample. How their energy lies
tells how they were made: by too few steps, by guidance that is too strong, by another LoRA. It
tells little of weights that are slightly wrong: ``benchmarks/integrations/own_calls.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_monitor import Detector
from ood_monitor.statistics.spectrum import band_energies, is_image, lag_cosines
from ood_monitor_integrations.diffusers.capture import Step

__all__ = [
    "OWN_CALLS",
    "STEPS",
    "checked_updates",
    "columns_in",
    "columns_of",
    "steps_kept",
]

#: What columns are called in a batch, before their own names.
OWN_CALLS = "own_calls/"

#: Last steps of a call that are looked at.
STEPS = 3


def steps_kept(detector: Detector) -> int:
    """How many last steps of a call a fitted detector looks at."""
    parts = (part for part in detector.fitted.joined.parts if part.kind == "own_calls")
    names = (name for part in parts for name in part.columns.all_names)
    return max((-int(name.removeprefix(OWN_CALLS).split(".")[0]) for name in names), default=0)


def checked_updates(updates: Sequence[Step], detector: Detector) -> tuple[Step, ...]:
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


def columns_of(updates: Sequence[Step], count: int) -> dict[str, Tensor]:
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
        channels = update.stepped.shape[1]
        stepped, prediction, sample = (
            each[:count, :channels].to(torch.promote_types(each.dtype, torch.float32))
            for each in (update.stepped, update.prediction, update.sample)
        )
        for name, values in (("prediction", prediction), ("sample", sample)):
            found |= {f"{step}.{name}.{k}": each for k, each in _spread_of(values).items()}
        cosine = F.cosine_similarity(stepped.flatten(1), prediction.flatten(1), dim=1)
        found[f"{step}.cosine"] = cosine[:, None]
    return {f"{OWN_CALLS}{name}": values.double() for name, values in found.items()}


def columns_in(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch, by their own names."""
    return {k.removeprefix(OWN_CALLS): v for k, v in batch.items() if k.startswith(OWN_CALLS)}


def _spread_of(values: Tensor) -> dict[str, Tensor]:
    """How a tensor's energy lies; a video's frames count as channels."""
    images = values.flatten(1, -3) if values.ndim > 3 else values
    if not is_image(images):
        return {"energy": _logs(values.flatten(1).square().sum(1, keepdim=True))}
    return {"energy": _logs(band_energies(images)), "lag": lag_cosines(images)}


def _logs(energies: Tensor) -> Tensor:
    return energies.double().clamp_min(torch.finfo(torch.float64).tiny).log()
