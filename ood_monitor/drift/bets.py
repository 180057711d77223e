"""Bets on smoothed ranks: each turns a rank into an e-value, and sums follow them."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypeAlias

__all__ = [
    "EVEN",
    "JUMP",
    "Sums",
    "Triple",
    "log1p_exp",
    "log_mean_exp",
    "log_middle_bet",
    "log_power_bet",
    "simple_jumper",
    "smoothed_rank",
]

JUMP = 0.01
"""The share :math:`J` of the Simple Jumper's capital that is dealt out anew at each step."""

Triple: TypeAlias = tuple[float, float, float]
Sums: TypeAlias = tuple[float, float, float, float]

_THIRD = 1.0 / 3.0
EVEN: Triple = (_THIRD, _THIRD, _THIRD)
"""The Simple Jumper's shares before its first bet."""

_LOG_HALF, _LOG_6 = math.log(0.5), math.log(6.0)


def smoothed_rank(history: Sequence[float], score: float, u: float) -> tuple[float, float]:
    r"""Returns the smoothed conformal p-value of a score, and its complement.

    .. math:: p = \frac{\#\{i : h_i > s\} + u (1 + \#\{i : h_i = s\})}{n + 1}

    Args:
        history: The scores :math:`h` before this one in ascending order, with length n.
        score: The score :math:`s`.
        u: The tie-breaker, uniform on (0, 1).

    Returns:
        :math:`p` and :math:`1 - p`, each from its own counts: both above 0, and neither rounded
        by a subtraction from 1.
    """
    less = bisect_left(history, score)
    not_greater = bisect_right(history, score, less)
    n = len(history)
    tied = 1 + not_greater - less
    return (n - not_greater + u * tied) / (n + 1), (less + (1.0 - u) * tied) / (n + 1)


def log_power_bet(p: float) -> float:
    r"""Returns the log e-value of the bet on small p-values, :math:`e = \frac{1}{2} p^{-1/2}`.

    Args:
        p: The p-value, in (0, 1].

    Returns:
        :math:`\log e`, in nats.
    """
    return _LOG_HALF - 0.5 * math.log(p)


def log_middle_bet(p: float, complement: float) -> float:
    r"""Returns the log e-value of the bet on p-values near a half, :math:`e = 6 p (1 - p)`.

    Args:
        p: The p-value, above 0.
        complement: 1 - p, above 0.

    Returns:
        :math:`\log e`, in nats.
    """
    return _LOG_6 + math.log(p) + math.log(complement)


def simple_jumper(weights: Triple, p: float) -> tuple[float, Triple]:
    r"""Lets the Simple Jumper bet on one p-value.

    Args:
        weights: The share of the capital on :math:`\epsilon = -1, 0, 1`, summing to 1.
        p: The p-value.

    Returns:
        :math:`\log e`, in nats, and the shares after the bet.
    """
    dealt, tilt = JUMP * _THIRD, p - 0.5
    small = ((1.0 - JUMP) * weights[0] + dealt) * (1.0 - tilt)
    even = (1.0 - JUMP) * weights[1] + dealt
    large = ((1.0 - JUMP) * weights[2] + dealt) * (1.0 + tilt)
    e = small + even + large
    return math.log(e), (small / e, even / e, large / e)


def log1p_exp(x: float) -> float:
    """Returns log(1 + exp(x)) without overflow: log R in, log(1 + R) out."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_mean_exp(x: Sums) -> float:
    """Returns the log of the mean of exp(x) without overflow."""
    top = max(x)
    first, second, third, fourth = x
    total = math.exp(first - top) + math.exp(second - top)
    total += math.exp(third - top) + math.exp(fourth - top)
    return top + math.log(0.25 * total)
