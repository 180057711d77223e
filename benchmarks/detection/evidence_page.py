"""Pages of what was shown, made of what `make evidence` measured; nothing is measured here."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.detection import cases_page, forward_page, guesses, rates, summary, text_page
from benchmarks.detection.methods import DEFAULT, METHODS, PAPER
from benchmarks.detection.published import page as published_page
from benchmarks.drift import streams_page
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc, table

Row = dict[str, Any]
Report = dict[str, Any]

PROTOCOL = """\
## Protocol

In code, in `benchmarks/detection/protocol.py`:

- Images that a model was trained on, that fit a method, that calibrate and that test are
  disjoint by their bytes. A method is fitted on in-distribution images alone; none was chosen,
  and no setting of one, by what it makes of other sets here. The default density was chosen
  before, on other models of Fashion-MNIST and against four of these sets
  (`benchmarks/detection/densities.py`), so that MNIST is the fairer of the two training sets.
- Sets are brought to 28x28 grey by one antialiased resampling, with a black rim of 2 pixels.
  What still tells them apart without a model, the size of a PNG file does: it has a row in
  every table.
- All draws are seeded. Intervals are 95 % bootstrap intervals over the test and the other
  images.
- Beside AUROC: the shares of test and of foreign images flagged at fpr 0.01 by the detector's own
  p-values; the share of test images above a threshold that finds 95 % of the foreign ones (FPR
  95, told where it was measured: since 29 November 2026); the median samples to a drift alarm at
  ert 10 000 when a fifth of a stream is of the other set (a stream is as long as the test set);
  and cost in forward passes of the network. Of several pairs these are means, of alarms the
  median, and in brackets the worst pair.
- "Default" is the default density of gradient norms by term, in all parts but the first two; a
  detector takes the norms of the whole likelihood where its terms come of one pass.
- Higher score, more anomalous. For a diffusion model "log-likelihood" is its bound at levels 50
  and 500, "paper" its loss at the least noise, T = 1; methods "T = 1" take that loss itself.

Data: `python -m benchmarks.detection.train` and each of these commands say which sets they miss,
where a user gets them and in which forms they are read (npz, IDX, a Hugging Face dataset on disk).
The models are trained by `python -m benchmarks.detection.train --data-dir DATA`, about an hour
and a half on one core, which goes on where it was interrupted."""


def rendered(results: Path) -> dict[str, str]:
    """The pages of the results in a folder, by name."""
    reports = read(results)
    found = {"evidence.md": summary.rendered(reports)}
    found["evidence/guesses.md"] = guesses.rendered(results)
    for page in PAGES:
        blocks = [f"# {page.title}", *([PROTOCOL] if page.with_protocol else [])]
        for name, section in page.sections.items():
            command = f"`python -m benchmarks.{page.package}.{name}`"
            if name in reports:
                machine = pages.described(reports[name]["machine"])
                blocks += section(reports[name], f"{command}, on {machine}.")
            else:
                blocks.append(f"Not measured yet: {command}.")
        found[page.file] = "\n\n".join(blocks) + "\n"
    return found


def read(results: Path) -> dict[str, Report]:
    """What was measured, by the name of its command."""
    names = [name for page in PAGES for name in page.sections]
    files = {name: results / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


# The table.


def evidence(report: Report, measured: str) -> list[str]:
    rows = report["rows"]
    blocks = [
        "## Every pair of sets",
        f"By {measured}",
        trainings(rows),
        "Mean AUROC of all pairs:",
    ]
    blocks.append(overall(rows))
    blocks += pages.judged("### Claims", report["claims"])
    return [*blocks, "### The default, pair by pair", intervals(rows), *model_by_model(rows)]


def model_by_model(rows: Sequence[Row]) -> Iterator[str]:
    """A table of all methods for each model and size of groups."""
    cases = [(row["on"], row["model"], row["group"]) for row in rows]
    for case in dict.fromkeys(cases):
        on, model, group = case
        title = "single images" if group == 1 else f"groups of {group}"
        yield f"### {model} of {on}, {title}"
        yield by_method([row for row, its in zip(rows, cases, strict=True) if its == case])


def trainings(rows: Sequence[Row]) -> str:
    seen = {(row["on"], row["model"]): row["training"] for row in rows}
    lines = [
        (on, model, facts["steps"], facts.get("seconds"), facts.get("held_out_loss"))
        for (on, model), facts in seen.items()
    ]
    header = [
        "trained on",
        "model",
        "steps",
        "seconds",
        "held-out loss (nats, UNet: squared error)",
    ]
    return table(header, lines)


def overall(rows: Sequence[Row]) -> str:
    """Of each method, by model and size of groups; only where it applies."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for method in METHODS:
        cells: list[str | None] = [method]
        for group in (1, 5):
            chosen = [r for r in rows if (r["method"], r["group"]) == (method, group)]
            means = [mean_of(r for r in chosen if r["model"] == model) for model in models]
            whole = mean_of(chosen) if None not in means else None
            cells += [value if value is None else auroc(value) for value in (*means, whole)]
        lines.append(cells)
    header = [f"{model}, B = {group}" for group in (1, 5) for model in (*models, "all")]
    return table(["method", *header], lines)


