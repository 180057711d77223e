"""How a pipeline calls its denoiser, read off one of its calls.

Families differ in the argument that holds the sample, in what they tell of the time, in the order
of guidance's rows and in the sign of what they predict. All of it shows in a call of a few steps,
beside what its scheduler was given: no list of families is kept.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ood_monitor import NoiseSchedule
from ood_monitor.adapters.base import describe
from ood_monitor_integrations.diffusers.capture import Called, DenoiserCall, Step
from ood_monitor_integrations.diffusers.clocks import Clock, clock_of, number_in
from ood_monitor_integrations.diffusers.layouts import Layout, layouts_of
from ood_monitor_integrations.diffusers.rows import (
    Guidance,
    Pattern,
    differ,
    guidance_of,
    matching,
    pattern_of,
)

__all__ = ["Place", "Reading", "read", "sample_in", "told_time"]

#: How far a denoiser's input may be from a multiple of the scheduler's sample, and its time from
#: the scheduler's: rounding in 16 bits.
_TOLERANCE = 2e-2

#: What denoisers are told of a scheduler's time t, as slope and offset: it, or a thousandth, or how
#: much is left of a thousand.
_MAPS = ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0), (-1.0, 1e3))

#: Predictions for a step, of which the condition has the larger weight.
_PAIR = 2

#: Rounding of the boundary between two experts.
_SLACK_OF_BOUNDARY = 1e-6

#: Which of two experts was called, in words.
_CALLED = {0: "`transformer`", 1: "`transformer_2`", -1: "both"}

#: Steps of a call at different times that tell one map from another.
_LEAST_TIMES = 2


@dataclass(frozen=True)
class Place:
    """Where a network takes a sample and its time.

    Attributes:
        sample: The name of the argument with the sample.
        layout: Where the sample stands in it.
        time: The name of the argument with the time.
    """

    sample: str
    layout: Layout
    time: str


@dataclass(frozen=True)
class Reading:
    """How a pipeline calls its denoiser.

    Attributes:
        place: Of the sample and the time.
        slope: The denoiser is told this times the scheduler's time,
        offset: and this more.
        clock: What the scheduler's time is of a level.
        output: Where the prediction stands in what it gives.
        sign: 1, or -1 where the pipeline turns the prediction.
        levels: The scheduler's, with its own times where they are levels.
        boundary: The scheduler's time from which on the first of two experts denoises, and below
            it the second; None of one network.
    """

    place: Place
    slope: float
    offset: float
    clock: Clock
    output: Layout
    sign: int
    levels: NoiseSchedule = field(compare=False)
    boundary: float | None = None
    _copies: "dict[Pattern, _Copies]" = field(default_factory=dict, compare=False)

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels with the time that the denoiser is told of each."""
        schedule = self.levels
        if self.clock.tells_levels and (self.slope, self.offset) == (1.0, 0.0):
            return schedule  # in whole numbers, where it is
        told = self.slope * self.clock.times(schedule) + self.offset
        return replace(schedule, t=told)

    def experts(self) -> Tensor:
        """Of each level which of two experts denoises it, 0 or 1, shape (T,)."""
        return self._experts_at(self.clock.times(self.levels))

    def expert_at(self, told: Tensor) -> int:
        """The expert that denoises rows that are told such times.

        Raises:
            ValueError: They are not of one expert.
        """
        if self.boundary is None:
            return 0
        found = self._experts_at((told.detach().double() - self.offset) / self.slope).flatten()
        if bool((found != found[:1]).any()):
            raise ValueError("Expected rows of one expert's noise levels, got rows of both.")
        return int(found[0])

    def _experts_at(self, times: Tensor) -> Tensor:
        return (times < (self.boundary or 0.0) * (1 - _SLACK_OF_BOUNDARY)).long()

    def block(self, step: Step, count: int) -> tuple[int, int]:
        """The call with the condition, and which of its copies of the samples.

        Raises:
            ValueError: It cannot be told.
        """
        pattern = pattern_of(step, count)
        found = guidance_of([step], count) if sum(pattern) <= _PAIR else None
        known = self._copies.get(pattern)
        if known is not None and self._is_as_known(known, found, step, count):
            return known.block
        is_new = known is None and found is not None
        if found is None or not is_new or (found.output, found.sign) != (self.output, self.sign):
            raise ValueError(
                f"Expected guidance as the detector was fitted with, got denoiser calls of "
                f"{pattern} times the samples, of which "
                f"{'none has the condition for certain' if found is None else 'another has it'}: "
                "fit with `call=` as it is called."
            )
        are_apart = differ(step, count, self.place.sample, self.place.layout)
        self._copies[pattern] = _Copies(found.block, found.block, are_apart)
        return found.block

    def _is_as_known(
        self, known: "_Copies", found: Guidance | None, step: Step, count: int
    ) -> bool:
        if found is None:  # guidance that is no weighted sum, or whose rows hardly differ
            place = self.place
            return known.are_apart or not differ(step, count, place.sample, place.layout)
        told = (self.output, self.sign, known.favoured or known.block)
        return (found.output, found.sign, found.block) == told

    def check(self, call: DenoiserCall, count: int) -> None:
        """Refuse a call in which the denoiser is given another sample, or another time.

        Or in which what was denoised is not what was returned: several runs through the scheduler's
        times, or samples of which some were chosen.

        Raises:
            ValueError: It is.
        """
        last, (slope, offset) = call.last, (self.slope, self.offset)
        _check_experts(call, self.boundary)
        name, layout = self.place.sample, self.place.layout
        factors = [
            _factor(layout, called.arguments.get(name), last.stepped) for called in last.calls
        ]
        self.clock.check(call, factors[0], self.levels)
        first, *copies = torch.split(last.stepped, count)
        if any(not torch.equal(each.nan_to_num(), first.nan_to_num()) for each in copies):
            raise ValueError(
                f"Expected all samples that were denoised to be returned, got {count} of "
                f"{len(last.stepped)}, which are not copies."
            )
        _check_one_run([number_in(time) for time, _ in call.times])
        for time, numbers in call.times:
            told, t = number_in(numbers.get(self.place.time)), number_in(time)
            if told is None or t is None or not _close(slope * t + offset, told, slope):
                raise ValueError(
                    f"Expected {self.place.time!r} to be {slope:g} times the scheduler's time plus "
                    f"{offset:g}, got {told} for {t}."
                )


