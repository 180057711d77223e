"""What one forward pass says: values, what the model expected of them, and its layers' inputs."""

from ood_monitor.statistics.forward import (
    ForwardStatistics,
    expected_layers,
    forward_statistics,
)

__all__ = ["ForwardStatistics", "expected_layers", "forward_statistics"]
