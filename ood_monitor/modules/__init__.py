"""Modules: a model as scoring runs it, which shares its weights and leaves no trace in it."""

from ood_monitor.modules.gradless import gradless
from ood_monitor.modules.view import Passes, scored, scoring_in_place, scoring_view
from ood_monitor.modules.weights import (
    device_of,
    dtype_of,
    leaf_parameters,
    precision_of,
    stored_weights,
)

__all__ = [
    "Passes",
    "device_of",
    "dtype_of",
    "gradless",
    "leaf_parameters",
    "precision_of",
    "scored",
    "scoring_in_place",
    "scoring_view",
    "stored_weights",
]
