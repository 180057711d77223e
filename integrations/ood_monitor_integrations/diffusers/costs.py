"""What scoring a sample costs, by noise levels and layers, to choose before fitting."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ood_monitor import gradient_norms
from ood_monitor.adapters.base import Batch, pieces, term_values
from ood_monitor.gradients.layers import Layers
from ood_monitor_integrations.diffusers.deployment import scorable
from ood_monitor_integrations.diffusers.families import denoiser_of
from ood_monitor_integrations.diffusers.recorded_call import record_call
from ood_monitor_integrations.diffusers.replay import LEVELS, ReplayedBound

__all__ = ["PlanCost", "plan_costs"]


@dataclass(frozen=True)
class PlanCost:
    """What scoring a sample by a plan costs.

    Attributes:
        levels: The plan's noise levels.
        layers: Its layers; None for all.
        milliseconds: A sample, median over rounds.
        forwards: The same in forward passes of the denoiser on one sample.
    """

    levels: tuple[int, ...]
    layers: Layers
    milliseconds: float
    forwards: float


def plan_costs(
    pipe: Any,
    *,
    call: Mapping[str, Any] | None = None,
    levels: Sequence[Sequence[int]] = (LEVELS, (50, 500), (500,)),
    layers: Sequence[Layers] = (None,),
    rounds: int = 5,
) -> list[PlanCost]:
    """Measure plans on one sample of a pipeline, each beside a forward pass of its denoiser.

    A call of n steps makes n such passes, twice as many with guidance: 3 ``forwards`` are 6 % of 50
    steps without it.

    Args:
        pipe: The pipeline.
        call: Arguments of its call, for two steps of which it is run.
        levels: Noise levels to compare.
        layers: Layers to compare at each of them.
        rounds: Runs of which the median is taken.

    Returns:
        The cost of each pair of levels and layers, in the order given.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: One that cannot be replayed.
    """
    found = record_call(pipe, dict(call or {}), 0)
    bound = ReplayedBound(
        denoiser_of(pipe),
        pipe.scheduler,
        found.call,
        found.count,
        controlnet=getattr(pipe, "controlnet", None),
    )
    batch = next(iter(pieces(bound.batch(found.call, found.count), 1)))
    plans = [(tuple(chosen), of) for chosen in levels for of in layers]
    with scorable(pipe, denoiser_of(pipe)):
        return [_cost(bound.with_levels(chosen), of, batch, rounds) for chosen, of in plans]


def _cost(bound: ReplayedBound, layers: Layers, batch: Batch, rounds: int) -> PlanCost:
    gradient_norms(bound, batch, layers=layers)  # whose first use of a model checks it
    spent, forward = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        norms = gradient_norms(bound, batch, layers=layers)
        next(iter(norms.values())).cpu()  # waits for the device
        middle = time.perf_counter()
        _forward(bound, batch)
        spent.append(middle - start)
        forward.append((time.perf_counter() - middle) / len(bound.levels))
    milliseconds = 1000 * statistics.median(spent)
    return PlanCost(
        bound.levels, layers, milliseconds, milliseconds / (1000 * statistics.median(forward))
    )


def _forward(bound: ReplayedBound, batch: Batch) -> None:
    for value in term_values(bound, batch).values():
        value.cpu()
