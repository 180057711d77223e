"""Modules: a model as scoring runs it, which shares its weights and leaves no trace in it."""

from ood_monitor.modules.gradless import gradless
from ood_monitor.modules.lockstep import Lockstep
from ood_monitor.modules.names import Names, Part, part_of, tuners_in, weights_in_use
from ood_monitor.modules.shards import (
    fully_sharded,
    is_shard,
    is_sharded,
    local_part,
    whole,
)
from ood_monitor.modules.view import Passes, scored, scoring_in_place, scoring_view
from ood_monitor.modules.weights import (
    device_of,
    dtype_of,
    leaf_parameters,
    precision_of,
    stored_weights,
)

__all__ = [
    "Lockstep",
    "Names",
    "Part",
    "Passes",
    "device_of",
    "dtype_of",
    "fully_sharded",
    "gradless",
    "is_shard",
    "is_sharded",
    "leaf_parameters",
    "local_part",
    "part_of",
    "precision_of",
    "scored",
    "scoring_in_place",
    "scoring_view",
    "stored_weights",
    "tuners_in",
    "weights_in_use",
    "whole",
]
