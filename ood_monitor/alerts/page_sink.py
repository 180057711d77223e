"""A page that is rewritten: how streams stand, for people without a server to look at.

    with Monitor(detector, sinks=[PageSink("status.html")]) as monitor:
        ...

The file is static: no script, no address, nothing that it needs from elsewhere. A browser reads it
anew by itself.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from os import PathLike
from typing import Any

from ood_monitor.alerts.alert import Alert
from ood_monitor.alerts.board import Shown, read_all, write
from ood_monitor.alerts.figures import Summary
from ood_monitor.alerts.guidance import guidance_of, since_of
from ood_monitor.checks import number, path_of, text
from ood_monitor.pages import template_of
from ood_monitor.whole_files import replace_files

__all__ = ["PageSink"]

#: Streams, the worst first.
_WORST = ("ALERT", "SILENT", "WARN", "OK", "ENDED")

#: Width and height of a curve, in its own units.
_WIDTH, _HEIGHT = 600, 90


class PageSink:
    """Rewrites an HTML file with the status, the evidence, rates and last alerts of streams.

    Each monitor has a sink of its own, in whatever process; those that are given the same file
    share it, by a folder beside it, ``FILE.streams``. Each word rewrites the file as a whole: a
    reader sees the page before or after. A stream that was not heard of for four times ``refresh``
    is shown as silent, as far as another one still writes; the page says when it was written.
    :meth:`~ood_monitor.Monitor.summarise` says a word where no samples come.

    Args:
        path: The file.
        title: The heading.
        refresh: Seconds after which a browser reads the page anew.

    Attributes:
        name: By which a spool owes it alerts: the file.
        path: The file.

    Raises:
        FileNotFoundError: The file's folder is missing, or the file is a folder.
        ImportError: jinja2 is missing.
        ValueError: ``refresh`` is not in [1, 86 400].
        TypeError: An option of another type.
    """

    def __init__(
        self, path: str | PathLike[str], *, title: str = "ood-monitor", refresh: float = 30.0
    ) -> None:
        self.path = path_of("path", path)
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise FileNotFoundError(f"Expected a file in a folder that is there, got {self.path}.")
        self._title = text("title", title)
        self._refresh = number("refresh", refresh, 1, 86_400)
        self._template = template_of("ood_monitor.alerts", "page.html")
        self._folder = self.path.with_name(f"{self.path.name}.streams")
        self._streams: dict[str, Shown] = {}
        self._changing = threading.Lock()
        self.name = f"page:{self.path}"

    def __call__(self, alert: Alert, /) -> None:
        """Show `alert`; the same once more changes nothing."""
        self._change(alert.stream, lambda shown: shown.with_alert(alert))

    def summarise(self, summary: Summary, /) -> None:
        """Show the running figures."""
        self._change(summary.stream, lambda shown: shown.with_summary(summary))

    def close(self) -> None:
        """Show that the streams of this sink are watched no longer."""
        for stream in list(self._streams):
            self._change(stream, lambda shown: replace(shown, ended=True, written=_now()))

    def _change(self, stream: str, change: Callable[[Shown], Shown]) -> None:
        with self._changing:
            shown = self._streams.get(stream) or self._before(stream)
            changed = change(replace(shown, refresh=self._refresh))
            write(self._folder, changed)
            self._streams[stream] = changed
            replace_files({self.path: self._page(read_all(self._folder)).encode()})

    def _before(self, stream: str) -> Shown:
        """What the page showed of a stream before a restart."""
        found = read_all(self._folder) if self._folder.is_dir() else []
        return next((shown for shown in found if shown.stream == stream), Shown(stream))

    def _page(self, streams: Sequence[Shown]) -> str:
        now = _now()
        told = sorted((_told(shown, now) for shown in streams), key=lambda it: it["rank"])
        return self._template.render(
            title=self._title,
            overall=told[0]["status"],
            streams=told,
            now=_when(now),
            refresh=math.ceil(self._refresh),
        )


def _now() -> datetime:
    return datetime.now(UTC)


def _when(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _told(shown: Shown, now: datetime) -> dict[str, Any]:
    """A stream in words and numbers, as the template takes it."""
    status = _status(shown, now)
    alert = shown.standing
    return {
        "name": shown.stream,
        "status": status,
        "rank": (_WORST.index(status), shown.stream),
        "is_good": status in ("OK", "ENDED"),
        "is_silent": shown.is_silent(now),
        "since": f"sample {shown.since_sample:,}, {_when(shown.since)}",
        "alert": None if alert is None else _story(alert),
        "figures": [] if shown.summary is None else _figures(shown.summary),
        "curve": _curve(shown),
        "alerts": [_row(each) for each in shown.alerts],
        "written": _when(shown.written),
        "ended": shown.ended,
    }


def _status(shown: Shown, now: datetime) -> str:
    if shown.is_silent(now) and shown.status != "ALERT":
        return "SILENT"
    return "ENDED" if shown.ended and shown.status == "OK" else shown.status


def _story(alert: Alert) -> dict[str, Any]:
    """The alert to act on: what it means, since when, what to do, and of what it is."""
    return _row(alert) | {
        "guidance": guidance_of(alert.kind),
        "since": since_of(alert),
        "samples": [it.id or f"sample {it.position:,}" for it in alert.samples[-5:]],
        "layers": [layer.layer for layer in alert.top_layers[:3]],
        "help": alert.help,
    }


def _row(alert: Alert) -> dict[str, Any]:
    """An alert as a line of the table."""
    return {
        "time": _when(alert.time),
        "sample": f"{alert.samples_seen:,}",
        "kind": alert.kind,
        "message": alert.message,
    }


def _figures(summary: Summary) -> list[tuple[str, str]]:
    invalid = sum(summary.invalid.values())
    bar = "" if summary.ert is None else f" of e^{math.log(summary.ert):.1f}, where it alarms"
    promised = "" if summary.fpr is None else f" (of normal samples at most {summary.fpr:.2%})"
    return [
        ("Samples seen", f"{summary.samples_seen:,}, {invalid:,} of them could not be scored"),
        ("Flagged lately", _known(summary.flagged_rate, ".2%") + promised),
        ("Evidence of a drift", _evidence(summary.log_e_value) + bar),
        (
            "Anomaly score",
            f"mean {_known(summary.score_mean, '.4g')}, 95 % below "
            f"{_known(summary.score_p95, '.4g')}",
        ),
    ]


def _known(value: float | None, form: str) -> str:
    return "not known yet" if value is None else format(value, form)


def _evidence(value: float | None) -> str:
    return "none yet" if value is None else f"e^{value:.1f}"


def _curve(shown: Shown) -> dict[str, Any] | None:
    """The evidence as points of an SVG, with the bar where it is known; None before there are two.

    The evidence of a few nats below 0 is none, and drawn as 0.
    """
    points = [(seen, max(value, 0.0)) for seen, value in shown.points]
    if len(points) < 2:
        return None
    ert = None if shown.summary is None else shown.summary.ert
    bar, most = None if ert is None else math.log(ert), max(value for _, value in points)
    top, (first, _), (last, now) = 1.1 * max(bar or 1.0, most), points[0], points[-1]
    alarms = "" if bar is None else f"; it alarms at e^{bar:.1f}"
    places = [
        f"{_WIDTH * (seen - first) / max(last - first, 1):.1f},{_HEIGHT * (1 - value / top):.1f}"
        for seen, value in points
    ]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "points": " ".join(places),
        "bar": None if bar is None else f"{_HEIGHT * (1 - bar / top):.1f}",
        "says": f"Evidence of a drift from sample {first:,} to {last:,}: now e^{now:.1f}, at most "
        f"e^{most:.1f}{alarms}.",
    }