def mean_of(rows: Iterable[Row]) -> float | None:
    values = [value for row in rows for value in row["auroc"].values()]
    return statistics.mean(values) if values else None


def intervals(rows: Sequence[Row]) -> str:
    """Single images: the default's AUROC with its interval, beside typicality and the paper."""
    found = {(r["on"], r["model"], r["method"]): r for r in rows if r["group"] == 1}
    lines = []
    for (on, model, method), row in found.items():
        if method == DEFAULT:
            for name, value in row["auroc"].items():
                low, high = row["interval"][name]
                others = [
                    auroc(found[on, model, other]["auroc"][name]) for other in ("typicality", PAPER)
                ]
                ends = f"{auroc(value)} ({auroc(low)} to {auroc(high)})"
                lines.append((f"{model} of {on}", name, ends, *others))
    return table(["model", "against", DEFAULT, "typicality", PAPER], lines)


def by_method(rows: Sequence[Row]) -> str:
    names = list(rows[0]["auroc"])
    best = {name: max(auroc(row["auroc"][name]) for row in rows) for name in names}
    lines = [
        (
            row["method"],
            *(bold(auroc(row["auroc"][name]), best[name]) for name in names),
            auroc(row["mean"]),
            None if row["flagged"] is None else pages.percent(row["flagged"]),
            *rates.cells([row]),
            None if row["forwards"] is None else f"{row['forwards']:g}",
        )
        for row in rows
    ]
    return pages.filled(["method", *names, "mean", "flagged", *rates.HEADER, "forwards"], lines)


def bold(text: str, best: str) -> str:
    return f"**{text}**" if text == best else text


# The same on CIFAR-10.


def colour(report: Report, measured: str) -> list[str]:
    rows = report["rows"]
    return [
        "## Models of the papers' sizes",
        f"By {measured}",
        pages.paragraph(
            "A Glow of the paper's size (K = 32, L = 3, 512 hidden channels) and the UNet of "
            "google/ddpm-cifar10-32, on colour images at their own 32x32 pixels. GTSRB and "
            "Chars74K were JPEG files and resized, which may tell them apart by itself: see the "
            "row of PNG size. Trained for minutes, where the papers take days: how methods compare "
            "on models that have learned little. The default of these rows is gradient norms by "
            "term, as it was until 2026-11-26. `make evidence` leaves this part out, since it is "
            "for a GPU. " + report.get("note", "")
        ),
        trainings(rows),
        *model_by_model(rows),
        "### Claims of models of CIFAR-10",
        pages.claims(report["claims"]),
    ]


# The paper's figures.


