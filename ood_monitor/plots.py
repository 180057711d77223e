"""The figures: scores by stream, layers against their fitted normal, alerts, a drift test.

Each function returns a `matplotlib.figure.Figure` of its own, made without pyplot: no display, no
global state, any thread. Save it with `figure.savefig(path)`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from ood_monitor.alerts.alert import Alert, LayerShare, TermShare
from ood_monitor.escaping import terminal

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness.
_BLUE, _ORANGE, _BLACK = "#0072B2", "#D55E00", "#000000"
_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", _BLACK)
_BINS = 40
_WIDE = 100  # times the first group's spread, from where an axis is logarithmic
_COLUMNS = 3  # panels beside each other
_POINTS = 200  # of a panel of quantiles
_STRETCHES = 60  # of a stream over time
_NAMED = 20  # layers that a heat map has room to name


def score_histogram(
    groups: Mapping[str, ArrayLike], *, title: str, log_density: bool = False
) -> Figure:
    """Histograms of anomaly scores, such as calibration data beside the streams.

    Where some scores lie far beyond those of the first group, the axis is linear about zero and
    logarithmic further out, and bars show shares of the samples in place of densities.

    Args:
        groups: Scores by the name of their group, each of shape (N,); values that are not finite
            are left out and counted in the legend.
        title: What the figure shows.
        log_density: Whether the density has a logarithmic axis.

    Raises:
        ValueError: If there is no group, or a group has no finite score.
    """
    if not groups:
        raise ValueError("Expected at least one group of scores.")
    figure, axes = _one_panel(title)
    finite = {name: _finite(name, scores) for name, scores in groups.items()}
    edges = _wide_edges([values for values, _ in finite.values()], axes)
    for index, (name, (values, lost)) in enumerate(finite.items()):
        label = f"{name} (n = {len(values):,}{f', {lost:,} not finite' if lost else ''})"
        colour = _COLOURS[index % len(_COLOURS)]
        _histogram(axes, values, colour, label, log=log_density, edges=edges)
    axes.set_xlabel("anomaly score (no unit; higher = more anomalous)")
    axes.set_ylabel("density (per unit of score)" if edges is None else "share of the samples")
    axes.legend(fontsize="small")
    return figure


def layer_histograms(
    features: Mapping[str, ArrayLike],
    fitted: Mapping[str, tuple[float, float]],
    *,
    other: Mapping[str, Mapping[str, ArrayLike]] | None = None,
) -> Figure:
    """A panel per layer: its log squared gradient norms and the normal density fitted to them.

    Args:
        features: In-distribution log squared norms by layer, each of shape (N,).
        fitted: Mean and standard deviation by layer, of the same quantity.
        other: The same as `features` for other data, by the data's name; a layer may be missing.
            Values that are not finite are left out everywhere.

    Raises:
        ValueError: If there is no layer, a layer is not fitted or has a standard deviation that is
            not positive, or a group of values has none that is finite.
    """
    if missing := sorted(set(features) - set(fitted)) or (not features and ["any"]):
        raise ValueError(f"Expected a fitted mean and deviation for each layer, not for {missing}.")
    figure, panels = _panels(len(features))
    for axes, (layer, values) in zip(panels, features.items(), strict=True):
        groups = {"in-distribution": values} | _of_layer(other or {}, layer)
        _layer_panel(axes, layer, groups, fitted[layer])
    _share_legend(figure, panels)
    figure.supxlabel("log squared gradient norm (natural logarithm of nats²)", fontsize="medium")
    figure.supylabel("density (per unit of the logarithm)", fontsize="medium")
    return figure


def alert_figure(alert: Alert) -> Figure:
    """An alert at a glance: what came since when, and which parts and layers speak for it.

    From above, each where the alert has it: p-values over the stream with the change marked, the
    terms or parts of the score by their share, and how far each layer is from what is usual.
    """
    layers = [layer for layer in alert.top_layers if layer.z is not None]
    shares = [term for term in alert.top_terms if term.share is not None]
    panels: list[tuple[Callable[[Axes], None], float, bool]] = [
        (lambda axes: _trace_panel(axes, alert), 2.0, bool(alert.trace)),
        (lambda axes: _share_panel(axes, shares), 0.7 + 0.25 * len(shares), bool(shares)),
        (lambda axes: _layers_panel(axes, layers), 0.7 + 0.25 * len(layers), bool(layers)),
    ]
    shown = [(draw, height) for draw, height, is_known in panels if is_known]
    heading = f"{alert.kind}: stream {alert.stream}, {alert.samples_seen:,} samples seen"
    heights = [height for _, height in shown] or [2.0]
    figure = _figure(6.0, max(4.0, 0.6 + sum(heights)))
    figure.suptitle(_literal(heading), fontsize="medium", wrap=True)
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights).ravel()
    for (draw, _), panel in zip(shown, axes, strict=False):
        panel.spines[["top", "right"]].set_visible(False)
        draw(panel)
    if not shown:
        axes[0].text(0.5, 0.5, "This alert names no layer.", ha="center")
        axes[0].set_axis_off()
    return figure


def _trace_panel(axes: Axes, alert: Alert) -> None:
    """P-values over the stream, and the samples that the evidence may have begun with."""
    points = [point for point in alert.trace if point.p_value is not None]
    positions, p_values = [it.position for it in points], [it.p_value or 0.0 for it in points]
    evidence = alert.evidence
    axes.scatter(positions, p_values, s=6, color=_BLUE, linewidths=0)
    if evidence.since is not None:
        earliest, latest = evidence.since_earliest, evidence.since_latest
        axes.axvspan(earliest or evidence.since, latest or evidence.since, color=_ORANGE, alpha=0.2)
        label = f"evidence since about sample {evidence.since:,}"
        axes.axvline(evidence.since, color=_ORANGE, linewidth=1.2, label=label)
        axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes.set(ylim=(0, 1), xlabel="sample of the stream")
    axes.set_ylabel("p-value (rank in the stream)", fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _share_panel(axes: Axes, terms: Sequence[TermShare]) -> None:
    names = _apart([term.term for term in terms])
    bars = axes.barh(range(len(terms)), [term.share or 0.0 for term in terms], color=_BLUE)
    axes.bar_label(bars, [_percent(term.share) for term in terms], padding=3, fontsize="small")
    axes.set_yticks(range(len(terms)), names, fontsize="small")
    axes.set(xlabel="share of the score")
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _layers_panel(axes: Axes, layers: Sequence[LayerShare]) -> None:
    """The furthest on top."""
    layers = sorted(layers, key=lambda layer: abs(layer.z or 0.0))
    z = [layer.z or 0.0 for layer in layers]
    bars = axes.barh(range(len(z)), z, color=[_ORANGE if value >= 0 else _BLUE for value in z])
    axes.bar_label(bars, [_percent(layer.share) for layer in layers], padding=3, fontsize="small")
    axes.set_yticks(range(len(z)), _apart([layer.layer for layer in layers]), fontsize="small")
    axes.set_xlabel("standard deviations from what is usual\n(% = share of the score)")
    axes.axvline(0.0, color=_BLACK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.15)


def evidence_figure(log_e_values: ArrayLike, *, ert: float, alarms: Sequence[int] = ()) -> Figure:
    """The drift test's evidence over a stream, with the threshold that raises the alarm.

    Args:
        log_e_values: Natural logarithm of the e-value after each sample, of shape (N,); a value
            that is not finite leaves a gap.
        ert: Promised mean number of samples between false alarms; the threshold is its logarithm.
        alarms: Number of samples seen at each alarm.

    Raises:
        ValueError: If `ert` is not positive and finite, or the values are not of shape (N,).
    """
    values = np.asarray(log_e_values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"Expected log e-values of shape (N,), got {values.shape}.")
    if not 0 < ert < math.inf:
        raise ValueError(f"Expected a positive, finite ERT in samples, got {ert}.")
    figure, axes = _one_panel("Evidence of drift")
    seen = np.arange(1, len(values) + 1)
    axes.plot(seen, np.where(np.isfinite(values), values, np.nan), color=_BLUE, label="evidence")
    label = f"threshold: one false alarm in {ert:,.0f} samples"
    axes.axhline(math.log(ert), color=_ORANGE, linestyle="--", label=label)
    for index, alarm in enumerate(alarms):
        axes.axvline(alarm, color=_BLACK, linestyle=":", label="alarm" if index == 0 else None)
    axes.set_xlabel("samples seen")
    axes.set_ylabel("log e-value (natural logarithm; no unit)")
    axes.legend(fontsize="small")
    return figure


def stream_figure(score: ArrayLike, flagged: ArrayLike, *, fpr: float) -> Figure:
    """A stream over time: its scores, and the share of it that is flagged, by stretches.

    Args:
        score: Anomaly scores in the order of the stream, (N,); nan for an invalid sample, which
            counts nowhere.
        flagged: Which samples are flagged, (N,), bool.
        fpr: The promised share of normal samples that are flagged.

    Raises:
        ValueError: The two are not of shape (N,), no score is finite, or ``fpr`` is not in (0, 1).
    """
    values, flags = np.asarray(score, dtype=np.float64), np.asarray(flagged, dtype=bool)
    if values.ndim != 1 or flags.shape != values.shape:
        raise ValueError(f"Expected scores and flags of (N,), got {values.shape}, {flags.shape}.")
    if not 0 < fpr < 1:
        raise ValueError(f"Expected an fpr in (0, 1), got {fpr}.")
    _finite("the stream", values)
    figure = _figure(6.0, 4.0)
    figure.suptitle("The stream over time", fontsize="medium")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    stretches = [
        (int(rows[0]) + 1, int(rows[-1]) + 1, rows[np.isfinite(values[rows])])
        for rows in np.array_split(np.arange(len(values)), min(len(values), _STRETCHES))
    ]
    known = [(first, last, rows) for first, last, rows in stretches if len(rows)]
    centres = [(first + last) / 2 for first, last, _ in known]
    low, median, high = np.array(
        [np.quantile(values[rows], [0.05, 0.5, 0.95]) for _, _, rows in known]
    ).T
    above.fill_between(centres, low, high, color=_BLUE, alpha=0.25, label="nine tenths")
    above.plot(centres, median, color=_BLUE, marker="." if len(known) < 2 else "", label="median")
    above.set_ylabel("anomaly score (no unit)", fontsize="small")
    above.legend(fontsize="small")
    below.step(centres, [flags[rows].mean() for _, _, rows in known], color=_ORANGE, where="mid")
    below.axhline(fpr, color=_BLACK, linestyle="--", linewidth=0.8, label=f"promised {fpr:g}")
    below.set_ylim(0, None)
    figure.supxlabel("samples seen", fontsize="medium")
    below.set_ylabel("share flagged", fontsize="small")
    below.legend(fontsize="small")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def quantile_figure(z: Mapping[str, ArrayLike]) -> Figure:
    """A panel per layer: the quantiles of its deviations against those of a standard normal.

    Args:
        z: Deviations from the fitted mean in fitted standard deviations, by layer, each of shape
            (N,); values that are not finite are left out.

    Raises:
        ValueError: If there is no layer, or one has no finite value.
    """
    if not z:
        raise ValueError("Expected the deviations of at least one layer, got none.")
    figure, panels = _panels(len(z))
    for axes, (layer, values) in zip(panels, z.items(), strict=True):
        finite = np.sort(_finite(layer, values)[0])
        theory = ndtri((np.arange(len(finite)) + 0.5) / len(finite))
        theory, finite = _evenly(theory, finite)
        ends = [min(theory[0], finite[0]), max(theory[-1], finite[-1])]
        axes.plot(ends, ends, color=_BLACK, linewidth=0.8, label="as fitted")
        axes.plot(theory, finite, ".", color=_BLUE, markersize=3, label="held-out samples")
        _tidy(axes, layer)
    _share_legend(figure, panels)
    figure.supxlabel("quantile of a standard normal (standard deviations)", fontsize="medium")
    figure.supylabel("quantile of the layer (z, standard deviations)", fontsize="medium")
    return figure


def misfit_figure(distances: Mapping[str, float], *, limit: float) -> Figure:
    """Each layer's distance from what was fitted to it, in module order.

    Args:
        distances: Kolmogorov-Smirnov distance by layer, between 0 and 1.
        limit: Above which a layer counts as badly fitted.

    Raises:
        ValueError: If there is no layer.
    """
    if not distances:
        raise ValueError("Expected the distance of at least one layer, got none.")
    figure, axes = _one_panel("Layers against the normal fitted to them")
    values = np.array(list(distances.values()))
    at, poor = np.arange(1, len(values) + 1), values > limit
    axes.plot(at[~poor], values[~poor], "o", color=_BLUE, markersize=4, label="layer")
    axes.plot(at[poor], values[poor], "^", color=_ORANGE, markersize=6, label="badly fitted")
    axes.axhline(limit, color=_ORANGE, linestyle="--", label=f"limit {limit:.2g}")
    axes.set_ylim(0, max(0.3, 1.1 * float(values.max()), 1.2 * limit))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (number, in module order; no unit)")
    axes.set_ylabel("Kolmogorov-Smirnov distance (no unit)")
    axes.legend(fontsize="small")
    return figure


def correlation_figure(names: Sequence[str], correlation: ArrayLike) -> Figure:
    """A heat map of the correlation between layers.

    Args:
        names: Layers, L of them.
        correlation: Of shape (L, L), between -1 and 1.

    Raises:
        ValueError: If the shape is another.
    """
    matrix = np.asarray(correlation, dtype=np.float64)
    if not names or matrix.shape != (len(names), len(names)):
        raise ValueError(f"Expected ({len(names)}, {len(names)}) correlations, got {matrix.shape}.")
    figure, axes = _one_panel("Correlation between layers")
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="correlation (no unit)")
    if len(names) <= _NAMED:
        ticks = range(len(names))
        axes.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize="x-small")
        axes.set_yticks(
            ticks,
            [f"{_short(name, length=24)} {i}" for i, name in enumerate(names, 1)],
            fontsize="x-small",
        )
    else:
        axes.set_ylabel("layer (number, in module order; no unit)")
    axes.set_xlabel("layer (number, in module order; no unit)")
    return figure


def top_layer_figure(counts: Mapping[str, int]) -> Figure:
    """How many flagged samples are furthest from what is usual in each layer, the most on top.

    Args:
        counts: Flagged samples by the layer that deviates most.

    Raises:
        ValueError: If there is none.
    """
    if not counts:
        raise ValueError("Expected the top layer of at least one flagged sample, got none.")
    figure, axes = _one_panel("Layers that deviate most in flagged samples")
    names, values = zip(*sorted(counts.items(), key=lambda item: item[1]), strict=True)
    bars = axes.barh(range(len(values)), values, color=_ORANGE, height=0.6)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize="small")
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("flagged samples")
    axes.margins(x=0.15)
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of the given size, in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _one_panel(title: str) -> tuple[Figure, Axes]:
    figure = _figure(6.0, 4.0)
    axes = figure.add_subplot()
    axes.set_title(_literal(title), fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _wide_edges(groups: Sequence[NDArray[np.float64]], axes: Axes) -> NDArray[np.float64] | None:
    """Edges of common bins where scores span orders of magnitude, on an axis set for them."""
    low, centre, high = np.quantile(groups[0], [0.16, 0.5, 0.84])
    every = np.concatenate(groups)
    width = float(max(high - low, abs(centre)))
    if width == 0 or np.abs(every).max() <= _WIDE * width:
        return None
    axes.set_xscale("asinh", linear_width=width)
    ends = np.arcsinh([every.min() / width, every.max() / width])
    edges: NDArray[np.float64] = width * np.sinh(np.linspace(ends[0], ends[1], _BINS + 1))
    edges[[0, -1]] = every.min(), every.max()  # which rounding must not leave out
    return edges


def _histogram(
    axes: Axes,
    values: NDArray[np.float64],
    colour: str,
    label: str,
    *,
    log: bool = False,
    edges: NDArray[np.float64] | None = None,
) -> None:
    """Densities, or shares of the values between edges."""
    bins = max(10, min(_BINS, math.isqrt(len(values))))
    axes.hist(
        values,
        bins if edges is None else edges.tolist(),
        density=edges is None,
        weights=None if edges is None else np.full(len(values), 1 / len(values)),
        log=log,
        histtype="stepfilled",
        facecolor=(colour, 0.3),
        edgecolor=colour,
        label=_literal(label),
    )


def _layer_panel(
    axes: Axes, layer: str, groups: Mapping[str, ArrayLike], fit: tuple[float, float]
) -> None:
    mean, deviation = fit
    if not deviation > 0:
        raise ValueError(f"Expected a positive standard deviation of {layer!r}, got {deviation}.")
    for index, (name, values) in enumerate(groups.items()):
        finite, _ = _finite(f"{layer} of {name}", values)
        _histogram(axes, finite, _COLOURS[index % len(_COLOURS)], name)
    at = np.linspace(mean - 4 * deviation, mean + 4 * deviation, 200)
    height = np.exp(-0.5 * ((at - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    axes.plot(at, height, color=_BLACK, linewidth=1.2, label="fitted normal")
    _tidy(axes, layer)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """So many panels, in rows."""
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = _figure(max(6.0, 3.0 * columns), max(4.0, 2.2 * rows + 0.8))
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _evenly(
    theory: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of many points some, evenly along the line, with all of the outermost: it looks the same."""
    if len(theory) <= _POINTS:
        return theory, values
    kept = np.unique(np.searchsorted(theory, np.linspace(theory[0], theory[-1], _POINTS)))
    return theory[kept], values[kept]


