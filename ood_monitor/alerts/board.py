"""What a page shows of each stream: kept in a file for each, which any process can read."""

import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from ood_monitor.alerts.alert import Alert, Status
from ood_monitor.alerts.figures import Summary

__all__ = ["Shown", "read_all", "replaced", "write"]

_log = logging.getLogger(__name__)

#: Alerts of a stream that are shown, and points of its curves.
_ALERTS, _POINTS = 10, 240

#: What of a stream is alerts.
_TOLD = ("alerts", "causes")

#: Kinds that no status other than OK is of.
_NO_CAUSE = ("explanation", "accepted", "recovered")

#: Version of a stream's file.
_FORMAT = 1

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
        points: Of the latest summaries samples seen, evidence in nats and flagged rate, any of the
            last two None.
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
    points: tuple[tuple[int, float | None, float | None], ...] = ()
    status: Status = "OK"
    since_sample: int = 0
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    said: int = 0
    written: datetime = field(default_factory=lambda: datetime.now(UTC))
    refresh: float = 30.0
    ended: bool = False

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
        point = summary.samples_seen, summary.log_e_value, summary.flagged_rate
        points = [it for it in self.points if it[0] < point[0]]
        return self._said(summary, summary=summary, points=_thinned([*points, point]))

    def is_silent(self, now: datetime) -> bool:
        """Whether it should have been heard of, and was not."""
        return not self.ended and now - self.written > timedelta(seconds=4 * self.refresh)

    @property
    def standing(self) -> Alert | None:
        """The alert to act on first; None while the status is OK, or if none told of it."""
        if self.status == "OK":
            return None
        flags = [it for it in self.alerts if it.kind not in _NO_CAUSE and it.status != "OK"]
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
    def parse(cls, text: str) -> Self:
        """What :meth:`dump` gave.

        Raises:
            ValueError: Something else.
        """
        try:
            record = json.loads(text)
            if (found := record.pop("format")) != _FORMAT:
                raise ValueError(f"format {found!r}")
            return cls(**record | _parsed(record))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
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
    replaced(_file_of(folder, shown.stream), shown.dump())


def read_all(folder: Path) -> list[Shown]:
    """What all streams show, by name; a file that is damaged is left out and said in the log."""
    return sorted(_readable(folder), key=lambda shown: shown.stream)


def replaced(path: Path, text: str) -> None:
    """Write a file in the place of the one that is there: a reader sees either, whole."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _readable(folder: Path) -> Iterator[Shown]:
    for path in folder.glob("*.json"):
        try:
            if path.stat().st_size <= _MOST_BYTES:
                yield Shown.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _log.warning("Left out of the page: %s (%s)", path, error)


def _file_of(folder: Path, stream: str) -> Path:
    """Named by a digest: the stream's name is anybody's text."""
    return folder / f"{hashlib.sha256(stream.encode()).hexdigest()[:16]}.json"


def _order(alert: Alert) -> tuple[int, int]:
    return alert.number, alert.samples_seen


def _explained(alert: Alert, explanation: Alert) -> Alert:
    is_of = alert.id == explanation.explains and explanation.top_layers
    return replace(alert, top_layers=explanation.top_layers) if is_of else alert


def _thinned(points: list[Any]) -> tuple[Any, ...]:
    """Every second of the older half, where there are more than are drawn."""
    if len(points) <= _POINTS:
        return tuple(points)
    half = len(points) // 2
    return (*points[:half:2], *points[half:])


def _plain(summary: Summary) -> dict[str, Any]:
    return {**vars(summary), "invalid": dict(summary.invalid), "time": summary.time.isoformat()}


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    summary, refresh = record["summary"], float(record["refresh"])
    if not (math.isfinite(refresh) and refresh > 0):
        raise ValueError(f"refresh {refresh!r}")
    return {
        "summary": summary
        and Summary(**summary | {"time": datetime.fromisoformat(summary["time"])}),
        **{name: tuple(Alert.from_json(json.dumps(it)) for it in record[name]) for name in _TOLD},
        "points": tuple(_point(*point) for point in record["points"]),
        "since": datetime.fromisoformat(record["since"]),
        "written": datetime.fromisoformat(record["written"]),
        "refresh": refresh,
    }


def _point(seen: Any, evidence: Any, rate: Any) -> tuple[int, float | None, float | None]:
    return int(seen), None if evidence is None else float(evidence), rate and float(rate)
