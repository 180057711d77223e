r"""The mix of groups: evidence that they come in other shares than among the calibration samples.

Laid side by side, the groups' shares make up the interval (0, 1). With :math:`c_g` samples of group
:math:`g` among the :math:`n - 1` before, calibration samples included, and :math:`U_n` uniform, a
sample of group :math:`g` falls on

.. math:: p_n = \frac{\sum_{h < g} c_h + U_n (1 + c_g)}{n},

uniform and independent of those before, while the mix is that of the calibration samples. A bettor
learns where the latest :math:`p_n` fall: it bets the density that has, in the share :math:`w_g` of
each group, the height

.. math:: f(p) = \frac{r_g + K w_g}{w_g (\sum_h r_h + K)},

where :math:`w_g` is the share of the group among the samples before (half a sample more of each,
so that one never seen has one), :math:`r_g` counts what fell there, a share :math:`1 - \gamma`
forgotten at each step, and :math:`K = 30` samples are spread evenly beforehand. There are four
bettors with :math:`\gamma \in \{.95, .99, .998, 1\}`, and the average of their Shiryaev-Roberts
sums is an e-detector, as in :mod:`~ood_monitor.drift.e_detector`. The counts are the whole history,
so that it need not freeze.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.checks import whole
from ood_monitor.drift.change import Ranks, Since
from ood_monitor.drift.evidence import Evidence, checked_ert, pooled_log_e_value
from ood_monitor.drift.tie_breaker import TieBreaker

__all__ = ["MixDetector"]

#: The version of :meth:`MixDetector.state_dict`.
_STATE_FORMAT = 2

#: Keeps the tie-breakers apart from those of the scores' test.
_SEED_DOMAIN = 0x6D_69_78

_Array = NDArray[np.float64]


#: How fast each bettor forgets, and the samples that are spread evenly before it learns.
_KEPT, _EVEN = np.array([0.95, 0.99, 0.998, 1.0]), 30.0


@dataclass(slots=True)
class _Episode:
    """What an episode has seen of G groups."""

    counts: NDArray[np.int64]  # (G,), calibration samples included
    recent: _Array  # (4, G), what each bettor remembers
    log1p_sums: _Array = field(default_factory=lambda: np.zeros(len(_KEPT)))  # (4,)
    ranks: Ranks = field(default_factory=Ranks)
    n: int = 0

    def take(self, group: int, u: float) -> tuple[float, float]:
        """Moves on by a sample of a group; where it fell, and the log of the average sum."""
        counts = self.counts
        p = float((counts[:group].sum() + u * (1 + counts[group])) / (1 + counts.sum()))
        shares = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))  # none of them 0
        fell = min(int(np.searchsorted(np.cumsum(shares), p)), len(shares) - 1)
        heights = (self.recent[:, fell] + _EVEN * shares[fell]) / (self.recent.sum(1) + _EVEN)
        bets = np.log(heights / shares[fell])
        sums = self.log1p_sums + bets
        self.log1p_sums = np.logaddexp(0.0, sums)
        self.recent *= _KEPT[:, None]
        self.recent[:, fell] += 1
        counts[group] += 1
        self.ranks.append(p)
        self.n += 1
        return p, pooled_log_e_value(sums)

    def copy(self) -> "_Episode":
        counts, recent = self.counts.copy(), self.recent.copy()
        return replace(self, counts=counts, recent=recent, ranks=self.ranks.copy())


class MixDetector:
    """Tells when the groups of a stream come in other shares than among the calibration samples.

    The promise is that of :class:`~ood_monitor.EDetector`: without a change, ``ert`` samples at
    least to an alarm on average.

    Args:
        counts: How many calibration samples each group has, with shape (G,).
        ert: The expected run time to a false alarm, in samples.
        seed: Of the tie-breakers.

    Raises:
        ValueError: ``ert`` is below 2 or not finite, or the counts are not of a group at least.
        TypeError: ``seed`` is no whole number.

    Example:
        >>> detector = MixDetector([450, 50], ert=1_000)
        >>> found = [detector.update(i % 2) for i in range(100)]  # each a half
        >>> next(i for i, evidence in enumerate(found) if evidence.alarm)
        23
    """

    def __init__(self, counts: ArrayLike, *, ert: float, seed: int = 0) -> None:
        self.ert = checked_ert(ert)
        self._calibration = np.asarray(counts, dtype=np.int64)
        if self._calibration.ndim != 1 or not len(self._calibration) or self._calibration.min() < 0:
            raise ValueError(f"Expected counts of shape (G,), none below 0, got {counts!r}.")
        self._ties = TieBreaker(_SEED_DOMAIN, seed)
        self.restart()

    def restart(self) -> None:
        """Begins a new episode: the sums are 0 and the counts are the calibration samples'."""
        counts = self._calibration.copy()
        self._episode = _Episode(counts, np.zeros((len(_KEPT), len(counts))))

    def copy(self) -> Self:
        """Returns a detector that goes on from here, and changes nothing of this one."""
        other = copy.copy(self)
        other._episode, other._ties = self._episode.copy(), self._ties.copy()
        return other

    def update(self, group: int) -> Evidence:
        """Takes in the group of one sample.

        Returns:
            The evidence after it; its ``p_value`` says where in (0, 1) the sample fell.

        Raises:
            ValueError: There is no such group; the detector is then unchanged.
        """
        if not 0 <= group < len(self._calibration):
            raise ValueError(f"Expected a group below {len(self._calibration)}, got {group}.")
        p, log_e = self._episode.take(group, self._ties.draw())
        return Evidence(p, log_e, log_e >= math.log(self.ert), self._episode.n, "mix")

    def since(self) -> Since:
        """Returns since when the evidence counts, back from the latest sample.

        Raises:
            ValueError: If no sample was taken in since the start.
        """
        return self._episode.ranks.since()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without the calibration samples, as primitives for JSON."""
        episode = self._episode
        return {
            "format": _STATE_FORMAT,
            "calibration": self._digest,
            "ert": self.ert,
            "n": episode.n,
            "counts": (episode.counts - self._calibration).tolist(),
            "recent": episode.recent.tolist(),
            "log1p_sums": episode.log1p_sums.tolist(),
            "ranks": episode.ranks.tolist(),
            "generator": self._ties.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes, to the bit, where :meth:`state_dict` was called.

        Raises:
            ValueError: The state is malformed, or of other counts or another ``ert``; the detector
                is then unchanged.
        """
        mine = {"format": _STATE_FORMAT, "calibration": self._digest, "ert": self.ert}
        try:
            found = {name: state[name] for name in mine}
            episode = self._episode_of(state)
            ties = TieBreaker.of_state(state["generator"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Malformed state of a mix: {error!r}.") from error
        if found != mine:
            raise ValueError(f"The state of the mix is another's: expected {mine}, got {found}.")
        self._episode, self._ties = episode, ties

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self._calibration.astype("<i8").tobytes()).hexdigest()

    def _episode_of(self, state: Mapping[str, Any]) -> _Episode:
        counts, n = np.array(state["counts"], dtype=np.int64), whole("n", state["n"])
        recent, sums = (np.array(state[name], float) for name in ("recent", "log1p_sums"))
        shapes = (len(self._calibration),), (len(_KEPT), len(self._calibration)), (len(_KEPT),)
        if (counts.shape, recent.shape, sums.shape) != shapes:
            raise ValueError(f"shapes {counts.shape}, {recent.shape} and {sums.shape}")
        are_counts = counts.min() >= 0 and counts.sum() == n and recent.min() >= 0
        if not are_counts or not np.isfinite([*recent.flat, *sums]).all():
            raise ValueError(f"counts {counts.tolist()} after {n} samples")
        ranks = Ranks.parse(state["ranks"], n)
        return _Episode(self._calibration + counts, recent, sums, ranks, n)
