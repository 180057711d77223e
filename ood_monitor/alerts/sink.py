"""What takes alerts: the shapes of a sink, and the one that writes to the standard log."""

import logging
from typing import Protocol, runtime_checkable

from ood_monitor.alerts.alert import CALM, Alert
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.checks import having
from ood_monitor.escaping import terminal

__all__ = ["LoggingSink", "MeterSink", "Sink", "SummarySink", "alert_line"]

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}

_log = logging.getLogger("ood_monitor.alerts")


class Sink(Protocol):
    """Takes an alert where people look.

    It may block and it may raise. If it has a `close()`, that is called once, after the last alert;
    if it has a `name`, its undelivered alerts are kept under that.
    """

    def __call__(self, alert: Alert, /) -> None:
        """Deliver `alert`, or raise to have it tried again: a repeated `id` must do no harm."""


@runtime_checkable
class SummarySink(Sink, Protocol):
    """A sink that shows the running figures too."""

    def summarise(self, summary: Summary, /) -> None:
        """Show `summary`. It is not tried again."""


@runtime_checkable
class MeterSink(Sink, Protocol):
    """A sink that keeps meters of every sample."""

    def measure(self, reading: Reading, /) -> None:
        """Take in `reading`. It is not tried again."""


class LoggingSink:
    """Writes one line per alert to the standard log: a warning or an error, a recovery as info.

    Args:
        logger: Where to write; the logger `ood_monitor.alerts` by default.

    Attributes:
        name: By which a spool owes it alerts: the logger's.

    Raises:
        TypeError: It is no logger.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = _log if logger is None else having("logger", logger, "log")
        self.name = f"log:{getattr(self._logger, 'name', '')}"

    def __call__(self, alert: Alert, /) -> None:
        """Log `alert`."""
        level = logging.INFO if alert.kind in CALM else _LEVELS[alert.severity]
        self._logger.log(level, "%s", alert_line(alert))


def alert_line(alert: Alert) -> str:
    """What an alert says, as one line for a terminal or a log."""
    evidence = alert.evidence
    parts = [f"{evidence.flagged} of {evidence.window} samples flagged"]
    if evidence.log_e_value is not None:
        parts.append(f"log e-value {evidence.log_e_value:.1f}")
    if evidence.p_value is not None:
        parts.append(f"p-value {evidence.p_value:.2g}")
    if alert.top_layers:
        parts.append(f"top layer {alert.top_layers[0].layer}")
    if alert.top_terms:
        parts.append(f"top term {alert.top_terms[0].term}")
    where = f"stream {alert.stream}, sample {alert.samples_seen}"
    line = f"{alert.kind} ({where}): {alert.message} [{'; '.join(parts)}] help {alert.help} "
    line += f"id {alert.id}"
    return terminal(" ".join(line.split()))
