"""What `benchmarks.detection.forward` measured, as a part of the page of evidence."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.detection import rates
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc, table

Row = dict[str, Any]

INTRODUCTION = (
    "`forward` is the default where an adapter says that samples are images, sequences or rows of "
    "a table: expected and surprise of the likelihood, an image's bits, and expected gradient "
    "norms. `gradient_norms` is the paper's kind of score, of the whole likelihood where its terms "
    "come of one pass, with this library's default density; `both` joins the two. Rules of "
    "`forward` were chosen on models of Fashion-MNIST against these very sets, and one scale was "
    "mended on those of MNIST: the figures say how it does where it was made. "
    "{legend} Costs are in plain forward passes of B images, the larger of the two models'."
)


def section(report: Row, measured: str) -> list[str]:
    """The part of the page."""
    rows = report["rows"]
    pairs = [row for row in rows if "auroc" in row]
    return [
        "## The methods",
        f"By {measured}",
        pages.paragraph(INTRODUCTION.replace("{legend}", rates.legend(pairs))),
        overall(pairs),
        pages.paragraph(
            "Every pair, `forward` with its 95 % interval, then the others; the last column is "
            "`forward` with 100 fit samples in place of 600:"
        ),
        pair_by_pair(pairs),
        "Fifteen corruptions at severity 3, models of Fashion-MNIST:",
        corruptions(rows),
        *pages.judged("### Claims of the methods", report["claims"]),
    ]


def overall(pairs: Sequence[Row]) -> str:
    models = list(dict.fromkeys(row["model"] for row in pairs))
    lines = []
    for method in dict.fromkeys(row["method"] for row in pairs):
        chosen = [row for row in pairs if row["method"] == method]
        values = [value for row in chosen for value in row["auroc"].values()]
        by_model = [mean_of([row for row in chosen if row["model"] == name]) for name in models]
        flagged = pages.percent(statistics.mean(row["flagged"] for row in chosen))
        means = [*by_model, auroc(statistics.mean(values)), auroc(min(values))]
        lines.append([method, *means, *rates.cells(chosen), flagged, costs(chosen)])
    judged = [*rates.HEADER, "flagged"]
    header = ["method", *models, "all", "worst pair", *judged, "cost, B = 8 and 64"]
    return pages.filled(header, lines)


def mean_of(rows: Sequence[Row]) -> str | None:
    """None of a model that a method was not measured on."""
    values = [value for row in rows for value in row["auroc"].values()]
    return auroc(statistics.mean(values)) if values else None


def costs(rows: Sequence[Row]) -> str | None:
    """By model, at each size of batches."""
    measured = [row for row in rows if "forwards" in row]
    if not measured:
        return None
    models = dict.fromkeys(row["model"] for row in measured)
    largest = {
        name: [
            max(row["forwards"][batch] for row in measured if row["model"] == name)
            for batch in measured[0]["forwards"]
        ]
        for name in models
    }
    return "; ".join(
        f"{name} {', '.join(f'{v:.1f}' for v in found)}" for name, found in largest.items()
    )


def pair_by_pair(pairs: Sequence[Row]) -> str:
    by_case = {(row["on"], row["model"], row["method"]): row for row in pairs}
    others = ("gradient_norms", "both", "paper", "typicality", "likelihood + complexity")
    lines = []
    for (on, model, method), row in by_case.items():
        if method != "forward":
            continue
        for name, value in row["auroc"].items():
            low, high = row["interval"][name]
            beside = [by_case.get((on, model, other)) for other in others]
            cells = [None if it is None else auroc(it["auroc"][name]) for it in beside]
            own = f"{auroc(value)} ({auroc(low)} to {auroc(high)})"
            lines.append([f"{model} of {on}", name, own, *cells, auroc(row["few"][name])])
    return table(["model", "against", "forward", *others, "few"], lines)


def corruptions(rows: Sequence[Row]) -> str:
    chosen = {(r["model"], r["method"]): r["mean"] for r in rows if "corrupted" in r}
    models = dict.fromkeys(model for model, _ in chosen)
    lines = [
        [method, *(auroc(chosen[model, method]) for model in models)]
        for method in dict.fromkeys(method for _, method in chosen)
    ]
    return table(["method", *models], lines)


def no_law(report: Row, measured: str) -> list[str]:
    """The part of the page on models whose law expects the same of every sample."""
    rows = report["rows"]
    return [
        "## Models without an expectation",
        f"By {measured}",
        pages.paragraph(
            "A decoder of one variance and flows on a fixed base expect the same of every image, "
            "so that there is no surprise to tell from it. Of Fashion-MNIST, trained here; what "
            "`forward` has are the terms' own values, bits and expected norms."
        ),
        overall(rows),
        pages.paragraph("`forward` of each set, with its 95 % interval, beside the others:"),
        pair_by_pair(rows),
        *pages.judged("### Claims of these models", report["claims"]),
    ]


def denoisers(report: Row, measured: str) -> list[str]:
    """The part of the page on denoisers without noise."""
    rows = report["rows"]
    has_unets = any(row["model"] == "UNet" for row in rows)
    of_kinds = (
        "" if has_unets else " Of the kinds alone, by `--model`: the UNets were not measured."
    )
    return [
        "## Denoisers without noise",
        f"By {measured}{of_kinds}",
        pages.paragraph(
            "The UNets of above, and five kinds of class-conditional denoisers that are trained "
            "here: on latents one of noise, of v and of a flow, and a transformer (DiT); on pixels "
            "one of a flow. `without noise` is the default of diffusion models: two levels, or "
            "three, of samples without noise; of the last layer's gradient by input channel, "
            "expected and realised (`output_layer`), and of energies of layers' inputs and of the "
            "residual's frequencies (`energies`). Peers take the same residuals. Costs are in "
            "plain forward passes at one level. The rule was chosen on other models of "
            "Fashion-MNIST, against five of the six sets; CIFAR-100 is the sixth."
        ),
        overall([row for row in rows if "auroc" in row]),
        *wrong_labels(rows),
        *of_corruptions(rows),
        *pages.judged("### Claims of denoisers", report["claims"]),
    ]


def wrong_labels(rows: Sequence[Row]) -> list[str]:
    """Known images with another label, by what tells them from those with their own."""
    chosen = {(r["model"], r["method"]): r["wrong_label"] for r in rows if "wrong_label" in r}
    if not chosen:
        return []
    models = list(dict.fromkeys(model for model, _ in chosen))
    lines = [
        [method, *(auroc(chosen[model, method]) for model in models)]
        for method in dict.fromkeys(method for _, method in chosen)
    ]
    return [
        pages.paragraph(
            "Known images with a wrong label against others with their own, AUROC. `condition` "
            "is by how much the label lowers the residual at the level of most noise, against no "
            "label: one pass more. It was chosen on the first two models."
        ),
        table(["method", *models], lines),
    ]


def of_corruptions(rows: Sequence[Row]) -> list[str]:
    if not any("corrupted" in row for row in rows):
        return []
    return ["Fifteen corruptions of severity 3, UNet of Fashion-MNIST:", corruptions(rows)]


def tables(report: Row, measured: str) -> list[str]:
    """The part of the page on rows of tables."""
    rows = report["rows"]
    shifts = list(rows[0]["auroc"])
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        by_shift = [statistics.mean(row["auroc"][shift] for row in chosen) for shift in shifts]
        every = [value for row in chosen for value in row["auroc"].values()]
        means = [*map(auroc, by_shift), auroc(statistics.mean(by_shift)), auroc(min(every))]
        lines.append([method, *means, *rates.cells(chosen)])
    return [
        "## Rows of tables",
        f"By {measured}",
        pages.paragraph(
            "zuko's MAF and NSF of three tables that scikit-learn ships; mean AUROC of the six "
            "models. `forward` of rows is low likelihood, one-sided, joined with expected norms. "
            "FPR 95 as in the tables of images, in brackets the worst; these tables are too small "
            "for p-values of .01."
        ),
        pages.filled(["method", *shifts, "all", "worst", *rates.HEADER], lines),
        *pages.judged("### Claims of tables", report["claims"]),
    ]


def colour_glow(report: Row, measured: str) -> list[str]:
    """The part of the page on a Glow of colour images that one core has trained."""
    rows = [row for row in report["rows"] if row["shown"] == "detection"]
    [likelihood] = [row for row in report["rows"] if row["shown"] == "likelihood"]
    bits, of_paper = likelihood["bits_per_dimension"], likelihood["of_the_paper"]
    names = list(rows[0]["auroc"])
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["group"]: row for row in rows if row["method"] == method}
        cells = [
            f"{auroc(found[group]['auroc'][name])} ({pages.percent(found[group]['found'][name])})"
            for group in (1, 5)
            for name in names
        ]
        lines.append([method, *cells])
    return [
        "## A Glow of CIFAR-10",
        f"By {measured}",
        pages.paragraph(
            f"Trained for an hour on half a core: {bits['test']:.2f} bits per dimension on test "
            f"images, where published weights of the paper's size have {of_paper:.2f}. Chars74K "
            "stands for SVHN, which cannot be had here. AUROC, and in brackets the share of "
            "foreign images with p <= .01."
        ),
        "![Log squared gradient norms of four layers](../colour-glow-layers.png)",
        table(["method", *(f"{name}, B = {group}" for group in (1, 5) for name in names)], lines),
        pages.paragraph(f"Means of the three sets. {rates.legend(rows)}"),
        by_groups(rows),
        *pages.judged("### Claims of this Glow", report["claims"]),
    ]


def by_groups(rows: Sequence[Row]) -> str:
    """What an operator sees of each method, by the size of groups."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            rates.cells([row for row in rows if (row["method"], row["group"]) == (method, group)])
            for group in (1, 5)
        ]
        lines.append([method, *cells[0], *cells[1]])
    header = [f"{name}, B = {group}" for group in (1, 5) for name in rates.HEADER]
    return pages.filled(["method", *header], lines)