def _tidy(axes: Axes, layer: str) -> None:
    axes.set_title(_short(layer), fontsize="small")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _of_layer(other: Mapping[str, Mapping[str, ArrayLike]], layer: str) -> dict[str, ArrayLike]:
    return {name: values[layer] for name, values in other.items() if layer in values}


def _share_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend above all panels instead of the same one in each."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
        fontsize="small",
    )


def _finite(name: str, values: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """The finite values, of shape (n,), and how many others there were."""
    array = np.asarray(values, dtype=np.float64).ravel()
    finite = array[np.isfinite(array)]
    if not len(finite):
        raise ValueError(f"Expected at least one finite value of {name!r}, got none.")
    return finite, len(array) - len(finite)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _short(name: str, *, length: int = 33) -> str:
    """`name` cut in the middle: a layer is known by where it is and by what it ends in."""
    if len(name) <= length:
        return _literal(name)
    half = (length - 1) // 2
    return _literal(f"{name[:half]}…{name[-half:]}")


def _apart(names: Sequence[str], *, length: int = 40) -> list[str]:
    """Names cut from the left, where they are alike, and never so far that two become one."""
    longest = max(map(len, names))
    for kept in range(min(length, longest), longest + 1):
        cut = [name if len(name) <= kept else f"…{name[len(name) - kept + 1 :]}" for name in names]
        if len(set(cut)) == len(set(names)):
            break
    return [_literal(name) for name in cut]


def _literal(text: str) -> str:
    """Keep matplotlib from what it cannot draw, and from formulas between two dollar signs."""
    return terminal(text).replace("$", r"\$")