@dataclass(frozen=True)
class _Copies:
    """Of calls that have the samples so many times, which time has the condition.

    Attributes:
        block: The call, and which of its copies of the samples.
        favoured: The one that guidance's weights name: another by a negative scale; None if they
            name none.
        are_apart: Whether the copies have conditions that differ.
    """

    block: tuple[int, int]
    favoured: tuple[int, int] | None
    are_apart: bool


def read(
    call: DenoiserCall,
    count: int,
    schedule: NoiseSchedule,
    unguided: Callable[[], Iterable[Step]],
    boundary: float | None = None,
) -> Reading:
    """Read a call.

    Args:
        call: The call, with all its steps.
        count: B, the samples that it gave.
        schedule: Of its scheduler.
        unguided: Gives last steps of the same call without guidance, should its own rows not tell
            which of them have the condition.
        boundary: The scheduler's time from which on the first of two experts denoises; None of one
            network.

    Raises:
        ValueError: Something of it cannot be read, or not all of its steps are denoised as the
            boundary says.
    """
    _check_experts(call, boundary)
    steps = [step for step in call.steps if step.calls]
    name, layout, factors = sample_in([(step, step.calls[0]) for step in steps])
    time, slope, offset = _time_map(call.times)
    place = Place(name, layout, time)
    clock = clock_of(call, factors, schedule)
    own = [step for step in steps if step.expert == steps[-1].expert]  # each has its own scale
    guidance, favoured = _guidance(own, count, unguided, place)
    copies = _Copies(guidance.block, favoured, differ(steps[-1], count, name, layout))
    known = {pattern_of(steps[-1], count): copies}
    read_off = (place, slope, offset, clock, guidance.output, guidance.sign, schedule)
    return Reading(*read_off, boundary, known)


def sample_in(called: Sequence[tuple[Step, Called]]) -> tuple[str, Layout, list[float]]:
    """The argument with the sample, where it stands there, and the factors that it has.

    Raises:
        ValueError: None has it in all of these calls.
    """
    (first, of_first), *_ = called
    shape = first.stepped.shape[1:]
    for name, value in of_first.arguments.items():
        for layout in layouts_of(value, shape):
            try:
                factors = [_factor(layout, c.arguments.get(name), s.stepped) for s, c in called]
            except ValueError:
                continue
            return name, layout, factors
    arguments = {k: v for k, v in of_first.arguments.items() if isinstance(v, Tensor | list)}
    raise ValueError(
        "Expected one of the denoiser's arguments to be the scheduler's sample, up to a factor, "
        f"alone or with context before or behind it, got {describe(arguments)} for "
        f"{describe(first.stepped)}: where it is blended with an image, or made of several, give "
        "`monitor_pipeline(batch=...)` with an adapter of your own."
    )


def told_time(called: Called, time: Any, name: str) -> str:
    """The argument by which a network beside the denoiser is told the same time.

    Raises:
        ValueError: None is.
    """
    told = number_in(time)
    found = [k for k, v in called.numbers.items() if told is not None and number_in(v) == told]
    if not found:
        raise ValueError(f"Expected a ControlNet to be told the time {told}, got {called.numbers}.")
    return name if name in found else found[0]


def _check_experts(call: DenoiserCall, boundary: float | None) -> None:
    """Refuse a call whose steps are not each denoised by the expert of its time.

    Raises:
        ValueError: They are not.
    """
    for (time, _), expert in zip(call.times, call.experts, strict=False):
        t = number_in(time)
        is_above = boundary is None or (t is not None and t >= boundary)
        on_it = boundary is not None and t is not None and math.isclose(t, boundary, rel_tol=1e-6)
        if expert != (0 if is_above else 1) and not (on_it and expert >= 0):
            raise ValueError(
                "Expected `transformer` to denoise at times from "
                f"{'0' if boundary is None else format(boundary, 'g')} on and `transformer_2` below"
                f", each step by one of them, got {_CALLED[expert]} at {t}."
            )


