"""How a monitor decides: what its user has chosen, checked."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ood_monitor.checks import number, text, whole
from ood_monitor.drift.evidence import checked_ert

__all__ = ["Rules"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Attributes are the arguments of :class:`~ood_monitor.Monitor`.

    Attributes:
        name: The stream's name.
        fpr: False-positive rate of single samples.
        ert: Expected run time to a false drift alarm, in tested samples.
        recovery: Tested samples, or a time, without an alarm after which a stream has recovered.
        cooldown: Samples after a sample alert without another.
        summary_every: Samples between running figures.
        thin: Every how many samples one is tested for a drift.

    Raises:
        ValueError: One is out of its range.
        TypeError: One is of another type.
    """

    name: str
    fpr: float
    ert: float
    recovery: int | timedelta = 500
    cooldown: int = 100
    summary_every: int = 100
    thin: int = 1

    def __post_init__(self) -> None:
        """Checks each, and makes numbers Python's own."""
        checked = {
            "name": text("name", self.name),
            "fpr": number("fpr", self.fpr, 0, 1, ends="()"),
            "ert": checked_ert(self.ert),
            "recovery": _checked_recovery(self.recovery),
            "cooldown": whole("cooldown", self.cooldown),
            "summary_every": whole("summary_every", self.summary_every, 1),
            "thin": whole("thin", self.thin, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def is_over(self, quiet: int, seconds: float, needed: int) -> bool:
        """Whether what was told of has ended.

        Args:
            quiet: Tested samples without an alarm.
            seconds: As long.
            needed: Samples that it takes at least.
        """
        if isinstance(self.recovery, timedelta):
            return seconds >= self.recovery.total_seconds()
        return quiet >= max(self.recovery, needed)

    @property
    def told_recovery(self) -> str:
        """In words."""
        if isinstance(self.recovery, timedelta):
            return f"{self.recovery} without a new alarm"
        return f"{self.recovery:,} samples without a new alarm"

    @property
    def valid_again(self) -> int:
        """Valid samples after which an invalid one is news again."""
        return self.recovery if isinstance(self.recovery, int) else 500


def _checked_recovery(recovery: Any) -> int | timedelta:
    if isinstance(recovery, timedelta):
        if recovery <= timedelta():
            raise ValueError(f"Expected a recovery time above 0, got {recovery!r}.")
        return recovery
    return whole("recovery", recovery, 1)
