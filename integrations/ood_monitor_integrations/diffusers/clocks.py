"""What a scheduler's time is of a noise level.

Most often the level's number; of continuous times a fourth of the logarithm of sigma / alpha; and
of a scheduler that is given times and shifts its sigmas alone, the time before the shift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ood_monitor import NoiseSchedule
from ood_monitor_integrations.diffusers.capture import DenoiserCall

__all__ = ["Clock", "clock_of", "number_in"]

#: Rounding of a scale in 16 bits.
_TOLERANCE = 2e-2

#: How many levels a time may be from its own: schedulers round to whole numbers, some of them down.
_ROUNDED = 1.5

#: As how many levels apart times of one shift may look, as a share.
_OF_SHIFTS = 1e-2


@dataclass(frozen=True)
class Clock:
    """What a scheduler's time is of a level.

    Attributes:
        is_scaled: Whether a sample is multiplied by alpha for the denoiser.
        is_quarter_log: Whether it is a fourth of the logarithm of sigma / alpha.
        shift: Of straight lines, by which the odds of sigma are more than those of the time.
    """

    is_scaled: bool = False
    is_quarter_log: bool = False
    shift: float = 1.0

    @property
    def tells_levels(self) -> bool:
        """Whether the time is a level's own."""
        return not self.is_quarter_log and self.shift == 1

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """The time of each level, shape (T,), float64."""
        if self.is_quarter_log:
            return 0.25 * (schedule.sigma / schedule.alpha).log()
        if self.shift == 1:
            return schedule.t.double()
        odds = schedule.sigma / schedule.alpha / self.shift
        before = len(schedule) * odds / (1 + odds)
        return torch.where(schedule.alpha > 0, before, float(len(schedule)))

    def check(self, call: DenoiserCall, factor: float, schedule: NoiseSchedule) -> None:
        """Refuse a call whose last time is that of another level.

        Raises:
            ValueError: It is; a scheduler that has no sigmas and scales no sample does not show it.
        """
        time, factor = number_in(call.last.time), factor * schedule.sigma_data
        ratio = None if time is None else _ratio(call, time, factor, schedule, self.is_scaled)
        if time is None or not _fits(self, time, ratio, schedule):
            raise ValueError(
                f"Expected a scheduler whose times have the sigmas of the fit's, got time {time} "
                f"at sigma / alpha {ratio}: fit with `call=` as it is called."
            )


def clock_of(call: DenoiserCall, factors: Sequence[float], schedule: NoiseSchedule) -> Clock:
    """The clock of a call's steps, of which each has a level of the schedule.

    Args:
        call: With all its steps.
        factors: By which each step's sample is multiplied for the denoiser: 1, or alpha over the
            scale of data.
        schedule: The levels.

    Raises:
        ValueError: The times, sigmas and factors are those of no clock.
    """
    times = [number_in(step.time) for step in call.steps if step.calls]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        raise ValueError(f"Expected a scheduler's times as one number each, got {times}.")
    factors = [factor * schedule.sigma_data for factor in factors]
    scaled = any(factor < 1 - _TOLERANCE for factor in factors)
    pairs = zip(known, factors, strict=True)
    ratios = [_ratio(call, time, factor, schedule, scaled) for time, factor in pairs]
    for clock in _clocks(known, ratios, schedule, scaled):
        fits = (_fits(clock, *each, schedule) for each in zip(known, ratios, strict=True))
        if all(fits) and all(_is_scale(f, r) for f, r in zip(factors, ratios, strict=True)):
            return clock
    told = ", ".join(
        f"{t:.4g} x {f:.4g} at sigma / alpha {'unknown' if r is None else format(r, '.4g')}"
        for t, f, r in zip(known, factors, ratios, strict=True)
    )
    raise ValueError(
        f"Expected a scheduler's times to be its levels, 0 to {len(schedule)}, those before a "
        "shift, or a fourth of the logarithm of sigma / alpha, and its sample to be scaled by 1 or "
        f"by alpha, got times and scales {told}."
    )


def _clocks(
    times: Sequence[float], ratios: Sequence[float | None], schedule: NoiseSchedule, scaled: bool
) -> list[Clock]:
    """What may fit: levels, a fourth of a logarithm, and the shift of the middle step."""
    found = [Clock(scaled)]
    if any(ratio is not None for ratio in ratios):
        found.append(Clock(scaled, is_quarter_log=True))
    shifts = sorted(
        ratio * (len(schedule) - time) / time
        for time, ratio in zip(times, ratios, strict=True)
        if ratio and math.isfinite(ratio) and 0 < time < len(schedule)
    )
    if shifts and not schedule.is_variance_preserving:
        found.append(Clock(scaled, shift=shifts[len(shifts) // 2]))
    return found


def _ratio(
    call: DenoiserCall, time: float, factor: float, schedule: NoiseSchedule, is_scaled: bool
) -> float | None:
    """Sigma / alpha at a step, by the scheduler's scale or its sigma; None if neither says it."""
    if is_scaled:  # whose sigmas may stand between its times
        return math.sqrt(factor**-2 - 1) if 0 < factor < 1 - _TOLERANCE else None
    if call.grid is None:
        return None
    times, sigmas = (each.detach().to("cpu", torch.float64) for each in call.grid)
    sigma = float(sigmas[int((times - time).abs().argmin())])
    if schedule.is_variance_preserving:  # already a ratio, to data as they are
        return sigma / schedule.sigma_data
    return sigma / (1 - sigma) if sigma < 1 else math.inf


def _fits(clock: Clock, time: float, ratio: float | None, schedule: NoiseSchedule) -> bool:
    """Whether a time is that of a level with such a ratio."""
    ends = float(schedule.t[0]), float(schedule.t[-1])
    slack = _ROUNDED * (ends[1] - ends[0]) / max(len(schedule) - 1, 1)
    if ratio is None:  # of a table of levels alone, or too little noise to show in the scale
        is_a_level = min(ends[0], 0.0) - slack <= time <= ends[1] + slack
        return not clock.tells_levels or is_a_level
    if ratio in (0.0, math.inf):
        return True
    if clock.is_quarter_log:
        return abs(time - 0.25 * math.log(ratio)) < _TOLERANCE
    if clock.shift != 1:
        odds = ratio / clock.shift
        expected = len(schedule) * odds / (1 + odds)
        return abs(time - expected) < _OF_SHIFTS * expected + _ROUNDED
    usable = (schedule.alpha > 0) & (schedule.sigma > 0)
    known, t = (schedule.sigma / schedule.alpha)[usable].log(), schedule.t[usable].double()
    at = int((known - math.log(ratio)).abs().argmin())
    is_beyond = at in (0, len(known) - 1)  # sigmas of a range of their own
    near = float(t[max(at - 1, 0)]), float(t[min(at + 1, len(t) - 1)])
    return near[0] - slack <= time <= near[1] + slack or (
        is_beyond and abs(time - float(t[at])) <= slack
    )


def _is_scale(factor: float, ratio: float | None) -> bool:
    """Whether a sample is scaled by 1, or by the alpha of its ratio."""
    alpha = 1 / math.sqrt(1 + ratio**2) if ratio is not None else 1.0
    return any(math.isclose(factor, each, rel_tol=_TOLERANCE) for each in (1.0, alpha))


def number_in(value: Any) -> float | None:
    """The number that all elements are; None of what is none."""
    if isinstance(value, Tensor):
        first = value.flatten()[:1]
        is_one = value.numel() > 0 and bool((value == first).all())
        return float(first) if is_one else None
    return float(value) if isinstance(value, int | float) else None
