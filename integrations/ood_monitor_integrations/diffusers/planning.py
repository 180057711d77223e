"""The plan of a pipeline within a budget: what its call costs, counted, and a sample, measured."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ood_monitor import Detector
from ood_monitor.adapters.base import Batch, pieces
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from ood_monitor_integrations.diffusers.deployment import check_deployment, scorable
from ood_monitor_integrations.diffusers.origin import Origin
from ood_monitor_integrations.diffusers.plan import (
    ONE_LEVEL,
    Ratios,
    SampleCost,
    WatchingPlan,
    planned,
)
from ood_monitor_integrations.diffusers.recorded_call import OF_STEPS, RecordedCall, record_call
from ood_monitor_integrations.diffusers.recordings import Recording
from ood_monitor_integrations.diffusers.replay import ReplayedBound
from ood_monitor_integrations.diffusers.timing import forwards_without_noise

__all__ = ["plan_of", "rows_of"]

_log = logging.getLogger(__name__)

#: Ways to look at a sample, the best first.
_WAYS: tuple[Ratios, ...] = (2, ONE_LEVEL)

#: How often a sample's cost is measured, of which the median counts.
_ROUNDS = 5


def plan_of(
    pipe: Any,
    adapter: ReplayedBound,
    origin: Origin,
    first: Sequence[Recording],
    max_overhead: float,
    seed: int,
) -> WatchingPlan:
    """How a pipeline is watched within a budget, by the shortest of its calls; the log has it.

    Args:
        pipe: The pipeline.
        adapter: Of it.
        origin: What the detector is fitted on.
        first: A recording of each call.
        max_overhead: The budget.
        seed: Of calls that are made to be counted.

    Raises:
        ValueError: As of :func:`~ood_monitor_integrations.diffusers.plan.planned`.
    """
    plan = planned(
        max_overhead,
        min(_rows(pipe, origin, recording, seed) for recording in first),
        _costs_of(pipe, adapter, first[0].found),
        watched=2 if origin.watches == "both" else 1,
        in_background=_runs_in_background(pipe, Detector(adapter)),
    )
    if plan.gives_up:
        _log.warning("Calls are watched %s [OOD605]", plan)
    else:
        _log.info("Calls are watched %s", plan)
    return plan


def _rows(pipe: Any, origin: Origin, recording: Recording, seed: int) -> float:
    """Of the denoiser in a whole call, as its own samples are made by, for each of its samples."""
    found = recording.found
    if origin.samples == "own samples":
        return found.call.rows / found.count
    return rows_of(pipe, recording.arguments, found.count, seed)


def _costs_of(pipe: Any, adapter: ReplayedBound, found: RecordedCall) -> Iterator[SampleCost]:
    """What scoring a sample of a call costs, by each way, measured when it is asked for."""
    batch: Batch = next(iter(pieces(adapter.batch(found.call, found.count), 1)))
    for ratios in _WAYS[:1] if adapter.has_experts else _WAYS:  # one level is of one expert
        bound = adapter.with_ratios(ratios)
        with scorable(pipe, denoiser_of(pipe)):
            _, forwards = forwards_without_noise(bound, batch, _ROUNDS)
        yield SampleCost(ratios, forwards)


def rows_of(pipe: Any, arguments: Mapping[str, Any], count: int, seed: int) -> float:
    """Rows that the denoiser is given in a whole call, for each of its samples.

    The call is made, for one of its samples where its arguments can be cut.

    Args:
        pipe: The pipeline.
        arguments: Of the call.
        count: The samples that it gives.
        seed: Of its noise.
    """
    found: RecordedCall | None = None
    if (of_one := _of_one(arguments, count)) is not None:
        with suppress(Exception):  # as pipelines check their arguments: then by the whole call
            found = record_call(pipe, of_one, seed, "whole")
    found = found or record_call(pipe, dict(arguments), seed, "whole")
    return found.call.rows / found.count


def _of_one(arguments: Mapping[str, Any], count: int) -> dict[str, Any] | None:
    """The arguments for the first of so many samples; None if they are no more."""
    if count == 1:
        return None
    return {
        name: value[:1] if name not in OF_STEPS and _is_of_each(value, count) else value
        for name, value in arguments.items()
    } | ({"batch_size": 1} if "batch_size" in arguments else {})


def _is_of_each(value: Any, count: int) -> bool:
    is_sized = isinstance(value, Sequence) and not isinstance(value, str)
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        is_sized = bool(getattr(value, "ndim", 0))
    return is_sized and len(value) == count


def _runs_in_background(pipe: Any, detector: Detector) -> bool:
    """Whether a pipeline can be watched so as it is now."""
    try:
        check_deployment(pipe, denoiser_of(pipe), "background", detector)
    except ValueError:
        return False
    return True
