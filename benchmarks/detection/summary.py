"""The first screen of the evidence: what each method detects, and what it costs."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from benchmarks.detection import rates
from benchmarks.detection.answers import EQUAL, counts
from benchmarks.detection.datasets import NEAR_CIFAR
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc

Row = dict[str, Any]

MODELS = ("Glow", "VAE", "PixelCNN", "UNet")
#: Counted pair by pair.
DEFAULT = "`forward`, the default"
COUNTED = ("`gradient_norms`", "paper")
#: In the figure: the lowest AUROC, where no pass stands on its scale, and marks.
LOWEST, NONE, MARKERS = 0.5, 0.5, "os^Dv*PX<>hp"
#: At which a cost is told.
BATCH = "B = 64"


@dataclass(frozen=True)
class Line:
    """A method, and where its rows are.

    Attributes:
        title: As the page calls it.
        names: Of its rows, by the report that has them.
        cost: Of the rows of `evidence` that tell its cost, where these do not.
    """

    title: str
    names: Mapping[str, str]
    cost: str | None = None


#: One name for what each report measured.
LINES = (
    Line(DEFAULT, {"forward": "forward", "denoisers": "without noise"}),
    Line("`both`", {"forward": "both"}),
    Line("`gradient_norms`", {"forward": "gradient_norms", "denoisers": "gradient_norms"}),
    Line("gradient norms by term, the default until 2026-11-26", {"evidence": "default"}),
    Line("paper", {"forward": "paper", "denoisers": "paper"}, "paper"),
    Line("total gradient norm", {"evidence": "total norm"}),
    Line("typicality", {"evidence": "typicality"}),
    Line("- log-likelihood", {"evidence": "log-likelihood"}),
    Line("likelihood less complexity", {"evidence": "likelihood + complexity"}),
    Line("MSMA, 10 levels", {"denoisers": "MSMA, 10 levels"}, "MSMA"),
    Line("SCOPED", {"denoisers": "SCOPED"}),
    Line("size of a PNG file, no model", {"evidence": "PNG size"}),
)

INTRODUCTION = """\
# Evidence

One question: which images did a model never learn? Four small models, each trained on
Fashion-MNIST and on MNIST, are shown images of five other sets (the UNet of six). All methods see
the same models, images and split. `make evidence` measures all of it from the weights in
`benchmarks/weights`, for hours, and writes these pages;
`python -m benchmarks.detection.evidence_page` writes them again from `benchmarks/results`. Small
models say how methods compare, not how well large ones detect.

![Mean AUROC against forward passes, a panel for each model](evidence.png)

Mean AUROC over the pairs of each model. *Worst*: of all pairs. {operator} *Flagged*: the share of
normal images with p <= .01, which is promised to be 1 %. *Cost*: in forward passes of the network,
of the dearest model, 64 images at once (of methods of `evidence`: 50). In the figure what is below
.5 stands at its edge."""

READING = """\
What to read from it:

- One forward pass, with what the model itself expected beside what came, detects more than
  gradient norms, at a third of their cost.
- Gradient norms are the paper's method, and name the layers that are not as usual.
{colours}
- **These sets are a development set.** Rules of `forward` were chosen on models of Fashion-MNIST
  against these very sets.
{unseen}

Further pages:

- [The paper, statement by statement](paper.md)
- [Images, every pair](evidence/images.md)
- [Denoisers](evidence/denoisers.md)
- [Sets by which nothing was chosen](evidence/unseen.md)
- [Rows of tables](evidence/tables.md)
- [Text](evidence/text.md)
- [Models of CIFAR-10](evidence/cifar10.md)
- [Published models: antibodies, galaxies](evidence/published.md)
- [Known data, small change](evidence/known.md)
- [Layers, samples, training, the law of the norms](evidence/layers.md)
- [Corruptions and attacks](evidence/shifts.md)
- [Drift in streams of real images](evidence/streams.md)
- [Wrong guesses](evidence/guesses.md)
- [Densities, noise levels, a pipeline, synthetic drift](evidence/other.md)

