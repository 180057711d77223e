"""Alerts: what a monitor tells people, and how it reaches each sink, once, whatever happens.

A sink is a callable that takes an :class:`Alert`. A :class:`Dispatcher` hands alerts to one thread
for each sink; a :class:`Spool` keeps on disk what is owed.
"""

from ood_monitor.alerts.alert import (
    Alert,
    AlertEvidence,
    AlertKind,
    FlaggedSample,
    LayerShare,
    Severity,
    Status,
    TermShare,
    TracePoint,
    severity_of,
)
from ood_monitor.alerts.dispatcher import Dispatcher
from ood_monitor.alerts.failures import Refused, Undelivered
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.alerts.guidance import Guidance, gravest_of, guidance_of, since_of
from ood_monitor.alerts.page_sink import PageSink
from ood_monitor.alerts.sink import LoggingSink, MeterSink, Sink, SummarySink
from ood_monitor.alerts.spool import Spool
from ood_monitor.alerts.webhook import WebhookError, WebhookRefused, WebhookSink, verify

__all__ = [
    "Alert",
    "AlertEvidence",
    "AlertKind",
    "Dispatcher",
    "FlaggedSample",
    "Guidance",
    "LayerShare",
    "LoggingSink",
    "MeterSink",
    "PageSink",
    "Reading",
    "Refused",
    "Severity",
    "Sink",
    "Spool",
    "Status",
    "Summary",
    "SummarySink",
    "TermShare",
    "TracePoint",
    "Undelivered",
    "WebhookError",
    "WebhookRefused",
    "WebhookSink",
    "gravest_of",
    "guidance_of",
    "severity_of",
    "since_of",
    "verify",
]
