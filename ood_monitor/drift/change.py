r"""Since when the evidence counts: which sample a change most likely began with.

Before a change the ranks :math:`p_i` are uniform. After it they may have any law: the posterior
probability that it began at :math:`\tau`, each sample being as likely beforehand, is

.. math:: w_\tau \propto \sum_a \int \prod_{i=\tau}^{n} \frac{\theta_{b(p_i)}}{v_{b(p_i)}}
   \, \mathrm{Dir}(\theta; a v) \, d\theta,

where the rank falls in bin :math:`b(p)` of width :math:`v_b`, which is narrow at both ends. The law
after the change is drawn around the uniform one, with a weight a of 10, 30 or 100 samples. The
largest weight is at the estimate, and the least set with nine tenths of all weight gives an
interval. A gradual change has no such sample, and a false alarm none at all.

The weights of the drift test's own bets, :math:`\frac{1}{K} \sum_k \prod_{i=\tau}^{n} e^k_i`, tell
as well where a mean has shifted, and badly of outliers and of a variance: their interval of nine
tenths then holds the change in one of two cases (``benchmarks/drift/since.py``).
"""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

__all__ = ["KEPT", "Ranks", "Since", "likeliest", "since_when"]

#: Latest samples of an episode whose ranks are kept; a change before them counts as at the first.
KEPT = 5000

_SHARE = 0.9

_EDGES = np.array([0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.7, 0.9, 0.97, 0.99, 0.997, 1])
_WIDTHS = np.diff(_EDGES)
_SAMPLES = (10.0, 30.0, 100.0)


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


def since_when(ranks: ArrayLike) -> Since:
    """Since when ranks are not uniform.

    Args:
        ranks: Of n samples, the latest last, between 0 and 1, with shape (n,).

    Raises:
        ValueError: There is no sample.
    """
    back = np.asarray(ranks, dtype=np.float64)[::-1]
    if not len(back):
        raise ValueError("Expected ranks of at least one sample, got none.")
    bins = np.searchsorted(_EDGES[1:-1], back)
    counts = np.cumsum(np.eye(len(_WIDTHS))[bins], axis=0)  # of the latest 1, 2, ..., n
    log_weights = np.logaddexp.reduce([_log_marginal(counts, weight) for weight in _SAMPLES])
    return likeliest(log_weights)


def likeliest(log_weights: NDArray[np.float64]) -> Since:
    """The largest weight, and the least set that has nine tenths of all, from the latest back."""
    weights = np.exp(log_weights - log_weights.max())
    order = np.argsort(-weights, kind="stable")
    enough = int(np.searchsorted(np.cumsum(weights[order]), _SHARE * weights.sum())) + 1
    chosen = order[:enough]
    return Since(int(order[0]), int(chosen.max()), int(chosen.min()))


def _log_marginal(counts: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Log density of ranks, given how many are in each bin, beside the uniform one: (n,)."""
    prior, n = weight * _WIDTHS, counts.sum(1)
    of_bins = gammaln(prior + counts) - gammaln(prior) - counts * np.log(_WIDTHS)
    found: NDArray[np.float64] = gammaln(weight) - gammaln(weight + n) + of_bins.sum(1)
    return found


class Ranks:
    """Ranks of the latest samples."""

    def __init__(self) -> None:
        self._values = array("d")

    def append(self, rank: float) -> None:
        """Take in that of one sample."""
        self._values.append(rank)
        if len(self._values) > 2 * KEPT:  # seldom, as it moves all that is kept
            del self._values[:-KEPT]

    def copy(self) -> "Ranks":
        """Ranks that go on from here, and change nothing of these."""
        found = Ranks()
        found._values = self._values[:]
        return found

    def tolist(self, latest: int = KEPT) -> list[float]:
        """Of so many samples at most, the latest last."""
        return self._values[-latest:].tolist()

    @classmethod
    def parse(cls, ranks: Any, samples: int) -> "Ranks":
        """What :meth:`tolist` gave after so many samples.

        Raises:
            TypeError: Something that is no list of numbers.
            ValueError: Likewise, or of another number of samples, or not between 0 and 1.
        """
        values = np.array(ranks, dtype=np.float64)
        are_ranks = values.shape == (min(samples, KEPT),) and np.all((values >= 0) & (values <= 1))
        if not are_ranks:
            raise ValueError(f"ranks of shape {values.shape} after {samples} samples")
        found = cls()
        found._values.extend(values)
        return found

    def since(self) -> Since:
        """Since when the evidence counts.

        Raises:
            ValueError: There is no sample.
        """
        return since_when(self._values[-KEPT:])