```{toctree}
:hidden:

evidence/images
evidence/denoisers
evidence/unseen
evidence/tables
evidence/text
evidence/cifar10
evidence/published
evidence/known
evidence/layers
evidence/shifts
evidence/streams
evidence/guesses
evidence/other
```"""


@dataclass
class Found:
    """What was measured of a method.

    Attributes:
        by_model: AUROC of each pair, by model.
        found: Shares of foreign images with p <= 0.01.
        flagged: Shares of normal images.
        rows: All of them.
        costs: In forward passes, by model.
    """

    by_model: dict[str, list[float]] = field(default_factory=dict)
    found: list[float] = field(default_factory=list)
    flagged: list[float] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """One model of one set."""
        model = row["model"]
        self.by_model.setdefault(model, []).extend(row["auroc"].values())
        self.found += row.get("found", {}).values()
        self.rows.append(row)
        if row.get("flagged") is not None:
            self.flagged.append(row["flagged"])
        self.cost(row)

    def cost(self, row: Row) -> None:
        """What it costs on a model."""
        cost, model = row.get("forwards"), row["model"]
        if cost is not None:
            one = cost[BATCH] if isinstance(cost, Mapping) else cost
            self.costs[model] = max(one, self.costs.get(model, 0.0))


def found_of(reports: Mapping[str, Row]) -> dict[str, Found]:
    """By title of a line."""
    found = {}
    for line in LINES:
        found[line.title] = its = Found()
        for name, method in line.names.items():
            for row in rows_of(reports, name, method):
                its.add(row)
        if line.cost is not None:
            for row in rows_of(reports, "evidence", line.cost):
                its.cost(row)
    return found


def rows_of(reports: Mapping[str, Row], name: str, method: str) -> list[Row]:
    """Of single images and of the models that stand here."""
    return [
        row
        for row in reports.get(name, {"rows": []})["rows"]
        if row.get("method") == method
        and "auroc" in row
        and row["model"] in MODELS
        and row.get("group", 1) == 1
    ]


def cells(title: str, found: Found) -> list[str | None]:
    """A line of the table."""
    means = [found.by_model.get(model) for model in MODELS]
    every = [value for values in found.by_model.values() for value in values]
    whole = None not in means and bool(every)
    cost = max(found.costs.values(), default=None)
    return [
        title,
        *(None if values is None else auroc(statistics.mean(values)) for values in means),
        auroc(statistics.mean(every)) if whole else None,
        auroc(min(every)) if every else None,
        *rates.cells(found.rows),
        pages.percent(statistics.mean(found.flagged)) if found.flagged else None,
        None if cost is None else f"{cost:.1f}",
    ]


def counted(reports: Mapping[str, Row]) -> str:
    """By pairs: a mean hides who wins how often."""
    base, lines = rows_by(reports, "typicality"), []
    for title in (DEFAULT, *COUNTED):
        better, equal, worse = counts(rows_by(reports, title), base)
        lines.append(f"- {title.split(',')[0]}: {better} better, {equal} equal, {worse} worse")
    lead = f"Pair by pair against typicality (equal: within {EQUAL:g}):"
    return "\n".join([lead, "", *lines, "", missed(reports)])


def missed(reports: Mapping[str, Row]) -> str:
    """Foreign images that are not found, by the default and by what is nearest to the one before.

    Today's gradient norms are of the whole likelihood where its terms come of one pass, which
    detects a little more than the default until 2026-11-26 did.
    """
    found = found_of(reports)
    shares = [
        1 - statistics.mean(found[title].found or [math.nan])
        for title in ("`gradient_norms`", DEFAULT)
    ]
    return pages.paragraph(
        f"At fpr .01 `gradient_norms` miss {pages.percent(shares[0])} of foreign images, `forward` "
        f"{pages.percent(shares[1])}: {pages.percent(1 - shares[1] / shares[0])} fewer."
    )


def rows_by(reports: Mapping[str, Row], title: str) -> list[Row]:
    """Those of a line, of the sets that typicality was measured on too."""
    [line] = [line for line in LINES if line.title == title]
    return [
        row | {"auroc": {k: v for k, v in row["auroc"].items() if k not in NEAR_CIFAR}}
        for report, method in line.names.items()
        for row in rows_of(reports, report, method)
    ]


def colours(reports: Mapping[str, Row]) -> str:
    """Of the Glow of CIFAR-10, which is the harder case."""
    rows = reports.get("colour_glow", {"rows": []})["rows"]
    found = {
        row["method"]: row["auroc"] for row in rows if row.get("group") == 1 and "found" in row
    }
    if not found:
        return "- Colour images were not measured yet ([table](evidence/cifar10.md))."
    (ours, papers) = (found[name] for name in ("forward", "paper"))
    text = (
        "Colour images are harder: a Glow of CIFAR-10 that a core trained in an hour tells street "
        f"characters by {auroc(ours['Chars74K'])} with `forward`, {auroc(papers['Chars74K'])} with "
        f"the paper's score, and CIFAR-100 by {auroc(ours['CIFAR-100'])} and "
        f"{auroc(papers['CIFAR-100'])} ([table](evidence/cifar10.md))."
    )
    return fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


def unseen(reports: Mapping[str, Row]) -> str:
    """Of sets by which nothing was chosen: classes that models of other classes never saw."""
    rows = reports.get("reserved", {"rows": []})["rows"]
    if not rows:
        return "- [Sets by which nothing was chosen](evidence/unseen.md) were not measured yet."
    ours, papers = (
        statistics.mean(v for row in rows if row["method"] == name for v in row["auroc"].values())
        for name in ("forward", "paper")
    )
    text = (
        "On [sets by which nothing was chosen](evidence/unseen.md) small models of some classes "
        f"tell the others of the same set by {auroc(ours)} with `forward`, {auroc(papers)} with "
        "the paper's score: near classes are not what this finds."
    )
    return fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


def rendered(reports: Mapping[str, Row]) -> str:
    """The page of these reports, by name."""
    header = ["method", *MODELS, "all", "worst", *rates.HEADER, "flagged", "cost"]
    by_title = found_of(reports)
    lines = [cells(title, found) for title, found in by_title.items()]
    every = [row for found in by_title.values() for row in found.rows]
    dated = ", ".join(
        f"{name} on {pages.described(reports[name]['machine'])}"
        for name in ("forward", "denoisers", "evidence")
        if name in reports
    )
    measured = pages.paragraph(f"Measured: {dated}.")
    *lead, legend = INTRODUCTION.split("\n\n")
    blocks = [
        *lead,
        pages.paragraph(legend.replace("{operator}", rates.legend(every))),
        pages.filled(header, lines),
        counted(reports),
        measured,
        READING.replace("{colours}", colours(reports)).replace("{unseen}", unseen(reports)),
    ]
    return "\n\n".join(blocks) + "\n"


def figure(reports: Mapping[str, Row]) -> Figure:
    """Mean AUROC against cost, a panel for each model, a point for each method."""
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    panels = drawn.subplots(1, len(MODELS), sharey=True)
    found = {title: its for title, its in found_of(reports).items() if its.costs}
    for model, axes in zip(MODELS, panels, strict=True):
        for i, (title, its) in enumerate(found.items()):
            if model in its.costs and model in its.by_model:
                mean = max(statistics.mean(its.by_model[model]), LOWEST)
                cost, style = max(its.costs[model], NONE), {"marker": MARKERS[i], "color": f"C{i}"}
                axes.plot(cost, mean, linestyle="", clip_on=False, label=title, **style)
        axes.set(title=model, xscale="log", xlabel="forward passes", ylim=(LOWEST, 1.01))
        axes.set_xticks([NONE, 1, 2, 5, 10, 20], ["0", "1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="mean AUROC")
    labels: dict[str, Any] = {}
    for axes in panels:
        labels |= {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(labels.values(), clean(labels), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def clean(titles: Iterable[str]) -> Sequence[str]:
    """Without marks of a page."""
    return [title.replace("`", "") for title in titles]
