"""The page itself: figures as text of the file, and a template in which every name is escaped."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ood_monitor import __version__, plots
from ood_monitor.alerts.alert import Alert
from ood_monitor.calibration.conformal import binomial_interval
from ood_monitor.calibration.groups import OTHERS
from ood_monitor.checks import flag, number, text
from ood_monitor.escaping import terminal
from ood_monitor.pages import template_of
from ood_monitor.report.banner import banner_of
from ood_monitor.report.course import Drift, drift_of
from ood_monitor.report.findings import Finding, can_flag, findings_of
from ood_monitor.report.gallery import MOST, Exhibit, Gallery, mapped, marked, picture
from ood_monitor.report.samples import HeldOut, Stream
from ood_monitor.saving.fitted import Fitted

__all__ = ["html_report"]

#: Read at once, so that a lack of jinja2 is told of before hours of scoring.
_TEMPLATE = template_of("ood_monitor.report", "template.html")

#: Panels, bars and rows that a page has room for.
_PANELS, _BARS, _ROWS = 6, 10, 10

_STALE = Finding(
    "problem",
    "The model has other weights than the detector was fitted on: no figure here can be trusted.",
    "Fit the detector again on normal samples, or bring the old weights back.",
)


@dataclass(frozen=True)
class _Shown:
    """A figure for the page: what it looks like, what it says to who cannot see it, and more."""

    source: str
    alt: str
    caption: str
    wide: bool


def html_report(
    fitted: Fitted,
    *,
    facts: Mapping[str, Any] | None = None,
    held_out: HeldOut | None = None,
    stream: Stream | None = None,
    fpr: float = 0.01,
    ert: float = 10_000,
    title: str = "Out-of-distribution report",
    gallery: Gallery | None = None,
    alerts: Sequence[Alert] = (),
    is_stale: bool = False,
) -> str:
    """The report of a detector as one HTML document.

    Args:
        fitted: What the detector learned.
        facts: What it is, by name.
        held_out: Samples to see the layers' fit on.
        stream: Scored samples, to look for drift in.
        fpr: Share of normal samples that may be flagged.
        ert: Mean number of normal samples between two false drift alarms.
        title: The heading.
        gallery: Samples to show. The page then holds data, which no alert does.
        alerts: What a monitor has said of the stream, in place of what it would have said.
        is_stale: Whether the model has other weights than the detector was fitted on.

    Returns:
        The document, which needs nothing but itself.

    Raises:
        ValueError: ``ert`` below 2, or ``fpr`` not in (0, 1).
        TypeError: An option of another type.
    """
    fpr, ert = number("fpr", fpr, 0, 1, ends="()"), number("ert", ert, 2, ends="[)")
    text("title", title)
    stale = flag("is_stale", is_stale)
    held_out, stream = _drawable(held_out, stream)
    has_valid = stream is not None and bool(stream.valid.any())
    drift = None if stream is None else drift_of(fitted, stream, ert=ert, fpr=fpr)
    told = list(alerts) or ([] if drift is None else list(drift.alerts))
    findings = findings_of(fitted, held_out, stream, drift, fpr=fpr, ert=ert)
    if stale:
        findings.insert(0, _STALE)
    return _TEMPLATE.render(
        title=title,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        facts=dict(facts or {}),
        dropped=fitted.joined.dropped,
        banner=banner_of(findings, drift, alerts, is_stale=stale),
        findings=findings,
        gallery=None if gallery is None else _shown_gallery(gallery),
        scores=_shown_scores(fitted, stream if has_valid else None),
        held_out=held_out,
        fit=[] if held_out is None else _shown_fit(held_out),
        drift=None if drift is None else _shown_drift(drift, ert),
        course=_shown_stream(stream, fpr) if stream is not None and has_valid else None,
        groups=[] if stream is None else _groups(fitted, stream, fpr),
        alerts=told[-_ROWS:][::-1],
        layers=None if stream is None else _shown_layers(stream, fpr),
        stream=stream,
        flagged=[] if stream is None else stream.flagged(fpr)[:_ROWS],
        can_flag=can_flag(fitted, fpr),
        fpr=fpr,
    )


def _drawable(
    held_out: HeldOut | None, stream: Stream | None
) -> tuple[HeldOut | None, Stream | None]:
    """The same with names that a figure can write."""
    if held_out is not None:
        held_out = replace(held_out, z={terminal(name): z for name, z in held_out.z.items()})
    if stream is not None:
        layers = [layer and terminal(layer) for layer in stream.top_layers]
        stream = replace(stream, name=terminal(stream.name), top_layers=layers)
    return held_out, stream


def _shown_scores(fitted: Fitted, stream: Stream | None) -> _Shown:
    groups = {"calibration": fitted.calibration.scores}
    text = f"{len(fitted.calibration.scores):,} calibration samples"
    if stream is not None:
        groups[stream.name] = stream.score
        text += f" and {len(stream.ids):,} samples of {stream.name}"
    figure = plots.score_histogram(groups, title="Anomaly scores")
    return _shown(
        figure,
        f"Histogram of the anomaly scores of {text}.",
        "Higher is more anomalous. A sample's p-value is the share of calibration samples that "
        "score at least as high.",
    )


def _shown_fit(held_out: HeldOut) -> list[_Shown]:
    distances = held_out.distances()
    if not distances:
        return []
    worst = sorted(distances, key=lambda name: -distances[name])[:_PANELS]
    return [
        _shown(
            plots.misfit_figure(distances, limit=held_out.limit),
            f"Kolmogorov-Smirnov distance of {len(distances):,} layers; the largest is "
            f"{distances[worst[0]]:.2f}, of {worst[0]}.",
            "How far the log gradient norms of held-out samples are from the normal that was "
            "fitted to them, layer by layer. 0 is a perfect fit.",
        ),
        *_shown_correlation(held_out),
        _shown(
            plots.quantile_figure({name: held_out.z[name] for name in worst}),
            f"Quantile plots of the {len(worst)} layers that are fitted worst: "
            + ", ".join(f"{name} (distance {distances[name]:.2f})" for name in worst)
            + ".",
            f"The {len(worst)} layers that are fitted worst. Points on the line are as fitted; "
            "points that bend away at the ends are heavier or lighter tails.",
        ),
    ]


def _shown_correlation(held_out: HeldOut) -> list[_Shown]:
    names, correlation = held_out.correlation()
    if not names:
        return []
    return [
        _shown(
            plots.correlation_figure(names, correlation),
            f"Heat map of the correlation between {len(names):,} layers.",
            "Layers that say the same. The paper's density takes them as independent; the default "
            "density of this library does not.",
        )
    ]


def _shown_drift(drift: Drift, ert: float) -> _Shown:
    figure = plots.evidence_figure(drift.log_e_values, ert=ert, alarms=drift.alarms)
    last = "" if not drift.last else f", at e^{drift.value(drift.last):.1f} at the end"
    said = (
        f"It first crosses the threshold at sample {drift.alarms[0]:,}."
        if drift.alarms
        else f"It stays below the threshold of e^{math.log(ert):.1f}{last}."
    )
    return _shown(
        figure,
        f"Evidence of drift over {len(drift.log_e_values):,} samples. {said}",
        "Evidence against the calibration data, sample by sample. It starts anew after an alarm.",
    )


def _shown_stream(stream: Stream, fpr: float) -> _Shown:
    flagged = stream.p_value <= fpr
    return _shown(
        plots.stream_figure(stream.score, flagged, fpr=fpr),
        f"Scores and share flagged over {len(stream.ids):,} samples in their order; in all "
        f"{int(flagged.sum()):,} are flagged.",
        "The stream over time: the scores, and how often samples are flagged. Of normal samples it "
        "is the dashed line on average.",
    )


def _groups(fitted: Fitted, stream: Stream, fpr: float) -> list[tuple[str, int, int, float, float]]:
    """Of each group its name, valid and flagged samples, and the interval of their rate."""
    if fitted.grouped is None or stream.groups is None:
        return []
    found = []
    for index, name in enumerate([*fitted.grouped.large, OTHERS]):
        own = stream.valid & (stream.groups == index)
        flagged, count = int((stream.p_value[own] <= fpr).sum()), int(own.sum())
        if count:
            found.append((name, count, flagged, *binomial_interval(flagged, count)))
    return found


def _shown_gallery(gallery: Gallery) -> dict[str, Any]:
    """Pictures and marked texts, as the template takes them."""

    def shown(exhibit: Exhibit) -> dict[str, Any]:
        return {
            "id": exhibit.id,
            "p_value": exhibit.p_value,
            "picture": picture(exhibit),
            "map": mapped(exhibit, gallery.full),
            "tokens": list(marked(exhibit, gallery.full)),
        }

    return {
        "has_maps": gallery.has_maps,
        "since": gallery.since,
        "anomalous": [shown(each) for each in gallery.anomalous[:MOST]],
        "typical": [shown(each) for each in gallery.typical[:MOST]],
    }


def _shown_layers(stream: Stream, fpr: float) -> _Shown | None:
    counts = stream.counted_layers(fpr, _BARS)
    if not counts:
        return None
    first, most = next(iter(counts.items()))
    return _shown(
        plots.top_layer_figure(counts),
        f"Layers that deviate most in flagged samples; the first is {first}, in {most:,}.",
        "Where in the model the flagged samples are unlike the held-out ones.",
    )


def _shown(figure: Figure, alt: str, caption: str) -> _Shown:
    wide = figure.get_figwidth() > 6.0  # inches, that of one panel
    return _Shown(_source(figure), alt, caption, wide)


def _source(figure: Figure) -> str:
    """The figure as an address that holds it; the same each time it is drawn."""
    file = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "ood-monitor", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
