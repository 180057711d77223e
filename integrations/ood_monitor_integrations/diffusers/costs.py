"""What scoring a sample costs, by method, noise levels and layers, to choose before fitting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ood_monitor import gradient_norms
from ood_monitor.adapters.base import Batch, pieces
from ood_monitor.checks import items, whole
from ood_monitor.densities.parts import Method
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from ood_monitor_integrations.diffusers.deployment import scorable
from ood_monitor_integrations.diffusers.fitting import replayed_bound
from ood_monitor_integrations.diffusers.recorded_call import record_call
from ood_monitor_integrations.diffusers.replay import LEVELS, ReplayedBound
from ood_monitor_integrations.diffusers.timing import forwards_without_noise, times_of

__all__ = ["PlanCost", "plan_costs"]


@dataclass(frozen=True)
class PlanCost:
    """What scoring a sample by a plan costs.

    Attributes:
        method: ``"forward"``, without noise, or ``"gradient_norms"`` of the bound.
        levels: The bound's noise levels; of ``"forward"``, which takes its own, none.
        layers: Its layers; None for all.
        milliseconds: A sample, median over rounds.
        forwards: The same in forward passes of the denoiser on one sample.
    """

    method: Method
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
        levels: Noise levels to compare, of the bound's gradient norms.
        layers: Layers to compare at each of them; without noise they cost alike.
        rounds: Runs of which the median is taken.

    Returns:
        The cost without noise, then of each pair of levels and layers, in the order given.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler, or an option of another type.
        ValueError: One that cannot be replayed, levels outside the schedule, or no round.
    """
    rounds = whole("rounds", rounds, 1)
    plans = [checked_layers(each) for each in items("layers", layers)]
    arguments = dict(call or {})
    recorded, bound = record_call(pipe, arguments, 0), replayed_bound(pipe, call=arguments)
    bounds = [bound.with_levels(each) for each in items("levels", levels)]
    batch = next(iter(pieces(bound.batch(recorded.call, recorded.count), 1)))
    found: list[PlanCost] = []
    with scorable(pipe, denoiser_of(pipe)):
        spent = forwards_without_noise(bound, batch, rounds)
        found.append(PlanCost("forward", (), None, *spent))
        for at in bounds:
            for of in plans:
                spent = times_of(bound, batch, rounds, partial(_norms, at, batch, of))
                found.append(PlanCost("gradient_norms", at.levels, of, *spent))
    return found


def _norms(bound: ReplayedBound, batch: Batch, layers: Layers) -> Tensor:
    return next(iter(gradient_norms(bound, batch, layers=layers).values()))
