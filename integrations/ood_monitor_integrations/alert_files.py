"""An alert as files beside a run: what they are called, and what there is to draw."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ood_monitor.alerts import Alert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_of", "place_of"]


def place_of(alert: Alert) -> str:
    """The path of its files below a run's, without a suffix.

    An explanation's files stand beside those of the alert that it is of.
    """
    explains = alert.kind == "explanation" and alert.explains is not None
    return f"ood/alerts/{f'{alert.explains}-explanation' if explains else alert.id}"


def figure_of(alert: Alert) -> "Figure | None":
    """Its figure; None where it has nothing to show, or matplotlib is not installed."""
    if not (alert.trace or alert.top_layers or alert.top_terms) or not find_spec("matplotlib"):
        return None
    from ood_monitor.plots import alert_figure

    return alert_figure(alert)
