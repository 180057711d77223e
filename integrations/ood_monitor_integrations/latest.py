"""Which of all that a monitor said is the latest: by its number, whatever the clock does."""

from collections.abc import Mapping

from ood_monitor.alerts import Alert, Summary

__all__ = ["Latest"]

#: Streams whose latest number is remembered.
_REMEMBERED = 1024


class Latest:
    """The number of the latest that was shown, of each stream.

    What has no number, as nobody gave it one, is taken as it comes.

    Args:
        numbers: By stream, those that were shown before.
    """

    def __init__(self, numbers: Mapping[str, int] | None = None) -> None:
        self._numbers = dict(numbers or {})

    def is_news(self, said: Alert | Summary) -> bool:
        """Whether nothing later was shown; the same once more, as after a failure, is news."""
        return not said.number or said.number >= self._numbers.get(said.stream, 0)

    def took(self, said: Alert | Summary) -> None:
        """It is shown."""
        if said.number:
            self._numbers[said.stream] = max(said.number, self._numbers.pop(said.stream, 0))
            if len(self._numbers) > _REMEMBERED:
                del self._numbers[next(iter(self._numbers))]
