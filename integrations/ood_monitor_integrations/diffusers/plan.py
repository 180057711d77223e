"""How calls are watched within a share of their time, and what that gives up.

A call costs as many passes of its denoiser as it has steps, twice as many with guidance, and
scoring a sample one for each level: little of 50 steps, and more than the call itself of one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from ood_monitor import Detector
from ood_monitor.checks import number
from ood_monitor_integrations.diffusers.deployment import Mode

__all__ = [
    "ONE_LEVEL",
    "Ratios",
    "SampleCost",
    "WatchingPlan",
    "checked_budget",
    "planned",
    "together",
]

#: Where a sample without noise is looked at, as of `DenoisingBound`.
Ratios: TypeAlias = Literal[2, 3] | tuple[float, ...]

#: The level that detects most by itself: `benchmarks/detection/one_level.py`.
ONE_LEVEL = (1.0,)

#: Shares of samples are whole multiples of it, which is the least.
_RATE = 1e-3

#: Options that choose what the budget's plan is to choose, and what it takes of them.
_CHOOSING = ("levels", "ratios", "method", "parts", "density", "granularity")
_SAME = {"method": "forward", "granularity": "tensor"}


@dataclass(frozen=True)
class SampleCost:
    """What scoring a sample costs.

    Attributes:
        ratios: Where it is looked at.
        forwards: The time that it takes, in plain passes on one sample, as measured.
    """

    ratios: Ratios
    forwards: float


@dataclass(frozen=True)
class WatchingPlan:
    """How calls are watched within a budget, which ``str()`` of it says in words.

    Made by ``fit_pipeline(max_overhead=...)``, kept with the detector, and what
    :func:`monitor_pipeline` goes by unless it is told otherwise.

    Attributes:
        max_overhead: The budget: by what share of a call's time watching may lengthen calls, on
            average over calls.
        ratios: Where samples are looked at, as of ``fit_pipeline``: 2 levels, or the ratio of one.
        sample_rate: The share of samples that are scored.
        mode: When: ``"sync"`` before a call returns, or ``"background"``.
        call_rows: Rows that the denoiser is given in a call for each of its samples, counted: of
            guidance two a step.
        forwards: How long scoring a sample once takes, in passes on one row, measured at the fit.
        watched: How often a sample is scored: once, or 2 for outputs and inputs.
    """

    max_overhead: float
    ratios: Ratios
    sample_rate: float
    mode: Mode
    call_rows: float
    forwards: float
    watched: int = 1

    @classmethod
    def of(cls, detector: Detector) -> Self | None:
        """As a detector has it, also one that was loaded; None of one without a budget."""
        origin = detector.fitted.provenance.adapter.get("origin") or {}
        return cls.parse(origin.get("plan"))

    @classmethod
    def parse(cls, said: Mapping[str, Any] | None) -> Self | None:
        """From JSON."""
        if said is None:
            return None
        ratios = said["ratios"]
        return cls(**{**said, "ratios": ratios if isinstance(ratios, int) else tuple(ratios)})

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        ratios = self.ratios if isinstance(self.ratios, int) else list(self.ratios)
        return asdict(self) | {"ratios": ratios}

    @property
    def sample_overhead(self) -> float:
        """The share of a call's time that scoring its samples takes, where they are all scored."""
        return self.watched * self.forwards / self.call_rows

    @property
    def overhead(self) -> float:
        """The share of a call's time that watching takes, estimated, on average over calls."""
        return self.sample_rate * self.sample_overhead

    @property
    def gives_up(self) -> tuple[str, ...]:
        """What is less than without a budget, in words."""
        found = []
        if self.ratios != 2:
            found.append("a level less, by which less is detected (docs/choosing.md)")
        if self.sample_rate < 1:
            found.append(
                f"{1 - self.sample_rate:.1%} of samples are not scored, and a drift is found after "
                f"{1 / self.sample_rate:.3g} times as many"
            )
        if self.mode == "background":
            found.append("scores come after the call has returned, on the monitor's `last` alone")
        return tuple(found)

    def __str__(self) -> str:
        given_up = "; ".join(self.gives_up) or "nothing"
        when = "before the call returns" if self.mode == "sync" else "in the background"
        twice = ", as an output and as an input" if self.watched > 1 else ""
        return (
            f"by ratios={self.ratios}, sample_rate={self.sample_rate:g}, mode={self.mode!r}: "
            f"{self.sample_rate:.3g} of the samples are scored{twice}, {when}. That takes about "
            f"{self.overhead:.2%} of a call's time on average, of max_overhead="
            f"{self.max_overhead:g}: {self.watched * self.forwards:.3g} passes of the denoiser for "
            f"a scored sample beside the call's {self.call_rows:g}. Given up: {given_up}."
        )


