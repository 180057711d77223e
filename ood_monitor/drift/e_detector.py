r"""Drift: evidence, gathered over a stream, that its scores have changed.

Higher score = more anomalous. Let :math:`s_1, \ldots, s_m` be the calibration scores and
:math:`s_{m+1}, s_{m+2}, \ldots` the stream. Three steps turn the stream into an alarm.

**Sequential ranks.** With :math:`U_n` uniform, the smoothed rank of :math:`s_n` among all before,

.. math:: p_n = \frac{\#\{i < n : s_i > s_n\} + U_n (1 + \#\{i < n : s_i = s_n\})}{n},

is uniform and independent of :math:`p_{m+1}, \ldots, p_{n-1}` if the scores are exchangeable,
whatever their law and their ties (Vovk et al., 2003). P-values against the calibration scores alone
are each valid, but dependent, and bets on them raise too many alarms: so the history grows.

**Bets.** A bettor turns :math:`p_n` into an e-value :math:`e_n \geq 0`, of mean at most 1 given the
past. There are four:

* scores too large, :math:`e_n = \frac{1}{2} p_n^{-1/2}`;
* scores too small, :math:`e_n = \frac{1}{2} (1 - p_n)^{-1/2}`; these two also see a wider spread,
  and a few outliers among many normal samples;
* the Simple Jumper (Vovk et al., 2021), :math:`e_n = \sum_\epsilon w_\epsilon (1 + \epsilon
  (p_n - \frac{1}{2}))` over :math:`\epsilon \in \{-1, 0, 1\}`: the weights are each account's
  share of the capital, and a fraction :math:`J = 0.01` of it is dealt out anew at each step. It
  follows a small, lasting shift;
* scores too much alike, :math:`e_n = 6 p_n (1 - p_n)`: a narrower spread, which none of the others
  sees, as of a generator that repeats itself.

**Sums.** Each bettor :math:`k` has a Shiryaev-Roberts sum :math:`R^k_n = (1 + R^k_{n-1}) e^k_n`,
:math:`R^k_m = 0`: what it would own had it staked one more unit at each time since. The average
:math:`R_n` of the four is an e-detector (Shin, Ramdas and Rinaldo, 2022): :math:`R_n - (n - m)` is
a martingale, so that the number of samples :math:`T` to the first :math:`R_n \geq A` has
:math:`E[T] = E[R_{m+T}] \geq A`. Alarming at :math:`A` = ``ert`` promises, without any bootstrap,
an expected run time to a false alarm of at least ``ert`` samples.

The promise holds if

* the scorer was fitted on data *disjoint* from the calibration data, and is not refitted meanwhile;
* the calibration scores and the stream in control are exchangeable, for instance independent from
  one law. Autocorrelation breaks this, and with it any such test: at :math:`\rho = 0.1` from one
  sample to the next, false alarms come more than twice as often. Estimate it
  (:func:`ood_monitor.calibration.conformal.lag1_autocorrelation`), and if it is there, test units
  that are independent (a request, a user), or every k-th sample.

Several workers each run a stream of their own; :func:`pooled_log_e_value` is their common test.

References:
    | E-detectors: a nonparametric framework for sequential change detection
      (Jaehyeok Shin, Aaditya Ramdas, Alessandro Rinaldo, 2022)
    | https://arxiv.org/abs/2203.03532

    | Retrain or not retrain: Conformal test martingales for change-point detection
      (Vladimir Vovk, Ivan Petej, Ilia Nouretdinov, Ernst Ahlberg, Lars Carlsson,
      Alex Gammerman, 2021)
    | https://arxiv.org/abs/2102.10439

    | Testing Exchangeability On-Line (Vladimir Vovk, Ilia Nouretdinov, Alexander Gammerman, 2003)
    | https://www.aaai.org/Library/ICML/2003/icml03-100.php
"""

import copy
import hashlib
import math
import operator
import sys
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.calibration.conformal import check_scores
from ood_monitor.checks import number, whole
from ood_monitor.drift.change import KEPT, Since, since_when

JUMP = 0.01
"""The share :math:`J` of the Simple Jumper's capital that is dealt out anew at each step."""

STATE_FORMAT = 3
"""The version of :meth:`EDetector.state_dict`."""

Triple = tuple[float, float, float]
Sums = tuple[float, float, float, float]

_THIRD = 1.0 / 3.0
_LOG_HALF, _LOG_6 = math.log(0.5), math.log(6.0)
_SMALLEST_UNIFORM = 2.0**-53
# What an infinite score counts as: no other is beyond it, and JSON can hold it.
_LARGEST = sys.float_info.max
# Keeps U_n apart from the numbers a user's generator with the same seed makes the scores from.
_SEED_DOMAIN = 0x65_64_65_74


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


