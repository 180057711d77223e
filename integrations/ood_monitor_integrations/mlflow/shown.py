"""What a run shows of a stream, in its tags, by which it goes on after a restart."""

from collections.abc import Mapping

from ood_monitor.alerts import Alert, Status, Summary
from ood_monitor_integrations.latest import Latest
from ood_monitor_integrations.metrics import STATUSES
from ood_monitor_integrations.mlflow.tags import (
    ALERT_NUMBER,
    DETECTOR,
    METHOD,
    NUMBER,
    SINCE,
    STATUS,
    STREAM,
    of_stage,
)

__all__ = ["Shown", "worst"]


class Shown:
    """The status that a run shows of a stream, and which of all that was said it is from.

    Args:
        tags: The run's.
        stage: Words that tell several streams of one run apart.

    Attributes:
        said: The latest that is shown.
        told: The latest alert that the note tells of, which running figures leave alone.
    """

    def __init__(self, tags: Mapping[str, str], stage: str | None) -> None:
        self._stage = stage
        self._stream = _unescaped(tags.get(self._named(STREAM), ""))
        found = tags.get(self._named(STATUS))
        self._status = next((status for status in STATUSES if status == found), None)
        self.said, self.told = self._latest(tags, NUMBER), self._latest(tags, ALERT_NUMBER)

    @property
    def status(self) -> Status:
        """What is shown; OK before anything is."""
        return self._status or "OK"

    def tags_of(self, said: Alert | Summary) -> dict[str, str]:
        """The tags that show what was said, as far as they change."""
        tags = {STREAM: _escaped(said.stream)} if said.stream != self._stream else {}
        if said.number:
            tags[NUMBER] = str(said.number)
        if said.status != self._status:
            tags |= {STATUS: said.status, SINCE: said.time.isoformat()}
        tags = {self._named(tag): value for tag, value in tags.items()}
        if isinstance(said, Alert):
            tags |= {DETECTOR: said.detector} | ({METHOD: said.method} if said.method else {})
        return tags

    def tags_of_note(self, alert: Alert) -> dict[str, str]:
        """The tag that says which alert the note tells of."""
        return {self._named(ALERT_NUMBER): str(alert.number)} if alert.number else {}

    def took(self, said: Alert | Summary) -> None:
        """What was said is shown."""
        self._status, self._stream = said.status, said.stream
        self.said.took(said)

    def _latest(self, tags: Mapping[str, str], tag: str) -> Latest:
        number = tags.get(self._named(tag), "")
        is_number = number.isascii() and number.isdecimal()
        return Latest({self._stream: int(number)} if is_number else {})

    def _named(self, tag: str) -> str:
        return of_stage(tag, self._stage)


def worst(tags: Mapping[str, str], *, otherwise: Status) -> Status:
    """Of several streams that share a run, the status of the one that stands worst."""
    found = {value for tag, value in tags.items() if tag.startswith(f"{STATUS}.")}
    return max((s for s in STATUSES if s in found), key=STATUSES.__getitem__, default=otherwise)


def _escaped(stream: str) -> str:
    """A stream's name as a tag, which must be UTF-8 and of one line."""
    return stream.encode("unicode_escape").decode("ascii")


def _unescaped(tag: str) -> str:
    try:
        return tag.encode("ascii").decode("unicode_escape")
    except UnicodeError:  # a tag that somebody else has set, or MLflow has cut
        return ""