def planned(
    max_overhead: float,
    call_rows: float,
    costs: Iterable[SampleCost],
    *,
    watched: int = 1,
    in_background: bool = True,
) -> WatchingPlan:
    """The first way that fits the budget with all samples scored; of the cheapest a share, if none.

    A share is scored in the background where that can be, since a call whose sample is drawn would
    wait longer than the budget says.

    Args:
        max_overhead: The budget.
        call_rows: Rows of the denoiser in a call, for each of its samples.
        costs: Of a sample, the best way first; taken no further than needed.
        watched: How often a sample is scored.
        in_background: Whether the pipeline can be watched so.

    Raises:
        ValueError: Of a thousand samples less than one could be scored.
    """

    def plan(cost: SampleCost, rate: float, mode: Mode) -> WatchingPlan:
        way = (cost.ratios, rate, mode, call_rows, cost.forwards)
        return WatchingPlan(max_overhead, *way, watched)

    tried = []
    for cost in costs:
        whole = plan(cost, 1.0, "sync")
        if whole.overhead <= max_overhead:
            return whole
        tried.append((whole.overhead, cost))
    share, cheapest = min(tried, key=lambda each: each[0])
    return plan(cheapest, _rate(max_overhead, share), "background" if in_background else "sync")


def together(plans: Sequence[WatchingPlan]) -> WatchingPlan:
    """The plan of detectors of the same calls, each of which scores a sample once.

    Raises:
        ValueError: As of :func:`planned`.
    """
    first, *others = plans
    if not others or (set(plans) == {first} and first.watched == len(plans)):
        return first
    share = sum(plan.forwards / plan.call_rows for plan in plans)
    least = min(plan.max_overhead for plan in plans)
    is_later = any(plan.mode == "background" for plan in plans)
    return replace(
        first,
        max_overhead=least,
        ratios=min((plan.ratios for plan in plans), key=_levels),
        sample_rate=1.0 if share <= least else _rate(least, share),
        mode="background" if is_later else "sync",
        forwards=share * first.call_rows,
        watched=1,
    )


def _levels(ratios: Ratios) -> int:
    return ratios if isinstance(ratios, int) else len(ratios)


def _rate(max_overhead: float, share: float) -> float:
    """The share of samples to score, where scoring all takes such a share of a call's time."""
    rate = round(math.floor(max_overhead / share / _RATE) * _RATE, 3)
    if rate < _RATE:
        raise ValueError(
            f"Expected max_overhead of {share * _RATE:.2g} at least, by which one sample of a "
            f"thousand is scored, got {max_overhead:g}: scoring all takes {share:.2f} of the time "
            "of a call."
        )
    return rate


def checked_budget(max_overhead: float, given: Mapping[str, Any]) -> float:
    """A budget, beside options of which none chooses what its plan is to choose.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive, or one is given that does.
    """
    for name in _CHOOSING:
        value = given.get(name)
        if value is not None and not (isinstance(value, str) and value == _SAME.get(name)):
            raise ValueError(
                f"Expected max_overhead= to choose how samples are looked at, without noise, got "
                f"{name}={value!r} beside it: leave out one of them."
            )
    return number("max_overhead", max_overhead, 0, ends="()")