def paper(report: Report, measured: str) -> list[str]:
    rows = report["rows"]
    return [
        "## What the paper shows and assumes",
        f"By {measured}",
        "![Log squared gradient norms of two layers of each model](../evidence-layers.png)",
        pages.paragraph(
            "The law of the norms: the median distance (Kolmogorov-Smirnov) of log norms from a "
            "Normal fitted to other images; the degrees of freedom that their spread asks of a "
            "chi-square, and as a share of the layer's parameters, which the paper's argument "
            "says is 1; the mean absolute correlation between layers, which it takes for weak; "
            "the share of a gradient that all images have in common, 0 for a model that has "
            "converged."
        ),
        selected(rows, "law"),
        pages.paragraph(
            "The Fisher information over samples of the model itself, of 50 random weights of "
            "each of three layers: the diagonal over the mean absolute other elements, after "
            "scaling by the diagonal (the paper: about 5), and the mean absolute correlations, "
            "beside what independent gradients would have by chance."
        ),
        selected(rows, "fisher"),
        "AUROC by a diffusion model's noise level, groups of five, mean of all pairs:",
        timesteps(rows),
        "![Mean AUROC by the noise level of a diffusion model](../evidence-timesteps.png)",
        pages.paragraph(
            "How images are stored: the flow's images scaled, shifted and turned upside down, by "
            "a map that the model knows of. Bits per dimension change, norms do not:"
        ),
        selected(rows, "representation"),
        "### Claims of this part",
        pages.claims(report["claims"]),
    ]


def selected(rows: Sequence[Row], shown: str) -> str:
    chosen = [row for row in rows if row["shown"] == shown]
    header = [name for name in chosen[0] if name != "shown"]
    lines = [[cell(row[name]) for name in header] for row in chosen]
    return table([name.replace("_", " ") for name in header], lines)


def cell(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timesteps(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row["shown"] == "timestep"]
    lines = [
        (
            timestep,
            *(
                auroc(statistics.mean(r[method] for r in chosen if r["T"] == timestep))
                for method in ("paper", "half-shrunk", "typicality")
            ),
        )
        for timestep in dict.fromkeys(row["T"] for row in chosen)
    ]
    return table(["T", "paper", "half-shrunk covariance", "typicality"], lines)


# The open questions.


def questions(report: Report, measured: str) -> list[str]:
    rows = report["rows"]
    return [
        "## Which layers, how many samples, how much training",
        f"By {measured}",
        pages.paragraph(
            "Layers against cost, the UNet of Fashion-MNIST against MNIST and EMNIST letters, "
            "default density; the mean of three draws of the noise, and each of them:"
        ),
        "![AUROC against forward passes](../evidence-layers-cost.png)",
        layers(rows),
        *pages.judged("### Claims of this part", report["claims"]),
        "Samples to fit on, mean AUROC against all sets:",
        columns(rows, "fit size", ("model", "samples")),
        pages.paragraph(
            "Undertraining, mean AUROC against all sets after so many steps, the share of the "
            "gradient that images have in common, and how many problems `om.diagnose` names:"
        ),
        columns(rows, "undertraining", ("model", "steps", "shared_gradient", "problems")),
    ]


def layers(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["layers"],
            row["levels"],
            f"{row['forwards']:g}",
            auroc(row["mean"]),
            ", ".join(map(auroc, row["near"])),
        )
        for row in rows
        if row["question"] == "layers"
    ]
    return table(["layers", "levels", "forwards", "mean AUROC", "by draw of the noise"], lines)


def columns(rows: Sequence[Row], question: str, plain: Sequence[str]) -> str:
    chosen = [row for row in rows if row["question"] == question]
    names = [name for name in chosen[0] if name not in ("question", *plain)]
    lines = [[*(cell(row[n]) for n in plain), *(auroc(row[n]) for n in names)] for row in chosen]
    return table([name.replace("_", " ") for name in (*plain, *names)], lines)


