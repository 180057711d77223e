"""What a report begins with: the status, since when, and what to do now."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
from support.alert_cases import ALERT

from ood_monitor.alerts import Alert, AlertKind, FlaggedSample, Status, guidance_of
from ood_monitor.report.banner import Banner, banner_of
from ood_monitor.report.course import Drift
from ood_monitor.report.findings import Finding

BAD = Finding("problem", "Bad.", "1")
UNSURE = Finding("unknown", "Unsure.", "1")
GOOD = Finding("good", "Good.", "1")


def alert(kind: AlertKind, status: Status, seen: int, stream: str = "s") -> Alert:
    return replace(
        ALERT,
        kind=kind,
        status=status,
        samples_seen=seen,
        stream=stream,
        severity="critical" if kind == "drift" else "warning",
        samples=(FlaggedSample(seen, 0.01, "a.png"),),
        number=seen,
        id=f"{seen:032x}",
        message=f"{kind} at {seen}",
    )


def drift_of(alerts: tuple[Alert, ...], status: Status) -> Drift:
    return Drift(np.ones(5), np.arange(1, 6), alerts, status, is_long_enough=True)


@dataclass(frozen=True)
class Case:
    """What is known, and what is said first."""

    status: str
    says: str
    since: str = ""
    findings: tuple[Finding, ...] = (GOOD,)
    drift: Drift | None = None
    alerts: tuple[Alert, ...] = ()
    is_stale: bool = False
    kind: AlertKind | Literal[""] = ""


DRIFT, SAMPLE = alert("drift", "ALERT", 100), alert("sample", "WARN", 7)
OVER = alert("recovered", "OK", 900)
STALE = alert("stale_calibration", "WARN", 3)

CASES: dict[str, Case] = {
    "one sample": Case(
        "WARN", "sample at 7", "sample 7", drift=drift_of((SAMPLE,), "WARN"), kind="sample"
    ),
    "a drift": Case(
        "ALERT",
        "drift at 100",
        "sample 100",
        drift=drift_of((SAMPLE, DRIFT), "ALERT"),
        kind="drift",
    ),
    "a drift that is over": Case("OK", "Nothing", drift=drift_of((DRIFT, OVER), "OK")),
    "a sample that is long ago": Case("OK", "Nothing", drift=drift_of((SAMPLE,), "OK")),
    "what a monitor has said goes first": Case(
        "WARN",
        "stale_calibration at 3",
        "sample 3 or before",
        drift=drift_of((), "OK"),
        alerts=(STALE,),
        kind="stale_calibration",
    ),
    "the worst of several streams": Case(
        "ALERT",
        "drift at 100",
        alerts=(replace(DRIFT, stream="a"), replace(SAMPLE, stream="b")),
        kind="drift",
    ),
    "a stale detector": Case(
        "WARN", "Fit the detector again", "before this report", is_stale=True,
        kind="stale_calibration",
    ),
    "a stale detector of which an alert told": Case(
        "WARN", "stale_calibration at 3", "sample 3 or before", alerts=(STALE,), is_stale=True,
        kind="stale_calibration",
    ),
    "a stale detector under which a drift was found": Case(
        "ALERT", "stale_calibration at 3", alerts=(STALE, DRIFT), is_stale=True,
        kind="stale_calibration",
    ),
    "nothing": Case("OK", "Nothing is wrong", drift=drift_of((), "OK")),
    "a problem without an alert": Case(
        "WARN", "something is wrong", findings=(BAD, GOOD), drift=drift_of((), "OK")
    ),
    "what cannot be told": Case(
        "NOT KNOWN", "could be judged", findings=(UNSURE, GOOD), drift=drift_of((), "OK")
    ),
}  # fmt: skip


def words(banner: Banner) -> str:
    do = banner.do if banner.guidance is None else banner.guidance.do
    return " ".join([banner.lead, banner.told, do])


@pytest.mark.parametrize("name", CASES)
def test_a_report_begins_with_status_since_and_what_to_do(name: str) -> None:
    case = CASES[name]
    banner = banner_of(case.findings, case.drift, case.alerts, is_stale=case.is_stale)
    assert banner is not None
    assert banner.status == case.status
    assert case.says in words(banner)
    assert case.since in banner.since
    assert banner.kind == case.kind
    assert (banner.guidance is not None) == bool(case.kind)
    if case.kind:
        assert banner.guidance == guidance_of(case.kind)
    assert banner.do or banner.guidance


def test_a_report_of_a_detector_alone_begins_with_its_findings() -> None:
    assert banner_of([GOOD, UNSURE], None, [], is_stale=False) is None
