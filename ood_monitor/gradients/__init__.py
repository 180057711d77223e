"""Exact per-sample, per-layer squared gradient norms at the cost of about one training step."""

from ood_monitor.gradients.norms import (
    GradientNorms,
    Granularity,
    Way,
    gradient_norms,
    last_layers,
    terms_and_norms,
)

__all__ = [
    "GradientNorms",
    "Granularity",
    "Way",
    "gradient_norms",
    "last_layers",
    "terms_and_norms",
]