@dataclass(frozen=True, slots=True)
class Evidence:
    r"""What is known after one sample.

    Attributes:
        p_value: The sequential smoothed rank :math:`p_n`, in (0, 1]; small = anomalous.
        log_e_value: :math:`\log R_n` in nats, of the average Shiryaev-Roberts sum.
        alarm: Whether :math:`R_n` is at least the expected run time asked for.
        n: Samples since the start of this episode, this one included.
    """

    p_value: float
    log_e_value: float
    alarm: bool
    n: int


@dataclass(slots=True)
class _Episode:
    """What an episode adds to the calibration scores; histories are by group."""

    histories: list[list[float]]
    stream: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    bets: deque[Sums] = field(default_factory=lambda: deque(maxlen=KEPT))
    log1p_sums: Sums = (0.0, 0.0, 0.0, 0.0)
    weights: Triple = (_THIRD, _THIRD, _THIRD)
    n: int = 0
    grows: bool = True

    def remember(self, score: float, group: int) -> None:
        insort(self.histories[group], score)
        self.stream.append(score)
        self.groups.append(group)

    def bet(self, p: float, complement: float) -> float:
        """Moves the four sums on by one sample, and returns the log of their average."""
        jump, self.weights = simple_jumper(self.weights, p)
        bets = log_power_bet(p), log_power_bet(complement), jump, log_middle_bet(p, complement)
        large, small, mean, alike = map(operator.add, self.log1p_sums, bets)
        self.log1p_sums = (log1p_exp(large), log1p_exp(small), log1p_exp(mean), log1p_exp(alike))
        self.bets.append(bets)
        self.n += 1
        return log_mean_exp((large, small, mean, alike))

    def copy(self) -> "_Episode":
        histories = [history.copy() for history in self.histories]
        lists = {name: getattr(self, name).copy() for name in ("stream", "groups", "bets")}
        return replace(self, histories=histories, **lists)


