"""What stands above all else: the status, since when, and what to do now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ood_monitor.alerts.alert import Alert, Status
from ood_monitor.alerts.board import Shown
from ood_monitor.alerts.guidance import Guidance, guidance_of, since_of
from ood_monitor.report.course import Drift
from ood_monitor.report.findings import Finding

__all__ = ["Banner", "banner_of"]

#: Statuses, the worst last.
_ORDER = get_args(Status)


@dataclass(frozen=True)
class Banner:
    """The first words of a page.

    Attributes:
        status: OK, WARN, ALERT, or NOT KNOWN.
        lead: What it means, in a sentence.
        since: Since when, in words; empty where nothing began.
        told: The alert's own message; empty without one.
        guidance: What to do; None where there is nothing.
        kind: The alert's; empty without one.
        do: What to do where no guidance says it.
    """

    status: str
    lead: str
    since: str = ""
    told: str = ""
    guidance: Guidance | None = None
    kind: str = ""
    do: str = ""


def banner_of(
    findings: Sequence[Finding],
    drift: Drift | None,
    alerts: Sequence[Alert],
    *,
    is_stale: bool,
) -> Banner | None:
    """What a report begins with; None where nothing was watched, nor found wrong.

    Args:
        findings: The report's.
        drift: What a monitor says of the stream; None without one.
        alerts: What a monitor has said of it, where these are given.
        is_stale: Whether the model has other weights than the detector.
    """
    told = [*alerts] or ([] if drift is None else [*drift.alerts])
    status = _folded(told)
    if is_stale:
        known = [alert for alert in alerts if alert.kind == "stale_calibration"]
        return _of_alert(known[-1], status.status) if known else _of_stale()
    if drift is not None and not alerts and drift.status != status.status:
        status = Shown("", alerts=status.alerts, status=drift.status)
    if (standing := status.standing) is not None:
        return _of_alert(standing, status.status)
    return _without(findings, is_watched=bool(alerts) or drift is not None)


def _folded(alerts: Sequence[Alert]) -> Shown:
    """Where the worst of the streams stands after its alerts."""
    streams = dict[str, Shown]()
    for alert in alerts:
        shown = streams.get(alert.stream) or Shown(alert.stream)
        streams[alert.stream] = shown.with_alert(alert)
    return max(streams.values(), key=lambda it: _ORDER.index(it.status), default=Shown(""))


def _of_alert(alert: Alert, status: Status) -> Banner:
    """An alert that stands, with the status of now, which may be that of what came after it."""
    guidance, since = guidance_of(alert.kind), since_of(alert)
    return Banner(status, guidance.means, since, alert.message, guidance, alert.kind)


def _of_stale() -> Banner:
    guidance = guidance_of("stale_calibration")
    since = "before this report was made, when the weights were looked at"
    return Banner("WARN", guidance.means, since, "", guidance, "stale_calibration")


def _without(findings: Sequence[Finding], *, is_watched: bool) -> Banner | None:
    verdicts = {finding.verdict for finding in findings}
    if "problem" in verdicts:
        lead, do = "No alert stands, but something is wrong.", "Read the problems below."
        return Banner("WARN", lead, do=do)
    if not is_watched:
        return None
    if "unknown" in verdicts:
        lead = "No alert stands, but not all of it could be judged."
        return Banner("NOT KNOWN", lead, do="Read below what is not known, and why.")
    return Banner("OK", "Nothing is wrong as far as is known.", do="Nothing.")