def shifts(report: Report, measured: str) -> list[str]:
    rows = report["rows"]
    return [
        "## Near shifts",
        f"By {measured}",
        "Mean AUROC over fifteen corruptions, by severity, of the models of Fashion-MNIST:",
        severities(rows),
        "At severity 3, by corruption, the mean of the models:",
        by_corruption(rows, 3),
        pages.paragraph(
            "Attacks: images in distribution moved to be less likely, MNIST moved to be more "
            "likely, by so much of the range of values at most; AUROC against images in "
            "distribution."
        ),
        attacks(rows),
        "### Claims of this part",
        pages.claims(report["claims"]),
    ]


def severities(rows: Sequence[Row]) -> str:
    found = {(r["model"], r["method"], r["severity"]): r["mean"] for r in rows if "severity" in r}
    steps = sorted({severity for _, _, severity in found})
    pairs = dict.fromkeys((model, method) for model, method, _ in found)
    return table(
        ["model", "method", *map(str, steps)],
        [(*pair, *(auroc(found[*pair, step]) for step in steps)) for pair in pairs],
    )


def by_corruption(rows: Sequence[Row], severity: int) -> str:
    methods = ("PNG size", "log-likelihood", "typicality", PAPER, DEFAULT)
    chosen = [row for row in rows if row.get("severity") == severity]
    lines = [
        (
            name,
            *(
                auroc(statistics.mean(r["auroc"][name] for r in chosen if r["method"] == method))
                for method in methods
            ),
        )
        for name in chosen[0]["auroc"]
    ]
    return table(["corruption", *methods], lines)


def attacks(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row["shift"] == "attack"]
    names = list(chosen[0]["auroc"])
    lines = [(r["model"], r["method"], *(auroc(r["auroc"][n]) for n in names)) for r in chosen]
    return table(["model", "method", *names], lines)


@dataclass(frozen=True)
class Page:
    """One of the further pages.

    Attributes:
        file: Under `docs`.
        title: Of the page.
        sections: Parts of it, by the command whose results they show.
        with_protocol: Whether it says how is measured.
        package: Of benchmarks, where the commands are.
    """

    file: str
    title: str
    sections: dict[str, Callable[[Report, str], list[str]]]
    with_protocol: bool = False
    package: str = "detection"


PAGES = (
    Page(
        "evidence/images.md",
        "Images",
        {"forward": forward_page.section, "no_law": forward_page.no_law, "evidence": evidence},
        with_protocol=True,
    ),
    Page("evidence/denoisers.md", "Denoisers", {"denoisers": forward_page.denoisers}),
    Page("evidence/tables.md", "Rows of tables", {"tables": forward_page.tables}),
    Page(
        "evidence/unseen.md",
        "Sets by which nothing was chosen",
        {
            "reserved": cases_page.reserved,
            "domains": cases_page.domains,
            "audio": cases_page.audio,
        },
    ),
    Page("evidence/text.md", "Text", {"text": text_page.section}),
    Page(
        "evidence/cifar10.md",
        "Models of CIFAR-10",
        {"colour_glow": forward_page.colour_glow, "colour": colour},
    ),
    Page(
        "evidence/layers.md",
        "Layers, samples and training",
        {"paper": paper, "questions": questions},
    ),
    Page(
        "evidence/published.md",
        "Models that others published",
        {"antibodies": published_page.antibodies, "galaxies": published_page.galaxies},
        package="detection.published",
    ),
    Page(
        "evidence/known.md", "Known data, small change", {"known_data": published_page.known_data}
    ),
    Page("evidence/shifts.md", "Corruptions and attacks", {"shifts": shifts}),
    Page(
        "evidence/streams.md",
        "Drift in real streams",
        {"real_streams": streams_page.section, "real_series": streams_page.series},
        package="drift",
    ),
)


def main(
    results: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path(
        "benchmarks/results"
    ),
    docs: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("docs"),
) -> None:
    for name, text in rendered(results).items():
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).write_text(text)
    summary.figure(read(results)).savefig(docs / "evidence.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