class EDetector:
    r"""Tells when a stream of scores has drifted from the calibration scores.

    The history :math:`s_1, \ldots, s_{n-1}` grows up to ``max_history`` scores and then freezes; it
    holds all calibration scores in any case. Once it is frozen the ranks are no longer independent
    and the promise is no theorem, but it is kept if the history is long. Measured with independent
    scores and a history frozen from the start (``benchmarks/drift/history.py``), mean samples to a
    false alarm, ± standard error:

    ======== ================= ====================
    history  ``ert`` = 1 000   ``ert`` = 10 000
    ======== ================= ====================
    100      735 ± 53
    500      1 124 ± 57        9 815 ± 819
    5 000    1 326 ± 60        12 910 ± 894
    ======== ================= ====================

    The price of a growing history is that a change, if not found while it is the smaller part, is
    taken in (``benchmarks/drift/e_detector.py`` tells how often).

    With groups, a score is ranked among those of its own group alone. In control these ranks are
    uniform and independent too, whichever groups come, so that the promise is the same and a change
    of the groups' mix alone is no alarm; :class:`~ood_monitor.drift.mix.MixDetector` tells of that.

    One detector serves one stream, one sample after the other. What an alarm means for the stream
    is the caller's to decide: without :meth:`restart` the sums go on, and so may the alarm.

    Args:
        calibration_scores: Scores of in-distribution data that the scorer was not fitted on, in any
            order, with shape (m,). Exchangeable with the stream in control.
        ert: The expected run time to a false alarm, in samples: at least this many.
        seed: The seed of the tie-breakers :math:`U_n`. They are the only randomness.
        max_history: The most scores of a group to rank against, calibration scores included.
        groups: The group of each calibration score, from 0 on, with shape (m,); one by default.
        group_count: How many groups there are; by default those that come among ``groups``.

    Raises:
        ValueError: If ``ert`` is below 2 or not finite, ``max_history`` is below 1, the groups are
            not one from 0 to ``group_count`` - 1 for each score, or
            :func:`ood_monitor.calibration.conformal.check_scores` refuses the scores.
        TypeError: If ``seed`` or ``max_history`` is no whole number.

    Example:
        Half a standard deviation, from sample 1000 on:

        >>> generator = np.random.default_rng(4)
        >>> detector = EDetector(generator.normal(size=500), ert=10_000)
        >>> stream = np.concatenate([generator.normal(size=1000), generator.normal(0.5, size=500)])
        >>> for index, evidence in enumerate(detector.update_many(stream)):
        ...     if evidence.alarm:
        ...         print(f"Drift at index {index}.")
        ...         break
        Drift at index 1053.
    """

    def __init__(
        self,
        calibration_scores: ArrayLike,
        *,
        ert: float,
        seed: int = 0,
        max_history: int = 5000,
        groups: ArrayLike | None = None,
        group_count: int | None = None,
    ) -> None:
        self.ert = checked_ert(ert)
        self.max_history = whole("max_history", max_history, 1)
        self._log_ert = math.log(self.ert)
        self._calibration = _by_group(check_scores(calibration_scores), groups, group_count)
        self._digest = _digest(self._calibration)
        self._generator = tie_breaker(_SEED_DOMAIN, seed)
        self.restart()

    def copy(self) -> Self:
        """Returns a detector that goes on from here, and changes nothing of this one."""
        other = copy.copy(self)
        other._episode = self._episode.copy()
        other._generator = copy.deepcopy(self._generator)
        return other

    def restart(self, *, grow: bool = True) -> None:
        """Begins a new episode: the sums are 0 and the history is the calibration scores.

        After an alarm the history holds scores from after the change. Ranked against those, a
        change that goes on would look normal. The tie-breakers go on where they were. The promise
        is for an episode on average over calibration sets: if yours is an unlucky one, that is
        unlucky in every episode.

        Args:
            grow: Whether the history grows with the stream. Where a change is known to go on, it
                had better not, or the change is taken in and looks over.
        """
        self._episode = _Episode([scores.copy() for scores in self._calibration], grows=grow)

    def update(self, score: float, group: int = 0) -> Evidence:
        """Takes in the score of one sample.

        Args:
            score: The score; it may be infinite, since only its rank matters.
            group: The sample's group.

        Returns:
            The evidence after this sample.

        Raises:
            ValueError: If the score is nan or there is no such group; the detector is then
                unchanged.
        """
        value = float(score)
        if math.isnan(value):
            raise ValueError("Expected a score that is a number, got nan.")
        if not 0 <= group < len(self._calibration):
            raise ValueError(f"Expected a group below {len(self._calibration)}, got {group}.")
        return self._advance(min(max(value, -_LARGEST), _LARGEST), group)

    def update_many(self, scores: ArrayLike, groups: ArrayLike | None = None) -> list[Evidence]:
        """Takes in the scores of several samples, as :meth:`update` would one after the other.

        Args:
            scores: The scores in the order of their arrival, with shape (B,); B may be 0, and
                scores infinite.
            groups: The group of each, with shape (B,); 0 by default.

        Returns:
            The evidence after each sample, with length B.

        Raises:
            ValueError: If the scores are not one-dimensional, one is nan, or the groups are not
                one for each; the detector is then unchanged.
        """
        values = np.clip(np.asarray(scores, dtype=np.float64), -_LARGEST, _LARGEST)
        found: list[float] = check_scores(values, minimum=0).tolist()
        own = _checked_groups(groups, len(found), len(self._calibration)).tolist()
        return [self._advance(score, group) for score, group in zip(found, own, strict=True)]

    def _advance(self, score: float, group: int) -> Evidence:
        episode = self._episode
        history = episode.histories[group]
        u = self._generator.random() or _SMALLEST_UNIFORM
        p, complement = smoothed_rank(history, score, u)
        if episode.grows and len(history) < self.max_history:
            episode.remember(score, group)
        log_e = episode.bet(p, complement)
        return Evidence(p, log_e, log_e >= self._log_ert, episode.n)

    def since(self) -> Since:
        """Returns since when the evidence counts, back from the latest sample.

        Raises:
            ValueError: If no sample was taken in since the start.
        """
        return since_when(self._episode.bets)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without the calibration scores, as primitives that JSON can hold."""
        episode = self._episode
        return {
            "format": STATE_FORMAT,
            "calibration": self._digest,
            "ert": self.ert,
            "max_history": self.max_history,
            "n": episode.n,
            "grows": episode.grows,
            "log1p_sums": list(episode.log1p_sums),
            "weights": list(episode.weights),
            "stream": episode.stream.copy(),
            "groups": episode.groups.copy() if len(self._calibration) > 1 else [],
            "bets": [list(bets) for bets in episode.bets],
            "generator": tie_breaker_state(self._generator),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes, to the bit, where :meth:`state_dict` was called.

        Args:
            state: What :meth:`state_dict` returned, also after a journey through JSON.

        Raises:
            ValueError: If the state is malformed, or of another format, other calibration scores,
                another ``ert`` or another ``max_history``; the detector is then unchanged.
        """
        self._refuse_foreign(state)
        try:
            episode = self._episode_of(state)
            generator = tie_breaker_of(state["generator"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Malformed drift state: {error!r}.") from error
        self._episode, self._generator = episode, generator

    def _refuse_foreign(self, state: Mapping[str, Any]) -> None:
        mine = {
            "format": STATE_FORMAT,
            "calibration": self._digest,
            "ert": self.ert,
            "max_history": self.max_history,
        }
        for name, value in mine.items():
            if state.get(name) != value:
                raise ValueError(
                    f"The drift state is of another {name}: expected {value}, "
                    f"got {state.get(name)}."
                )

    def _episode_of(self, state: Mapping[str, Any]) -> _Episode:
        stream: list[float] = check_scores(state["stream"], minimum=0).tolist()
        groups = _checked_groups(state["groups"] or None, len(stream), len(self._calibration))
        n, grows, histories = int(state["n"]), bool(state["grows"]), []
        for group, scores in enumerate(self._calibration):
            own = [score for score, of in zip(stream, groups, strict=True) if of == group]
            room = max(self.max_history - len(scores), 0) if grows else 0
            if len(own) > min(n, room):
                raise ValueError(f"{len(own)} scores after {n} samples")
            histories.append(sorted(scores + own))
        if len(histories) == 1 and len(stream) != min(n, room):
            raise ValueError(f"{len(stream)} scores after {n} samples")
        return _Episode(
            histories,
            stream=stream,
            groups=groups.tolist(),
            bets=deque(map(_sums, state["bets"]), maxlen=KEPT),
            log1p_sums=_sums(state["log1p_sums"]),
            weights=_triple(state["weights"]),
            n=n,
            grows=grows,
        )


def pooled_log_e_value(log_e_values: Iterable[float]) -> float:
    r"""Returns the log of the mean e-value of several workers, each with a stream of its own.

    An average of e-detectors is one: alarming when it is at least ``log(ert)`` promises ``ert``
    samples a worker, on average over workers, to a false alarm. It sees at once what they see
    together, where each alone would still wait.

    Args:
        log_e_values: Each worker's latest :attr:`Evidence.log_e_value`, in nats; -inf before its
            first sample.

    Returns:
        The log of their mean, in nats.

    Raises:
        ValueError: If there is none, or one is nan.
    """
    values = np.array(list(log_e_values), dtype=np.float64)
    if not len(values) or np.isnan(values).any():
        raise ValueError(f"Expected log e-values of at least one worker, got {values.tolist()}.")
    return float(np.logaddexp.reduce(values) - math.log(len(values)))


def checked_ert(ert: float) -> float:
    """Returns an expected run time that a test can promise.

    Raises:
        ValueError: If it is below 2 or not finite.
        TypeError: If it is no number.
    """
    found = number("ert", ert, 2.0)
    if math.isinf(found):
        raise ValueError(f"Expected a finite ert, got {ert}.")
    return found


def tie_breaker(domain: int, seed: int) -> np.random.Generator:
    """Returns the generator of tie-breakers of one kind of test."""
    entropy = np.random.SeedSequence([domain, whole("seed", seed)])
    return np.random.Generator(np.random.PCG64(entropy))


def _checked_groups(groups: ArrayLike | None, count: int, group_count: int) -> NDArray[np.int64]:
    """The group of each of so many scores, all 0 by default."""
    found = np.zeros(count, dtype=np.int64) if groups is None else np.asarray(groups)
    sound = found.shape == (count,) and (not count or found.dtype.kind in "iu")
    if not sound or np.any((found < 0) | (found >= group_count)):
        raise ValueError(f"Expected a group below {group_count} for each of {count} scores.")
    return found.astype(np.int64)


def _by_group(
    scores: NDArray[np.float64], groups: ArrayLike | None, group_count: int | None
) -> list[list[float]]:
    """Calibration scores of each group, ascending."""
    if group_count is None:
        group_count = 1 if groups is None else int(np.max(np.asarray(groups), initial=0)) + 1
    own = _checked_groups(groups, len(scores), whole("group_count", group_count, 1))
    # Adding 0 makes -0 and 0, which tie, the same to the digest.
    return [(np.sort(scores[own == group]) + 0.0).tolist() for group in range(group_count)]


def _digest(calibration: Sequence[Sequence[float]]) -> str:
    digest = hashlib.sha256()
    for scores in calibration:
        digest.update(len(scores).to_bytes(8, "little"))
        digest.update(np.array(scores, dtype="<f8").tobytes())
    return digest.hexdigest()


def _sums(values: Sequence[float]) -> Sums:
    large, small, mean, alike = check_scores(values, minimum=4).tolist()
    return large, small, mean, alike


def _triple(values: Sequence[float]) -> Triple:
    first, second, third = check_scores(values, minimum=3).tolist()
    return first, second, third


def tie_breaker_state(generator: np.random.Generator) -> dict[str, str]:
    """Returns where a generator of :func:`tie_breaker` stands."""
    state = generator.bit_generator.state["state"]
    # 128 bits: as text, since many a JSON reader makes a double of a number.
    return {name: str(state[name]) for name in ("state", "inc")}


def tie_breaker_of(state: Mapping[str, str]) -> np.random.Generator:
    """Returns the generator that goes on from what :func:`tie_breaker_state` gave."""
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(state["state"]), "inc": int(state["inc"])},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(bits)
