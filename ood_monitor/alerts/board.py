"""What a page shows of each stream: kept in a file for each, which any process can read."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, get_args

from ood_monitor.alerts.alert import CALM, Alert, Status
from ood_monitor.alerts.figures import Summary
from ood_monitor.alerts.plain import check_word, make_whole
from ood_monitor.checks import flag, number, text
from ood_monitor.whole_files import replace_files

__all__ = ["Shown", "read_all", "write"]

_log = logging.getLogger(__name__)

#: Alerts of a stream that are shown, and points of its curves.
_ALERTS, _POINTS = 10, 240

#: What of a stream is alerts.
_TOLD = ("alerts", "causes")

#: Version of a stream's file.
_FORMAT = 1

#: What a file that another has written or cut raises.
_DAMAGE = AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError

#: Of a stream's file, at most, in bytes, which is far above what is written.
_MOST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Shown:
    """One stream on the page.

    Attributes:
        stream: Its name.
        summary: The latest figures; None before the first.
        alerts: The latest alerts, the latest first, without their traces.
        causes: Of the kinds that stand, the alerts that told so, the gravest first.
        points: Of the latest summaries with evidence, samples seen and that evidence, in nats.
        status: The latest.
        since_sample: Samples seen when it became so.
        since: When, as UTC.
        said: The number of the latest that it was told.
        written: When it was last told anything, as UTC.
        refresh: Seconds between two words of it, at most, while it is watched.
        ended: Whether its watch has ended.
    """

    stream: str
    summary: Summary | None = None
    alerts: tuple[Alert, ...] = ()
    causes: tuple[Alert, ...] = ()
    points: tuple[tuple[int, float], ...] = ()
    status: Status = "OK"
    since_sample: int = 0
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    said: int = 0
    written: datetime = field(default_factory=lambda: datetime.now(UTC))
    refresh: float = 30.0
    ended: bool = False

    def __post_init__(self) -> None:
        check_word("status", self.status, get_args(Status))
        make_whole(self, "since_sample", "said")
        text("stream", self.stream, may_be_empty=True)
        number("refresh", self.refresh, 1, 86_400)
        flag("ended", self.ended)
        if None in (self.since.utcoffset(), self.written.utcoffset()):
            raise ValueError("Expected times with a time zone, got one without.")
        if not all(math.isfinite(evidence) for _, evidence in self.points):
            raise ValueError("Expected evidence that is finite, got other.")

    def with_alert(self, alert: Alert) -> Self:
        """With an alert; one that it has is told once more, and an explanation joins its alert."""
        known = [it for it in self.alerts if it.id != alert.id]
        if alert.kind == "explanation":
            known = [_explained(it, alert) for it in known]
        shown = sorted([replace(alert, trace=()), *known], key=_order, reverse=True)[:_ALERTS]
        return self._said(alert, alerts=tuple(shown), causes=self._causes(alert))

    def with_summary(self, summary: Summary) -> Self:
        """With figures; late ones leave what is there."""
        if summary.number and summary.number < self.said:
            return self
        points = [it for it in self.points if it[0] < summary.samples_seen]
        if summary.log_e_value is not None:
            points.append((summary.samples_seen, summary.log_e_value))
        return self._said(summary, summary=summary, points=_thinned(points))

    def is_silent(self, now: datetime) -> bool:
        """Whether it should have been heard of, and was not."""
        return not self.ended and now - self.written > timedelta(seconds=4 * self.refresh)

    @property
    def standing(self) -> Alert | None:
        """The alert to act on first; None while the status is OK, or if none told of it."""
        if self.status == "OK":
            return None
        flags = [it for it in self.alerts if it.kind not in CALM and it.status != "OK"]
        recent = [it for it in flags if it.samples_seen >= self.since_sample]
        # Of before alerts said what stands, the gravest of the latest.
        gravest = max(recent, key=lambda it: (it.severity == "critical", *_order(it)), default=None)
        return next(iter(self.causes), gravest)

    def _causes(self, alert: Alert) -> tuple[Alert, ...]:
        """What stands by the latest alert, each with the alert that began it where it is known."""
        if alert.number and alert.number < self.said:
            return self.causes
        known = {it.kind: it for it in [*reversed(self.alerts), *self.causes]}
        known |= {alert.kind: replace(alert, trace=())}
        causes = [known[kind] for kind in alert.standing if kind in known]
        return tuple(_explained(it, alert) for it in causes)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                **vars(self),
                "format": _FORMAT,
                **{name: [json.loads(it.to_json()) for it in vars(self)[name]] for name in _TOLD},
                "summary": None if self.summary is None else _plain(self.summary),
                "since": self.since.isoformat(),
                "written": self.written.isoformat(),
            },
            allow_nan=False,
        )

    @classmethod
    def parse(cls, json_text: str) -> Self:
        """What :meth:`dump` gave.

        Raises:
            ValueError: Something else.
        """
        try:
            record = json.loads(json_text)
            if (found := record.pop("format")) != _FORMAT:
                raise ValueError(f"format {found!r}")
            return cls(**record | _parsed(record))
        except _DAMAGE as error:
            raise ValueError(f"Expected a stream of a page, got {error!r}.") from error

    def _said(self, said: Alert | Summary, **changed: Any) -> Self:
        is_late = bool(said.number) and said.number < self.said
        changed["written"] = datetime.now(UTC)
        if not is_late:
            changed |= {"said": max(self.said, said.number), "ended": False}
        if not is_late and said.status != self.status:
            changed |= {"since_sample": said.samples_seen, "since": said.time}
            changed["status"] = said.status
        return replace(self, **changed)


def write(folder: Path, shown: Shown) -> None:
    """Keep what a stream shows in its own file, as a whole or not at all."""
    folder.mkdir(exist_ok=True)
    replace_files({_file_of(folder, shown.stream): shown.dump().encode()})


def read_all(folder: Path) -> list[Shown]:
    """What all streams show, by name; a file that is damaged is left out and said in the log."""
    return sorted(_readable(folder), key=lambda shown: shown.stream)


def _readable(folder: Path) -> Iterator[Shown]:
    for path in folder.glob("*.json"):
        try:
            if path.stat().st_size <= _MOST_BYTES:
                yield Shown.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _log.warning("Left out of the page: %s (%s) [OOD409]", path, error)


def _file_of(folder: Path, stream: str) -> Path:
    """Named by a digest: the stream's name is anybody's text."""
    return folder / f"{hashlib.sha256(stream.encode()).hexdigest()[:16]}.json"


def _order(alert: Alert) -> tuple[int, int]:
    return alert.number, alert.samples_seen


def _explained(alert: Alert, explanation: Alert) -> Alert:
    is_of = alert.id == explanation.explains and explanation.top_layers
    return replace(alert, top_layers=explanation.top_layers) if is_of else alert


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Every second of the older half, where there are more than are drawn."""
    if len(points) <= _POINTS:
        return tuple(points)
    half = len(points) // 2
    return (*points[:half:2], *points[half:])


def _plain(summary: Summary) -> dict[str, Any]:
    return {**vars(summary), "invalid": dict(summary.invalid), "time": summary.time.isoformat()}


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    summary = record["summary"]
    return {
        "summary": None
        if summary is None
        else Summary(**summary | {"time": datetime.fromisoformat(summary["time"])}),
        **{name: tuple(Alert.from_json(json.dumps(it)) for it in record[name]) for name in _TOLD},
        "points": tuple((int(seen), float(evidence)) for seen, evidence in record["points"]),
        "since": datetime.fromisoformat(record["since"]),
        "written": datetime.fromisoformat(record["written"]),
    }
