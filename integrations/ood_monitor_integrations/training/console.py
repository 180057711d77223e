"""Alerts on the console of a training, above its progress bar."""

import sys

from tqdm.auto import tqdm

from ood_monitor import Alert
from ood_monitor.alerts.sink import alert_line

__all__ = ["ConsoleSink"]

#: Lines of a stage about single samples that were flagged, of which a share `fpr` always is.
_LINES = 20
_MORE = " (no more lines of flagged samples in this stage)"


class ConsoleSink:
    """Prints a line per alert of a stage, above the progress bar if there is one.

    Of single samples that are flagged, of which there are some in every long stream, the first
    twenty lines; the last of them says so.
    """

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._lines = 0

    def __call__(self, alert: Alert, /) -> None:
        """Print `alert`."""
        if alert.id in self._ids:
            return
        self._ids.add(alert.id)
        is_usual = alert.kind == "sample" and alert.severity == "warning"
        self._lines += is_usual
        if is_usual and self._lines > _LINES:
            return
        more = _MORE if is_usual and self._lines == _LINES else ""
        _print(f"ood-monitor {alert.severity}: {alert_line(alert)}{more}")


def _print(line: str) -> None:
    # To the output of now, which Rich's bar replaces; tqdm's own bars make room for it.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding))
