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

Several workers each run a stream of their own; their common test is
:func:`~ood_monitor.drift.evidence.pooled_log_e_value`.

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
from array import array
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.calibration.conformal import check_scores
from ood_monitor.checks import whole
from ood_monitor.drift.bets import (
    EVEN,
    Sums,
    Triple,
    log1p_exp,
    log_mean_exp,
    log_middle_bet,
    log_power_bet,
    simple_jumper,
    smoothed_rank,
)
from ood_monitor.drift.change import Ranks, Since
from ood_monitor.drift.evidence import Evidence, checked_ert
from ood_monitor.drift.tie_breaker import TieBreaker

STATE_FORMAT = 4
"""The version of :meth:`EDetector.state_dict`."""

# What an infinite score counts as: no other is beyond it, and JSON can hold it.
_LARGEST = sys.float_info.max
_SEED_DOMAIN = 0x65_64_65_74


@dataclass(slots=True)
class _Episode:
    """What an episode adds to the calibration scores; histories are by group, ascending.

    Numbers are in arrays, of which a copy takes no time worth the name.
    """

    histories: list["array[float]"]
    stream: "array[float]" = field(default_factory=lambda: array("d"))
    groups: "array[int]" = field(default_factory=lambda: array("q"))
    ranks: Ranks = field(default_factory=Ranks)
    log1p_sums: Sums = (0.0, 0.0, 0.0, 0.0)
    weights: Triple = EVEN
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
        self.ranks.append(p)
        self.n += 1
        return log_mean_exp((large, small, mean, alike))

    def copy(self) -> "_Episode":
        found = copy.copy(self)
        found.histories = [history[:] for history in self.histories]
        found.stream, found.groups = self.stream[:], self.groups[:]
        found.ranks = self.ranks.copy()
        return found


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
        self._ties = TieBreaker(_SEED_DOMAIN, seed)
        self.restart()

    @property
    def n(self) -> int:
        """Samples since the start of this episode."""
        return self._episode.n

    def copy(self) -> Self:
        """Returns a detector that goes on from here, and changes nothing of this one."""
        other = copy.copy(self)
        other._episode = self._episode.copy()
        other._ties = self._ties.copy()
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
        self._episode = _Episode([scores[:] for scores in self._calibration], grows=grow)

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
        p, complement = smoothed_rank(history, score, self._ties.draw())
        if episode.grows and len(history) < self.max_history:
            episode.remember(score, group)
        log_e = episode.bet(p, complement)
        return Evidence(p, log_e, log_e >= self._log_ert, episode.n)

    def latest_ranks(self, count: int) -> list[float]:
        """Returns the ranks of so many samples at most since the start, the latest last."""
        return self._episode.ranks.tolist(count)

    def since(self) -> Since:
        """Returns since when the evidence counts, back from the latest sample.

        Raises:
            ValueError: If no sample was taken in since the start.
        """
        return self._episode.ranks.since()

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
            "stream": episode.stream.tolist(),
            "groups": episode.groups.tolist() if len(self._calibration) > 1 else [],
            "ranks": episode.ranks.tolist(),
            "generator": self._ties.state_dict(),
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
            ties = TieBreaker.of_state(state["generator"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Malformed drift state: {error!r}.") from error
        self._episode, self._ties = episode, ties

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
            histories.append(array("d", sorted([*scores, *own])))
        if len(histories) == 1 and len(stream) != min(n, room):
            raise ValueError(f"{len(stream)} scores after {n} samples")
        return _Episode(
            histories,
            stream=array("d", stream),
            groups=array("q", groups.tolist()),
            ranks=Ranks.parse(state["ranks"], n),
            log1p_sums=_sums(state["log1p_sums"]),
            weights=_triple(state["weights"]),
            n=n,
            grows=grows,
        )


def _checked_groups(groups: ArrayLike | None, count: int, group_count: int) -> NDArray[np.int64]:
    """The group of each of so many scores, all 0 by default."""
    found = np.zeros(count, dtype=np.int64) if groups is None else np.asarray(groups)
    sound = found.shape == (count,) and (not count or found.dtype.kind in "iu")
    if not sound or np.any((found < 0) | (found >= group_count)):
        raise ValueError(f"Expected a group below {group_count} for each of {count} scores.")
    return found.astype(np.int64)


def _by_group(
    scores: NDArray[np.float64], groups: ArrayLike | None, group_count: int | None
) -> list["array[float]"]:
    """Calibration scores of each group, ascending."""
    if group_count is None:
        group_count = 1 if groups is None else int(np.max(np.asarray(groups), initial=0)) + 1
    own = _checked_groups(groups, len(scores), whole("group_count", group_count, 1))
    # Adding 0 makes -0 and 0, which tie, the same to the digest.
    return [array("d", np.sort(scores[own == group]) + 0.0) for group in range(group_count)]


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
