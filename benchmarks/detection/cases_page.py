"""What models of `benchmarks.detection.cases` were shown, as parts of a page of the evidence."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.detection import rates
from benchmarks.detection.answers import between
from benchmarks.detection.domains import DIGITS
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc

Row = dict[str, Any]

#: AUROCs up to which nothing is told apart, and hardly anything.
UNSEEN, HARDLY = 0.55, 0.65


def reserved(report: Row, measured: str) -> list[str]:
    """The part of the page on classes that no choice may look at."""
    return part(
        report,
        "Reserved classes",
        measured,
        "Small models of some classes of a set are shown its other classes, which are reserved: "
        "`RESERVED` in `benchmarks/detection/datasets.py`. Methods have their defaults, which were "
        "fixed, and the claims below written, before any of these models was trained. There is one "
        "run, and all that was measured is told. The classes are near: letters of the same "
        f"writers, signs of the same cameras. {near(report['rows'])} "
        f"{rates.legend(report['rows'])}",
    )


def near(rows: Sequence[Row]) -> str:
    """What the default makes of the reserved classes."""
    ours = [row for row in rows if row["method"] == "forward"]
    told = statistics.mean(value for row in ours for value in row["auroc"].values())
    found = statistics.mean(value for row in ours for value in row["found"].values())
    hardly = " Models this small hardly know which classes they were shown, and no method does."
    return (
        f"`forward` tells them by {auroc(told)} on average and finds {pages.percent(found)} of "
        f"them at fpr .01.{hardly if told < HARDLY else ''}"
    )


def domains(report: Row, measured: str) -> list[str]:
    """The part of the page on the same classes of another source."""
    return part(
        report,
        "Digits of others",
        measured,
        "A natural shift of domain: models of MNIST are shown the digits that scikit-learn ships, "
        "which others wrote and others scanned. MNIST is brought to their form, ink by block of a "
        "bitmap (8x8). Letters and clothes in that form stand beside them. The third model is "
        f"zuko's neural spline flow. {verdict(report['rows'])}",
    )


def verdict(rows: Sequence[Row]) -> str:
    """Of the default and the digits of others: below .5 they look more normal than known ones."""
    found = [row["auroc"][DIGITS] for row in rows if row["method"] == "forward"]
    told = f"`forward` tells the digits of others by {between(found)}"
    blind = ": they look as normal as MNIST's own, or more so, and the shift goes unseen"
    return f"{told}{blind if max(found) < UNSEEN else ''}."


def audio(report: Row, measured: str) -> list[str]:
    """The part of the page on recordings."""
    return part(
        report,
        "Spoken digits",
        measured,
        "Models of spectrograms of five speakers are shown a sixth, and recordings of the five "
        "that were changed: played backwards, faster, with noise, and without low frequencies. "
        "The recordings are those of the Free Spoken Digit Dataset (CC BY-SA 4.0), which is not "
        "part of this project.",
    )


def part(report: Row, title: str, measured: str, words: str) -> list[str]:
    """A table for each set that models were trained on."""
    rows = report["rows"]
    blocks = [f"## {title}", f"By {measured}", pages.paragraph(words), trainings(rows)]
    for on in dict.fromkeys(row["on"] for row in rows):
        blocks += [f"### Models of {on}", by_method([row for row in rows if row["on"] == on])]
    return [*blocks, *pages.judged(f"### Claims: {title.lower()}", report["claims"])]


def trainings(rows: Sequence[Row]) -> str:
    """How long the models were trained, and their loss on images that they were not trained on."""
    seen = {(row["on"], row["model"]): row["training"] for row in rows}
    names = ("steps", "seconds", "held_out_loss")
    lines = [(on, model, *(its.get(k) for k in names)) for (on, model), its in seen.items()]
    return pages.table(["trained on", "model", "steps", "seconds", "held-out loss (nats)"], lines)


def by_method(rows: Sequence[Row]) -> str:
    """AUROC by set, the mean of models; all, the worst, and what an operator sees."""
    sets = list(rows[0]["auroc"])
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        by_model = [row["mean"] for name in models for row in chosen if row["model"] == name]
        by_set = [statistics.mean(row["auroc"][name] for row in chosen) for name in sets]
        worst = min(value for row in chosen for value in row["auroc"].values())
        flagged = pages.percent(statistics.mean(row["flagged"] for row in chosen))
        means = [*by_model, *(by_set if len(sets) > 1 else ()), statistics.mean(by_model), worst]
        lines.append([method, *map(auroc, means), *rates.cells(chosen), flagged])
    heads = [*models, *(sets if len(sets) > 1 else ()), "all", "worst"]
    return pages.filled(["method", *heads, *rates.HEADER, "flagged"], lines)
