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

import hashlib
import math
import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ood_monitor.calibration.conformal import check_scores

JUMP = 0.01
"""The share :math:`J` of the Simple Jumper's capital that is dealt out anew at each step."""

STATE_FORMAT = 2
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
    """What an episode adds to the calibration scores."""

    history: list[float]
    stream: list[float] = field(default_factory=list)
    log1p_sums: Sums = (0.0, 0.0, 0.0, 0.0)
    weights: Triple = (_THIRD, _THIRD, _THIRD)
    n: int = 0

    def remember(self, score: float) -> None:
        insort(self.history, score)
        self.stream.append(score)

    def bet(self, p: float, complement: float) -> float:
        """Moves the four sums on by one sample, and returns the log of their average."""
        log_e, self.weights = simple_jumper(self.weights, p)
        large, small, mean, alike = self.log1p_sums
        large += log_power_bet(p)
        small += log_power_bet(complement)
        mean += log_e
        alike += log_middle_bet(p, complement)
        self.log1p_sums = (log1p_exp(large), log1p_exp(small), log1p_exp(mean), log1p_exp(alike))
        self.n += 1
        return log_mean_exp((large, small, mean, alike))


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

    One detector serves one stream, one sample after the other. What an alarm means for the stream
    is the caller's to decide: without :meth:`restart` the sums go on, and so may the alarm.

    Args:
        calibration_scores: Scores of in-distribution data that the scorer was not fitted on, in any
            order, with shape (m,). Exchangeable with the stream in control.
        ert: The expected run time to a false alarm, in samples: at least this many.
        seed: The seed of the tie-breakers :math:`U_n`. They are the only randomness.
        max_history: The most scores to rank against, calibration scores included.

    Raises:
        ValueError: If ``ert`` is below 2 or not finite, ``max_history`` is below 1, or
            :func:`ood_monitor.calibration.conformal.check_scores` refuses the scores.

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
    ) -> None:
        if not 2.0 <= ert < math.inf:
            raise ValueError(f"Expected a finite expected run time of at least 2, got {ert}.")
        if max_history < 1:
            raise ValueError(f"Expected a history of at least 1 score, got {max_history}.")
        # Adding 0 makes -0 and 0, which tie, the same to the digest.
        calibration = np.sort(check_scores(calibration_scores)) + 0.0
        self.ert = float(ert)
        self.max_history = int(max_history)
        self._log_ert = math.log(self.ert)
        self._calibration: list[float] = calibration.tolist()
        self._digest = hashlib.sha256(calibration.astype("<f8").tobytes()).hexdigest()
        entropy = np.random.SeedSequence([_SEED_DOMAIN, seed])
        self._generator = np.random.Generator(np.random.PCG64(entropy))
        self.restart()

    def restart(self) -> None:
        """Begins a new episode: the sums are 0 and the history is the calibration scores.

        After an alarm the history holds scores from after the change. Ranked against those, a
        change that goes on would look normal. The tie-breakers go on where they were. The promise
        is for an episode on average over calibration sets: if yours is an unlucky one, that is
        unlucky in every episode.
        """
        self._episode = _Episode(history=self._calibration.copy())

    def update(self, score: float) -> Evidence:
        """Takes in the score of one sample.

        Args:
            score: The score; it may be infinite, since only its rank matters.

        Returns:
            The evidence after this sample.

        Raises:
            ValueError: If the score is nan; the detector is then unchanged.
        """
        value = float(score)
        if math.isnan(value):
            raise ValueError("Expected a score that is a number, got nan.")
        return self._advance(min(max(value, -_LARGEST), _LARGEST))

    def update_many(self, scores: ArrayLike) -> list[Evidence]:
        """Takes in the scores of several samples, as :meth:`update` would one after the other.

        Args:
            scores: The scores in the order of their arrival, with shape (B,); B may be 0, and
                scores infinite.

        Returns:
            The evidence after each sample, with length B.

        Raises:
            ValueError: If the scores are not one-dimensional or one is nan; the detector is then
                unchanged.
        """
        values = np.clip(np.asarray(scores, dtype=np.float64), -_LARGEST, _LARGEST)
        return [self._advance(score) for score in check_scores(values, minimum=0).tolist()]

    def _advance(self, score: float) -> Evidence:
        episode = self._episode
        u = self._generator.random() or _SMALLEST_UNIFORM
        p, complement = smoothed_rank(episode.history, score, u)
        if len(episode.history) < self.max_history:
            episode.remember(score)
        log_e = episode.bet(p, complement)
        return Evidence(p, log_e, log_e >= self._log_ert, episode.n)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without the calibration scores, as primitives that JSON can hold."""
        episode = self._episode
        generator = self._generator.bit_generator.state["state"]
        return {
            "format": STATE_FORMAT,
            "calibration": self._digest,
            "ert": self.ert,
            "max_history": self.max_history,
            "n": episode.n,
            "log1p_sums": list(episode.log1p_sums),
            "weights": list(episode.weights),
            "stream": episode.stream.copy(),
            # 128 bits: as text, since many a JSON reader makes a double of a number.
            "generator": {name: str(generator[name]) for name in ("state", "inc")},
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
            generator = _generator_of(state["generator"])
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
        n = int(state["n"])
        room = max(self.max_history - len(self._calibration), 0)
        if len(stream) != min(n, room):
            raise ValueError(f"{len(stream)} scores after {n} samples")
        return _Episode(
            history=sorted(self._calibration + stream),
            stream=stream,
            log1p_sums=_sums(state["log1p_sums"]),
            weights=_triple(state["weights"]),
            n=n,
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


def _sums(values: Sequence[float]) -> Sums:
    large, small, mean, alike = check_scores(values, minimum=4).tolist()
    return large, small, mean, alike


def _triple(values: Sequence[float]) -> Triple:
    first, second, third = check_scores(values, minimum=3).tolist()
    return first, second, third


def _generator_of(state: Mapping[str, str]) -> np.random.Generator:
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(state["state"]), "inc": int(state["inc"])},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(bits)
