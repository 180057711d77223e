"""Whether a detector scores here as it did where it was fitted."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.densities import Array
from ood_monitor.modules import device_of, dtype_of
from ood_monitor.saving.fingerprints import names_of
from ood_monitor.saving.fitted import Fitted
from ood_monitor.saving.probe import Probe, Verification
from ood_monitor.saving.provenance import libraries_of

__all__ = ["remembered_in", "verified"]


def remembered_in(probe: Probe, batches: Iterable[Batch]) -> Iterator[tuple[list[str], Batch]]:
    """Of batches, the samples that a detector remembers, with their names."""
    for batch in batches:
        names = names_of(batch)
        rows = [i for i, name in enumerate(names) if name in probe.samples]
        if rows:
            yield [names[i] for i in rows], _rows_of(batch, torch.tensor(rows, device="cpu"))


def _rows_of(batch: Batch, rows: torch.Tensor) -> Batch:
    return map_tensors(lambda tensor: tensor[rows.to(tensor.device)], batch)


def verified(
    fitted: Fitted, module: torch.nn.Module, found: Mapping[str, tuple[float, int]], fpr: float
) -> Verification:
    """Compare ranks found here with those remembered.

    Args:
        fitted: What remembers.
        module: The model, for the message.
        found: Score and group by name.
        fpr: At which samples are flagged.

    Raises:
        ValueError: None was found, or p-values differ by more than half of ``fpr``.
    """
    probe = fitted.probe
    assert probe is not None
    if not found:
        raise ValueError(
            f"Expected held-out data that hold some of the {len(probe.samples)} calibration "
            "samples which the detector remembers, got none: give the data that it was fitted on, "
            "to the bit."
        )
    known = dict(zip(probe.samples, zip(probe.scores, probe.groups, strict=True), strict=True))
    moved = [name for name, (_, group) in found.items() if known[name][1] != group]
    if moved:
        raise ValueError(
            f"Expected each sample in the group that it was in, got {len(moved)} of {len(found)} "
            "in another: `groups` is another function, or gives other labels."
        )
    compared = [
        _compared(fitted.calibration_of(group), known[name][0], score)
        for name, (score, group) in found.items()
    ]
    steps, difference = (max(column) for column in zip(*compared, strict=True))
    if difference > fpr / 2:
        raise ValueError(
            f"Expected p-values as where the detector was fitted, got some that differ by "
            f"{difference:.3g}, more than half of fpr {fpr:g}. It was fitted in {fitted.dtype} "
            f"with {_versions(fitted.provenance.libraries)}; here the model is in "
            f"{dtype_of(module)} on {device_of(module)} with "
            f"{_versions(libraries_of(fitted.provenance.libraries))}. Recalibrate it here, or fit "
            "it again."
        )
    return Verification(len(found), len(probe.samples), difference, int(steps))


def _compared(calibration: Array, before: float, now: float) -> tuple[int, float]:
    """By how many of the other calibration samples two scores differ, and by which p-value.

    One that is nan now differs by all.
    """
    others = np.delete(calibration, np.searchsorted(calibration, before))
    if np.isnan(now):
        return len(others), 1.0
    steps = int(abs(np.diff(np.searchsorted(others, [before, now]))[0]))
    return steps, steps / (len(others) + 1)


def _versions(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items()) or "no versions"
