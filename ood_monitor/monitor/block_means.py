"""The mean of about the latest m of a stream, for any m, in little memory.

Rows are summed in blocks of 1, 2, 4, ... samples, the older the larger, three of a size at most: of
the latest m samples, the blocks that lie within them hold two thirds or more.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ood_monitor.checks import whole
from ood_monitor.densities import Array
from ood_monitor.drift.change import KEPT

__all__ = ["BlockMeans"]

#: Blocks of one size; with one more the two oldest become one.
_EACH = 3


class BlockMeans:
    """Sums of rows of one shape, of the latest 5 000 or more."""

    def __init__(self) -> None:
        self._counts: list[int] = []  # the oldest first
        self._sums: list[Array] = []

    @property
    def count(self) -> int:
        """Rows in these sums."""
        return sum(self._counts)

    def add(self, row: Array) -> None:
        """Take in a sample's row, which is not written to afterwards."""
        self._counts.append(1)
        self._sums.append(row)
        end = len(self._counts)
        while (first := end - _EACH - 1) >= 0 and self._counts[first] == self._counts[end - 1]:
            self._counts[first : first + 2] = [2 * self._counts[first]]
            self._sums[first : first + 2] = [self._sums[first] + self._sums[first + 1]]
            end = first + 1
        if self.count - self._counts[0] >= KEPT:
            del self._counts[0], self._sums[0]

    def mean(self, latest: int) -> Array:
        """The mean row of about the latest so many, and no older ones.

        Raises:
            ValueError: There is no row.
        """
        if not self._counts:
            raise ValueError("Expected rows to take the mean of, got none.")
        covered = list(itertools.accumulate(reversed(self._counts)))
        blocks = max(1, sum(count <= latest for count in covered))
        total: Array = np.sum(self._sums[-blocks:], axis=0)
        return total / covered[blocks - 1]

    def copy(self) -> Self:
        """Sums that go on from here, and change nothing of these."""
        found = type(self)()
        found._counts, found._sums = self._counts[:], self._sums[:]  # rows are never written to
        return found

    def dump(self) -> dict[str, list[Any]]:
        """Counts and sums, the oldest block first, for JSON."""
        return {"counts": self._counts[:], "sums": [total.tolist() for total in self._sums]}

    @classmethod
    def parse(cls, blocks: Mapping[str, Any], shape: tuple[int, ...]) -> Self:
        """What :meth:`dump` gave of rows of a shape.

        Raises:
            KeyError: A part is missing.
            TypeError: Something that no sums are.
            ValueError: Likewise, or of another shape.
        """
        found = cls()
        found._counts = [whole("a block's count", count, 1) for count in blocks["counts"]]
        sums = np.array(blocks["sums"], dtype=np.float64)
        found._sums = list(sums.reshape(len(found._counts), *shape))
        return found
