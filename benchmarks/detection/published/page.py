"""The page of published models; nothing is measured here."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.detection.known_data import LOW, gains
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc, table

Row = dict[str, Any]

#: In the order of a table, what is not there left out.
GROUPS = {
    "other species": ("mouse heavy", "human heavy", "neither species", "macaque V gene"),
    "other chains": ("human kappa", "human lambda", "mouse kappa", "mouse lambda"),
    "other proteins": ("T-cell receptors", "other proteins"),
    "human or mouse, of another kind": (
        *("therapeutic", "neutralising HIV", "human V gene", "mouse V gene", "loop of another"),
    ),
    "mutations": ("1 mutation", "3 mutations", "10 mutations"),
    "in disorder": ("blocks swapped", "shuffled", "reversed"),
    "cut": ("first 20 cut", "last 15 cut", "reads without a beginning"),
}
GENERATED = "generated at"


def antibodies(report: Row, measured: str) -> list[str]:
    """What stands first is what a user asks: whether the default holds on a model of theirs."""
    rows = report["rows"]
    blocks = [introduction(rows), "## Antibody language models", f"By {measured}", ABOUT]
    blocks += ["Mean AUROC over all sets, with near copies of what fits and without:", means(rows)]
    for model, known in cases(rows):
        title = f"### {model}, {known} heavy chains known"
        blocks += [title, sizes(of(rows, model, known)), by_group(of(rows, model, known))]
    blocks += ["### Known data, small change", small_change(rows)]
    return [*blocks, *pages.judged("### Claims of antibodies", report["claims"])]


ABOUT = pages.paragraph(
    "The two GPTs of iglm 0.1.0 (IgLM-S of 1.4, IgLM of 12.9 million weights), told that all they "
    "see are heavy chains of the known species, and the BERT of antiberty 0.1.3 (26 million), "
    "whose one pass sees each residue that it predicts: that is no likelihood, and what stands as "
    "its - log p is none. Known are chains that the source distribution of antpack holds; three "
    "splits by clone, three fifths to fit, a fifth to calibrate and a fifth to test. Species is "
    "told by the nearest V gene; macaque and unmutated V genes are abstar's, grafted on the third "
    "loop and the end of test sequences. A near copy holds four of five of its 3-mers in one "
    "sequence that fits. Gradient norms were taken of the smallest model alone, since they cost "
    "most. Neither weights nor sequences are kept here: iglm is for non-commercial "
    "use (JHU Academic Software License), antiberty and abstar have the MIT licence, antpack GPL "
    "3, biopython its own."
)


def cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["known"]) for row in rows))


def of(rows: Sequence[Row], model: str, known: str) -> list[Row]:
    """With near copies."""
    return [r for r in rows if (r["model"], r["known"]) == (model, known) and r["near copies"]]


def introduction(rows: Sequence[Row]) -> str:
    """For what kinds of models the default was measured, and where something else is better."""
    ours = [row for row in rows if row["method"] == "forward" and row["near copies"]]
    figures = ", ".join(f"{auroc(r['mean'])} ({r['model']}, {r['known']})" for r in ours)
    lost = sorted(
        ((better(rows, row, name), row, name) for row in ours for name in row["auroc"]),
        key=lambda found: found[0][0] - found[1]["auroc"][found[2]],
        reverse=True,
    )
    worst = "; ".join(
        f"{name}, {row['model']} of {row['known']}: {auroc(row['auroc'][name])} against "
        f"{auroc(value)} by {method}"
        for (value, method), row, name in lost[:3]
    )
    return "\n\n".join(
        [
            pages.paragraph(
                "`forward`, the default, was chosen on small models that were trained here: flows, "
                "VAEs, PixelCNNs and denoisers of images, flows of tables; and of sequences on two "
                "of the models below, IgLM-S and IgLM, with other sets. This page shows it to "
                f"models that others trained and published. Mean AUROC: {figures}."
            ),
            pages.paragraph(
                "**Where it is not the best choice.** Where a model knows its data well and the "
                "change is small, low likelihood alone finds more; and what has no PyTorch layers "
                f"has low likelihood alone. The largest losses of all sets: {worst}."
            ),
        ]
    )


def better(rows: Sequence[Row], ours: Row, name: str) -> tuple[float, str]:
    """The best of the other methods on a set."""
    others = [r for r in of(rows, ours["model"], ours["known"]) if r["method"] != "forward"]
    return max((row["auroc"][name], row["method"]) for row in others)


def means(rows: Sequence[Row]) -> str:
    header, lines = ["method"], []
    for model, known in cases(rows):
        header += [f"{model}, {known}", "without copies"]
    found = {(r["method"], r["model"], r["known"], r["near copies"]): r for r in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        cells: list[str | None] = [method]
        for case in cases(rows):
            for near in (True, False):
                row = found.get((method, *case, near))
                cells.append(None if row is None else auroc(row["mean"]))
        lines.append(cells)
    return table(header, lines)


def sizes(rows: Sequence[Row]) -> str:
    """How many sequences, how the splits differ, and what a score costs."""
    ours = rows[0]
    splits = ", ".join(map(auroc, ours["by split"]))
    least, most = min(ours["counts"].values()), max(ours["counts"].values())
    costs = ", ".join(f"{r['method']} {r['forwards']:g}" for r in rows if r["forwards"])
    return pages.paragraph(
        f"{ours['counts']['known']} known sequences; {least} to {most} of a set. `forward` by "
        f"split: {splits}. Plain forward passes a score, 8 at once: {costs}."
    )


def by_group(rows: Sequence[Row]) -> str:
    """A line for each method: means of groups of sets, and what its own p-values find."""
    names = list(rows[0]["auroc"])
    groups = {k: [n for n in names if n in v] for k, v in GROUPS.items()}
    groups = {k: v for k, v in groups.items() if v}
    own = [name for name in names if name.startswith(GENERATED)]
    mutations = groups.pop("mutations", [])
    header = ["method", *groups, *mutations, *own, "all", "found at .05", "flagged at .05"]
    lines = []
    for row in rows:
        each = row["auroc"]
        cells = [auroc(statistics.mean(each[n] for n in sets)) for sets in groups.values()]
        cells += [auroc(each[name]) for name in (*mutations, *own)]
        shares = [pages.percent(row[f"{word} at 0.05"]) for word in ("found", "flagged")]
        lines.append([row["method"], *cells, auroc(row["mean"]), *shares])
    return table(header, lines)


#: Where what is known was changed a little.
SMALL = ("1 mutation", "3 mutations", "10 mutations", "blocks swapped")


def small_change(rows: Sequence[Row]) -> str:
    """What low likelihood as one more, one-sided part adds to the default, by model."""
    lines = []
    for model, known in cases(rows):
        own = {row["method"]: row for row in of(rows, model, known)}
        added = {
            name: value - own["forward"]["auroc"][name] for name, value in own[LOW]["auroc"].items()
        }
        small = [added[name] for name in SMALL if name in added]
        cells = [f"{model}, {known}", surprise(own[LOW]), auroc(statistics.mean(small))]
        lines.append([*cells, *all_and_worst(added)])
    text = pages.paragraph(
        "What low likelihood, one-sided, adds to the AUROC of `forward` as one more part: of known "
        "sequences with mutations or two blocks swapped, of all sets, and of the set that loses "
        "most. *Surprise*: of held-out known sequences, in standard deviations; near 0 a model is "
        "right about how unlikely they are. It is no default: what is generated at a low "
        "temperature and what is nearer to the germline than known sequences are is likelier than "
        "these, and pays for it. Of models of images it stands on [a page of its own](known.md)."
    )
    header = ["model", "surprise", "small changes", "all sets", "worst"]
    return f"{text}\n\n{table(header, lines)}"


def surprise(row: Row) -> str:
    return "" if row["surprise"] is None else f"{row['surprise']:z.2f}"


def all_and_worst(added: Mapping[str, float]) -> list[str]:
    """The mean, and the set that loses most."""
    worst, cost = min(added.items(), key=lambda item: item[1])
    return [auroc(statistics.mean(added.values())), f"{auroc(cost)}, {worst}"]


def known_data(report: Row, measured: str) -> list[str]:
    """Of models of images what low likelihood adds, beside what held-out data say."""
    rows, lines, means = report["rows"], [], []
    for (on, model), added in gains(rows).items():
        [ours] = [r for r in rows if (r["on"], r["model"], r["method"]) == (on, model, LOW)]
        lines.append([f"{model} of {on}", surprise(ours), *all_and_worst(added)])
        means.append(statistics.mean(added.values()))
    gaining = sum(value > 0 for value in means)
    return [
        "## Low likelihood as one more part",
        f"By {measured}",
        pages.paragraph(
            "Where a model knows its data and one small thing is changed, one-sided - log p finds "
            "what two-sided densities do not ([antibodies](published.md)). Here it is one more "
            "part of `forward`, on the likelihood models of the evidence: what it adds to the mean "
            f"AUROC, and to the set that loses most. It adds to the mean of {gaining} of "
            f"{len(means)} models. A rule that takes it in would need a figure of held-out data "
            "that tells gain from loss. *Surprise* is the one that a model has: the mean of log p "
            "less what it expected, in standard deviations, 0 where the model is right about its "
            "data. It does not tell: small changes of antibodies gain at any, models of images "
            "lose at any, and both have it near -0.5. So the library has no such rule. Whoever "
            "looks for small changes gives these three parts: values, expected norms and "
            "log-likelihood ([how](../choosing.md))."
        ),
        table(["model", "surprise", "all sets", "worst"], lines),
        *pages.judged("### Claims of low likelihood", report["claims"]),
    ]


def galaxies(report: Row, measured: str) -> list[str]:
    rows = report["rows"]
    names = list(rows[0]["auroc"])
    lines = [
        (
            row["method"],
            *(auroc(row["auroc"][name]) for name in names),
            auroc(row["mean"]),
            pages.percent(row["flagged at 0.05"]),
        )
        for row in rows
    ]
    return [
        "## Galaxies, by a flow in JAX",
        f"By {measured}",
        pages.paragraph(
            "The spline flow of pzflow 4.0.0 (MIT licence): redshift and six magnitudes of "
            "simulated galaxies, on which its authors trained it. An adapter passes on the values "
            "that JAX computes; there are no layers of PyTorch, so that low likelihood is all. "
            "The galaxies that fit, calibrate and test were trained on as well: the package has no "
            "others."
        ),
        table(["method", *names, "all", "flagged at .05"], lines),
        *pages.judged("### Claims of galaxies", report["claims"]),
    ]
