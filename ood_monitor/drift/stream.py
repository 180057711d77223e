"""The drift test of a monitored stream: of its scores, and of the mix of its groups."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from numpy.typing import ArrayLike, NDArray

from ood_monitor.drift.change import Since
from ood_monitor.drift.e_detector import EDetector
from ood_monitor.drift.evidence import Cause, Evidence, checked_ert, pooled_log_e_value
from ood_monitor.drift.mix import MixDetector

__all__ = ["StreamTest"]


class StreamTest:
    r"""Tells when the scores of a stream or the mix of its groups have changed.

    Of groups, each score is ranked among its own, and :class:`MixDetector` looks at their shares,
    unless these are no part of what is watched. The average of the two e-values is an e-detector,
    so that ``ert`` is promised of both together.

    Args:
        scores: Calibration scores, with shape (n,).
        ert: The expected run time to a false alarm, in samples.
        seed: Of the tie-breakers.
        groups: The group of each score, with shape (n,); None for no groups.
        group_count: How many groups there are.
        mix: Whether a change of their shares is a drift.

    Raises:
        ValueError: As of :class:`~ood_monitor.EDetector`.
        TypeError: As there.
    """

    def __init__(
        self,
        scores: ArrayLike,
        *,
        ert: float,
        seed: int = 0,
        groups: NDArray[Any] | None = None,
        group_count: int = 1,
        mix: bool = True,
    ) -> None:
        self._log_ert = math.log(checked_ert(ert))
        self._data = EDetector(scores, ert=ert, seed=seed, groups=groups, group_count=group_count)
        self._mix: MixDetector | None = None
        if groups is not None and mix:
            counts = [int((groups == group).sum()) for group in range(group_count)]
            self._mix = MixDetector(counts, ert=ert, seed=seed)

    @property
    def n(self) -> int:
        """Samples since the test last began."""
        return self._data.n

    def copy(self) -> Self:
        """Returns a test that goes on from here, and changes nothing of this one."""
        other = copy.copy(self)
        other._data = self._data.copy()
        other._mix = None if self._mix is None else self._mix.copy()
        return other

    def restart(self, *, grow: bool = True) -> None:
        """Begins anew; see :meth:`~ood_monitor.EDetector.restart`."""
        self._data.restart(grow=grow)
        if self._mix is not None:
            self._mix.restart()

    def update(self, score: float, group: int = 0) -> Evidence:
        """Takes in the score of one sample, and its group.

        Returns:
            The evidence: the rank of the score within its group, the average e-value, and what most
            of it is of.

        Raises:
            ValueError: The score is nan or there is no such group; nothing is then changed.
        """
        data = self._data.update(score, group)
        mix = None if self._mix is None else self._mix.update(group)
        if mix is None:
            return data
        log_e_value = pooled_log_e_value((data.log_e_value, mix.log_e_value))
        return replace(
            data,
            log_e_value=log_e_value,
            alarm=log_e_value >= self._log_ert,
            cause="mix" if mix.log_e_value > data.log_e_value else "data",
        )

    def latest_ranks(self, count: int) -> list[float]:
        """Returns the ranks of scores, of so many samples at most since it began."""
        return self._data.latest_ranks(count)

    def since(self, cause: Cause) -> Since:
        """Returns since when the evidence counts, of what it is of, back from the latest sample.

        Raises:
            ValueError: If no sample was taken in since the start.
        """
        return (self._mix if cause == "mix" and self._mix is not None else self._data).since()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without the calibration scores, as primitives for JSON."""
        mix = None if self._mix is None else self._mix.state_dict()
        return {"data": self._data.state_dict(), "mix": mix}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes, to the bit, where :meth:`state_dict` was called.

        Raises:
            ValueError: The state is malformed, or of other calibration scores, groups or ``ert``;
                nothing is then changed.
        """
        resumed = self.copy()
        try:
            resumed._data.load_state_dict(state["data"])
            if (state["mix"] is None) != (resumed._mix is None):
                raise ValueError("Expected a state with a mix of groups where there are groups.")
            if resumed._mix is not None:
                resumed._mix.load_state_dict(state["mix"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Malformed drift state: {error!r}.") from error
        vars(self).update(vars(resumed))
