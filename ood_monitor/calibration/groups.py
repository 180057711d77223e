"""Calibration within groups: each sample is judged against samples of its own kind.

Where groups differ in their scores (classes, prompts, tenants, resolutions), p-values against all
scores together flag one group too often and another never. Within a group they are exact. Which
groups are large enough to be compared on their own is decided by the labels of samples that
calibrate nothing; all other labels, those never seen among them, are one group together. So a
sample is compared within one fixed partition of the labels, and the promise is: at most ``fpr`` of
all samples, of each large group, and of the others as a whole, but not of each small group.

References:
    | Algorithmic Learning in a Random World (Vladimir Vovk, Alexander Gammerman,
      Glenn Shafer, 2005), section 4.5
    | https://doi.org/10.1007/b106715
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_monitor.calibration.conformal import check_scores, p_values, samples_for

__all__ = ["OTHERS", "GroupedPValue", "large_groups"]

OTHERS = "others"
"""What all groups that are not large are called together."""


def large_groups(labels: Iterable[str], minimum: float) -> tuple[str, ...]:
    """Returns the labels that come often enough to be a group of their own, by name.

    A label that is called as the others are together is one of these.

    Args:
        labels: The label of each sample; of other samples than those whose scores calibrate.
        minimum: How often is enough.
    """
    counts = Counter(label for label in labels if label != OTHERS)
    return tuple(sorted(label for label, count in counts.items() if count >= minimum))


@dataclass(frozen=True, eq=False)
class GroupedPValue:
    """Conformal p-values within groups (Mondrian): each sample against its own group's scores.

    Args:
        scores: The calibration scores, with shape (n,).
        labels: The label of each, with length n.
        large: The labels that are a group of their own, chosen by :func:`large_groups` without a
            look at these labels. All others are one group together.

    Raises:
        ValueError: If there is not one label for each score, a large group comes twice or is
            called as the others are, or
            :func:`~ood_monitor.calibration.conformal.check_scores` refuses the scores.

    Example:
        >>> scores = np.concatenate([np.arange(100.0), np.arange(100.0) + 50])
        >>> labels = ("cats",) * 100 + ("dogs",) * 100
        >>> calibration = GroupedPValue(scores, labels, large=("cats",))
        >>> calibration.p_value([120.0, 120.0], ["cats", "otters"]).round(2)
        array([0.01, 0.31])
    """

    scores: NDArray[np.float64]
    labels: tuple[str, ...]
    large: tuple[str, ...]
    _by_group: tuple[NDArray[np.float64], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the scores and labels, and sorts each group's scores."""
        values = check_scores(self.scores)
        if len({*self.large, OTHERS}) <= len(self.large):
            raise ValueError(f"Expected each large group once, none {OTHERS!r}, got {self.large}.")
        indices = self.indices(self.labels, len(values))
        found = tuple(np.sort(values[indices == i]) for i in range(len(self.large) + 1))
        object.__setattr__(self, "_by_group", found)

    @property
    def sizes(self) -> dict[str, int]:
        """How many scores each large group has, largest first."""
        sizes = dict(zip(self.large, map(len, self._by_group), strict=False))
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def scores_of(self, group: int) -> NDArray[np.float64]:
        """The scores of a group by its place in ``large``, or its length, ascending."""
        return self._by_group[group]

    @property
    def most(self) -> int:
        """How many scores the largest group has, the others among them."""
        return max(map(len, self._by_group))

    @property
    def others(self) -> int:
        """How many scores the others have together."""
        return len(self._by_group[-1])

    def indices(self, labels: Sequence[str], count: int) -> NDArray[np.int64]:
        """Returns the group of each sample: its place in ``large``, or its length for the others.

        Args:
            labels: The label of each, with length B.
            count: B.

        Returns:
            The groups, with shape (B,).

        Raises:
            ValueError: If there is not one label for each sample.
        """
        if len(labels) != count:
            raise ValueError(f"Expected {count} groups, got {len(labels)}.")
        places = {label: i for i, label in enumerate(self.large)}
        return np.array([places.get(label, len(places)) for label in labels], dtype=np.int64)

    def p_value(self, scores: ArrayLike, labels: Sequence[str]) -> NDArray[np.float64]:
        """Returns the p-value of each score within its group.

        Args:
            scores: The scores, with shape (B,).
            labels: The label of each, with length B.

        Returns:
            The p-values, with shape (B,); nan where the score is nan, and 1 in a group without
            calibration scores.

        Raises:
            ValueError: If the scores are not one-dimensional, or not one label is for each.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1:
            raise ValueError(f"Expected scores of shape (B,), got shape {values.shape}.")
        indices, found = self.indices(labels, len(values)), np.empty(len(values))
        for i in np.unique(indices):
            found[indices == i] = p_values(self._by_group[i], values[indices == i])
        return found

    def never_flagged(self, fpr: float) -> dict[str, int]:
        """Returns the groups with too few scores to be flagged at a rate, and how many they have.

        Args:
            fpr: The rate at which in-distribution samples may be flagged, in (0, 1).

        Raises:
            ValueError: If the rate is not in (0, 1).
        """
        needed, sizes = samples_for(fpr), self.sizes | {OTHERS: self.others}
        return {group: size for group, size in sizes.items() if size < needed}

    def check_fpr(self, fpr: float) -> None:
        """Refuses a false-positive rate which no group can reach.

        Raises:
            ValueError: If the rate is not in (0, 1), or nothing would ever be flagged.
        """
        if self.most < samples_for(fpr):
            raise ValueError(
                f"A false-positive rate of {fpr} needs at least {samples_for(fpr)} calibration "
                f"samples in a group, got at most {self.most}: give more held-out samples of each "
                "group, or a larger `fpr`."
            )
