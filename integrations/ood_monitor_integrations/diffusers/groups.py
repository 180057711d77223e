"""What a pipeline's samples are grouped by: their shape, and which adapters are on."""

import zlib
from collections.abc import Iterator

from torch import nn

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch

__all__ = ["adapters_in", "group_in", "is_fitted_on"]


def group_in(detector: Detector, batch: Batch) -> str:
    """The group of a call's samples, of a detector whose adapter tells it; else an empty one."""
    own = detector.adapter.group_of(batch) if detector.fitted.groups_of_adapter else None
    return own[0] if own else ""


def is_fitted_on(detector: Detector, group: str) -> bool:
    """Whether a detector has compared such samples with others of their own group."""
    grouped = detector.fitted.grouped
    return not group or grouped is None or group in grouped.large


def adapters_in(module: nn.Module) -> str:
    """The adapters that are on, such as LoRA's, each with its scale: ``"style:0.7"``.

    Of one whose layers have several scales a checksum of them stands in its place. Empty if none is
    on.
    """
    scales: dict[str, dict[str, float]] = {}
    for layer, name, scale in _active(module):
        scales.setdefault(name, {})[layer] = scale
    return " ".join(f"{name}:{_told(scales[name])}" for name in sorted(scales))


def _active(module: nn.Module) -> Iterator[tuple[str, str, float]]:
    """Layers, adapters that are on in them, and their scales; as peft keeps them."""
    for layer, part in module.named_modules():
        if not (hasattr(part, "active_adapters") and hasattr(part, "scaling")):
            continue
        if not part.disable_adapters:
            names = (name for name in part.active_adapters if name in part.scaling)
            yield from ((layer, name, float(part.scaling[name])) for name in names)


def _told(scales: dict[str, float]) -> str:
    if len(set(scales.values())) == 1:
        return f"{next(iter(scales.values())):g}"
    return f"{zlib.crc32(repr(sorted(scales.items())).encode()):08x}"
