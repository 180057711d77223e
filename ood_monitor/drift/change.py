r"""Since when the evidence counts: which sample a change most likely began with.

A Shiryaev-Roberts sum is one weight for each sample that a change may have begun with,

.. math:: w_\tau = \frac{1}{K} \sum_k \prod_{i=\tau}^{n} e^k_i,

the mean over the K bettors of what each would own at the alarm had it begun to bet at
:math:`\tau`. The largest weight is at the estimate, and the least set with nine tenths of all
weight gives an interval. A gradual change has no such sample, and a false alarm none at all.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["KEPT", "Since", "since_when"]

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


def since_when(log_bets: Iterable[tuple[float, ...]]) -> Since:
    """Returns since when the evidence counts.

    Args:
        log_bets: The log e-values of the K bettors, in nats, of n samples in their order.

    Raises:
        ValueError: If there is no sample.
    """
    bets = np.array(list(log_bets), dtype=np.float64)
    if not len(bets):
        raise ValueError("Expected bets of at least one sample, got none.")
    log_weights = np.logaddexp.reduce(np.cumsum(bets[::-1], axis=0), axis=1)  # from the latest back
    weights = np.exp(log_weights - log_weights.max())
    order = np.argsort(-weights, kind="stable")
    enough = int(np.searchsorted(np.cumsum(weights[order]), _SHARE * weights.sum())) + 1
    chosen = order[:enough]
    return Since(int(order[0]), int(chosen.max()), int(chosen.min()))
