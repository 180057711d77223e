"""How log norms lie by layer, in and out of distribution: what the paper shows and assumes of them.

Norms are those of a whole likelihood; `test` is judged by Gaussians that are fitted to `fit`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kstest, norm

from benchmarks.detection.methods import live_log_norms
from benchmarks.detection.protocol import Array, others_of
from ood_monitor.densities.measurements import Measurements

Row = dict[str, Any]


def four(count: int) -> list[int]:
    """Random layers, as the paper draws them."""
    return sorted(np.random.default_rng(0).choice(count, 4, replace=False).tolist())


def rows(found: Mapping[str, Measurements], group: int) -> Iterator[Row]:
    """Of four layers how their log norms lie, then figures of all."""
    names, logs = live_log_norms(found)
    normal = fits(logs["fit"], logs["test"])
    for i in four(len(names)):
        moments = {of: mean_and_sd(each[:, i]) for of, each in logs.items()}
        row = {"shown": "layer", "group": group, "layer": short(names[i])}
        yield row | {"mean_and_sd": moments, "ks": round(float(normal[i]), 3)}
    yield {"shown": "layers", "group": group, "layers": len(names)} | {
        "ks_median": round(float(np.median(normal)), 3),
        "ks_largest": round(float(normal.max()), 3),
        "ks_median_if_normal": round(float(np.median(fits(*gaussian_like(logs)))), 3),
        "mean_correlation": round(correlation(logs["test"]), 3),
        "larger": larger(logs),
    }


def fits(fit: Array, test: Array) -> Array:
    """Kolmogorov-Smirnov statistics of log norms (N, L) against Gaussians of others, (L,)."""
    gaussians = zip(fit.mean(0), fit.std(0, ddof=1), strict=True)
    pairs = zip(test.T, gaussians, strict=True)
    return np.array([kstest(each, norm(mean, sd).cdf).statistic for each, (mean, sd) in pairs])


def gaussian_like(logs: Mapping[str, Array]) -> tuple[Array, Array]:
    """As many numbers that are Gaussian, for what chance makes of the statistic."""
    draw = np.random.default_rng(0).normal
    return draw(size=logs["fit"].shape), draw(size=logs["test"].shape)


def correlation(logs: Array) -> float:
    """Mean absolute correlation between two layers, of log norms (N, L)."""
    matrix = np.abs(np.corrcoef(logs.T))
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def larger(logs: Mapping[str, Array]) -> dict[str, float]:
    """By foreign set the share of layers whose log norm is larger there on average."""
    own = logs["test"].mean(0)
    return {
        name: round(float((each.mean(0) > own).mean()), 4)
        for name, each in logs.items()
        if name in others_of(logs)
    }


def mean_and_sd(values: Array) -> list[float]:
    return [round(float(values.mean()), 3), round(float(values.std(ddof=1)), 3)]


def short(layer: str) -> str:
    """Without the term, which is the whole likelihood."""
    return layer.split("/", 1)[1]


def figure(found: Mapping[str, Measurements]) -> Figure:
    """Log norms of the four layers by set, each with the Gaussian of its mean and deviation."""
    names, logs = live_log_norms(found)
    others = {name: logs[name] for name in others_of(logs)}
    shown = {"in distribution": logs["test"]} | others
    whole = Figure(figsize=(9, 6), layout="constrained")
    panels: list[Axes] = list(whole.subplots(2, 2).flat)
    for axes, i in zip(panels, four(len(names)), strict=True):
        for place, (label, each) in enumerate(shown.items()):
            drawn(axes, each[:, i], label, f"C{place}")
        axes.set_xlabel(f"log f of {short(names[i])}", fontsize=7)
    panels[0].legend(fontsize=7)
    return whole


def drawn(axes: Axes, values: Array, label: str, color: str) -> None:
    axes.hist(values, bins=40, density=True, alpha=0.4, label=label, color=color)
    x = np.linspace(values.min(), values.max(), 200)
    axes.plot(x, norm(values.mean(), values.std(ddof=1)).pdf(x), color=color, linewidth=1)
