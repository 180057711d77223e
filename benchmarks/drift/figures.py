"""What `benchmarks.drift.e_detector` found, as a table and as a figure."""

import math
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row: TypeAlias = dict[str, Any]

#: Where the figure puts a delay that is longer than the streams.
MISSED = 2000


def figure(rows: list[Row]) -> Figure:
    """Median delay against mean run length, a panel for each change."""
    drawing = Figure(figsize=(11, 6.8), layout="constrained")
    panels = list(drawing.subplots(2, 3, sharex=True, sharey=True).flat)
    for axes, name in zip(panels, rows[0]["changes"], strict=False):
        axes.set(title=name, xscale="log", yscale="log", ylim=(8, 3 * MISSED), xlim=(50, 2e5))
        lengths = np.array([50.0, 2e5])
        axes.plot(lengths, math.log(2) * lengths, ":", color="grey", label="chance")
        for index, row in enumerate(rows):
            point(axes, row, name, index)
    for axes in panels[::3]:
        axes.set_ylabel("median delay (samples)")
    for axes in panels[3:]:
        axes.set_xlabel("mean run length in control (samples)")
    handles = panels[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    return drawing


def point(axes: Axes, row: Row, name: str, index: int) -> None:
    """One method; an arrow up if it misses most changes, and to the right if its runs are cut."""
    median, length = row["changes"][name]["median delay"], row["in control"]
    x, y = length["mean run length, at least"], MISSED if median is None else median
    marker = "*" if row["method"].startswith("ours") else "o"
    style: dict[str, Any] = {"color": f"C{index}", "markersize": 11 if marker == "*" else 7}
    axes.plot([x], [y], marker, label=row["method"], **style)
    arrow = {"arrowstyle": "->", "color": f"C{index}"}
    if median is None:
        axes.annotate("", (x, 1.8 * y), (x, y), arrowprops=arrow)
    if length["cut off"] > 0.1:
        axes.annotate("", (2.2 * x, y), (x, y), arrowprops=arrow)


def table(promised: list[Row], rows: list[Row]) -> str:
    lines = ["scores   calibration  promised  mean run length >=    within 10 000  cut off  runs"]
    for row in promised:
        mean = f"{row['mean run length, at least']:9.0f} ± {row['standard error']:5.0f}"
        lines.append(
            f"{row['scores']:8s} {row['calibration']:11d}  {row['promised']:8d}  {mean:20s}  "
            f"{row['alarm within 10000']:12.3f}  {row['cut off']:7.4f}  {row['runs']:4d}"
        )
    lines.append("\nmedian delay (undetected); mean run length; alarm within 10 000; us an update")
    for row in rows:
        cells = [
            f"{'missed' if found['median delay'] is None else found['median delay']}"
            f" ({found['undetected']:.0%})"
            for found in row["changes"].values()
        ]
        length = row["in control"]
        run = f"{length['mean run length, at least']:.0f} ± {length['standard error']:.0f}"
        within, cost = length["alarm within 10000"], row["microseconds"]
        lines.append(f"{row['method']}: {', '.join(cells)}; {run}; {within:.2f}; {cost}")
    return "\n".join(lines)
