r"""Since when the evidence counts: which sample a change most likely began with.

A Shiryaev-Roberts sum is one weight for each sample that a change may have begun with,

.. math:: w_\tau = \frac{1}{K} \sum_k \prod_{i=\tau}^{n} e^k_i,

the mean over the K bettors of what each would own at the alarm had it begun to bet at
:math:`\tau`. The largest weight is at the estimate, and the least set with nine tenths of all
weight gives an interval. A gradual change has no such sample, and a false alarm none at all.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEPT", "Bets", "Since"]

#: Latest samples of an episode whose bets are kept; a change before them counts as at the first.
KEPT = 5000

_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Since:
    """Samples back from the latest, which is 0.

    Attributes:
        estimate: The one that the evidence most likely began with.
        earliest: The far end of the interval.
        latest: Its near end.
    """

    estimate: int
    earliest: int
    latest: int


class Bets:
    """Log e-values of K bettors, in nats, of the latest samples.

    Args:
        bettors: K.
    """

    def __init__(self, bettors: int) -> None:
        self._bettors, self._values = bettors, array("d")

    def append(self, log_e_values: Iterable[float]) -> None:
        """Take in those of one sample."""
        self._values.extend(log_e_values)
        if len(self._values) > 2 * KEPT * self._bettors:  # seldom, as it moves all that is kept
            del self._values[: -KEPT * self._bettors]

    def copy(self) -> "Bets":
        """Bets that go on from here, and change nothing of these."""
        found = Bets(self._bettors)
        found._values = self._values[:]
        return found

    def tolist(self) -> list[list[float]]:
        """Of each sample, the latest last, for JSON."""
        rows: list[list[float]] = self._rows().tolist()
        return rows

    @classmethod
    def parse(cls, rows: Any, bettors: int, samples: int) -> "Bets":
        """What :meth:`tolist` gave after so many samples.

        Raises:
            TypeError: Something that is no list of numbers.
            ValueError: Likewise, or of other numbers of samples or bettors, or not finite.
        """
        values = np.array(rows, dtype=np.float64).reshape(-1, bettors)
        if len(values) != min(samples, KEPT) or not np.isfinite(values).all():
            raise ValueError(f"bets of {len(values)} samples after {samples}")
        found = cls(bettors)
        found._values.extend(values.ravel())
        return found

    def since(self) -> Since:
        """Since when the evidence counts.

        Raises:
            ValueError: There is no sample.
        """
        rows = self._rows()
        if not len(rows):
            raise ValueError("Expected bets of at least one sample, got none.")
        # From the latest back.
        log_weights = np.logaddexp.reduce(np.cumsum(rows[::-1], axis=0), axis=1)
        weights = np.exp(log_weights - log_weights.max())
        order = np.argsort(-weights, kind="stable")
        enough = int(np.searchsorted(np.cumsum(weights[order]), _SHARE * weights.sum())) + 1
        chosen = order[:enough]
        return Since(int(order[0]), int(chosen.max()), int(chosen.min()))

    def _rows(self) -> NDArray[np.float64]:
        return np.array(self._values).reshape(-1, self._bettors)[-KEPT:]