def _time_map(times: Sequence[tuple[Any, Mapping[str, Any]]]) -> tuple[str, float, float]:
    """The argument that follows the scheduler's time, and the slope and offset by which it does.

    Raises:
        ValueError: None does.
    """
    for name in times[0][1]:
        pairs = [(number_in(numbers.get(name)), number_in(time)) for time, numbers in times]
        known = [(told, t) for told, t in pairs if told is not None and t is not None]
        found = _map_of(known) if len(known) == len(pairs) else None
        if found is not None:
            return name, *found
    raise ValueError(
        "Expected one of the denoiser's arguments to be the scheduler's time, or an affine map of "
        f"it, at two steps at least, got {[numbers for _, numbers in times]} for "
        f"{[time for time, _ in times]}."
    )


def _check_one_run(times: Sequence[float | None]) -> None:
    """Refuse times that begin again; some schedulers go a step back between."""
    runs = [time for time, _ in itertools.groupby(times)]
    if runs[0] in runs[1:]:
        raise ValueError(
            "Expected a call that runs once through the scheduler's times, got one that begins "
            "again, of which the last run alone would be scored: call it for one image, or with "
            "`ensemble_size=1`, at a time."
        )


def _map_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Slope and offset from the scheduler's time to what the denoiser is told."""
    if len({t for _, t in pairs}) < _LEAST_TIMES:
        return None
    for slope, offset in _MAPS:
        if all(_close(slope * t + offset, told, slope) for told, t in pairs):
            return slope, offset
    (x0, t0), (x1, t1) = min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])
    slope = (x1 - x0) / (t1 - t0)
    offset = x0 - slope * t0
    exact = all(math.isclose(slope * t + offset, x, rel_tol=1e-4, abs_tol=1e-6) for x, t in pairs)
    is_read = exact and len({t for _, t in pairs}) > _LEAST_TIMES and slope != 0
    return (slope, offset) if is_read else None


def _close(expected: float, told: float, slope: float) -> bool:
    """Up to rounding in 16 bits, of the time itself or of what it is taken from."""
    taken_from = 1000 * abs(slope) if slope < 0 else 0.0
    slack = max(1e-9, 4e-3 * taken_from)
    return math.isclose(expected, told, rel_tol=_TOLERANCE, abs_tol=slack)


def _factor(layout: Layout, value: Any, stepped: Tensor) -> float:
    """What the scheduler's sample was multiplied by for the denoiser.

    Raises:
        ValueError: It is not what the denoiser was given.
    """
    shape = stepped.shape[1:]
    if layout not in layouts_of(value, shape):
        raise ValueError(
            f"Expected the denoiser's input to have the scheduler's sample, {describe(stepped)}, "
            f"as in the call that was read, got {describe(value)}."
        )
    taken = layout.taken(value, shape)
    copies, rest = divmod(len(taken), len(stepped))
    repeated = stepped.repeat(copies, *[1] * len(shape)) if not rest else stepped[: len(taken)]
    finite = taken.isfinite() & repeated.isfinite()  # the rest is for the monitor to count
    a, b = (each[finite].detach().to("cpu", torch.float64) for each in (taken, repeated))
    if not a.numel() or not b.any():
        return 1.0
    factor = float((a @ b) / (b @ b))
    if not factor or (a - factor * b).norm() > _TOLERANCE * a.norm():
        raise ValueError(
            "Expected the denoiser's input to be the scheduler's sample up to a factor, alone or "
            f"beside context, got {describe(value)} for {describe(stepped)}."
        )
    return factor


def _guidance(
    steps: Sequence[Step], count: int, unguided: Callable[[], Iterable[Step]], place: Place
) -> tuple[Guidance, tuple[int, int] | None]:
    """By comparison with a call without guidance, and by the weights where there is none.

    A negative scale gives the weights of a positive one to the other rows, which come second.

    Raises:
        ValueError: Neither tells.
    """
    by_weights, pattern = guidance_of(steps, count), pattern_of(steps[-1], count)
    favoured = None if by_weights is None else by_weights.block
    if by_weights is not None and pattern == (1,):
        return by_weights, favoured
    found = _by_comparison(steps[-1], count, unguided(), place) or by_weights
    if found is None:
        raise ValueError(
            "Expected guidance by a weighted sum of predictions, or a call that can do without it "
            f"(`guidance_scale=1`), got denoiser calls of {pattern} times the samples of which "
            "the one with the condition is not told."
        )
    return found, favoured


def _by_comparison(
    step: Step, count: int, unguided: Iterable[Step], place: Place
) -> Guidance | None:
    """The rows that have the conditions of a call without guidance, whose sign shows."""
    for other in unguided:
        if other.calls and pattern_of(other, count) == (1,):
            alone = guidance_of([other], count)
            block = matching(step, other, count, place.sample, place.layout)
            if alone is not None and block is not None:
                return Guidance(alone.output, alone.sign, block)
    return None
