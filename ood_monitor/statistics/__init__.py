"""What one forward pass says: values, what the model expected of them, and its layers' inputs."""

from ood_monitor.statistics.denoising import (
    DenoiserStatistics,
    denoiser_statistics,
    has_statistics_without_noise,
)
from ood_monitor.statistics.forward import (
    ForwardStatistics,
    expected_layers,
    forward_statistics,
    has_layers,
    input_dimensions,
)
from ood_monitor.statistics.places import surprise_by_place

__all__ = [
    "DenoiserStatistics",
    "ForwardStatistics",
    "denoiser_statistics",
    "expected_layers",
    "forward_statistics",
    "has_layers",
    "has_statistics_without_noise",
    "input_dimensions",
    "surprise_by_place",
]
