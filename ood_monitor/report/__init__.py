"""One HTML file that says what a detector is, how well it fits, and what it found.

    page = html_report(Fitted.load(directory)[0], held_out=held_out, stream=stream)

The page holds its figures and needs no network; it runs no script, and its own policy forbids both.
"""

from ood_monitor.report.course import Drift, drift_of
from ood_monitor.report.findings import Finding
from ood_monitor.report.gallery import Exhibit, Gallery
from ood_monitor.report.page import html_report
from ood_monitor.report.samples import HeldOut, Stream

__all__ = ["Drift", "Exhibit", "Finding", "Gallery", "HeldOut", "Stream", "drift_of", "html_report"]
