"""What `benchmarks.detection.text` measured, as a page of the evidence."""

from typing import Any

from benchmarks.detection import rates
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc

Row = dict[str, Any]

#: Of the page: its words for a row's method and features.
LINES = {
    ("-log p", "none"): "- log-likelihood",
    ("-log p less zlib", "none"): "the same less zlib's bits",
    ("typicality", "none"): "typicality",
    ("Fast-DetectGPT", "none"): "Fast-DetectGPT's curvature",
    ("Min-K%++", "none"): "Min-K%++",
    ("total norm", "tensor"): "total gradient norm",
    ("DiagonalGaussian", "tensor"): "paper",
    ("Ledoit-Wolf", "tensor"): "Ledoit-Wolf",
    ("gradient_norms", "detector"): '`"gradient_norms"`',
    ("forward", "detector"): '`"forward"`, the default',
    ("both", "detector"): '`"both"`',
    ("byte frequencies", "none"): "byte frequencies, no model",
    ("zlib", "none"): "size by zlib, no model",
}


def section(report: Row, measured: str) -> list[str]:
    """The page, but for its title."""
    rows = {(row["method"], row["features"]): row for row in report["rows"]}
    model = report["model"]
    return [
        f"By {measured}",
        pages.paragraph(
            f"The paper leaves text open. A byte model of {model['parameters'] / 1e6:.1f} M "
            f"parameters was trained on Shakespeare ({model['test nats per byte']:.2f} nats a byte "
            "on the test text). It is shown single windows of 128 bytes of that text and of seven "
            "other kinds, written in the same bytes."
        ),
        verdict(rows),
        table_of(rows),
        pages.paragraph(
            f"{rates.legend(rows.values())} *At .05*: the share of windows by the same author with "
            "p <= .05, which come later in the text than those that calibrate: other plays are a "
            "shift of their own."
        ),
        pages.paragraph(
            "Fast-DetectGPT's curvature and Min-K%++ were made to tell what a machine has written, "
            "or was trained on, by the same model's expectations. Here the less of it, the odder."
        ),
        *pages.judged("## Claims of text", report["claims"]),
    ]


def verdict(rows: dict[tuple[str, str], Row]) -> str:
    """Of gradient norms and the default, beside what needs no gradient."""
    low, norms, ours = (
        rows[key]["mean"]
        for key in (("-log p", "none"), ("gradient_norms", "detector"), ("forward", "detector"))
    )
    does_better = (
        "does better: the paradox that gradient norms repair does not occur here"
        if low > norms
        else "does no better"
    )
    return pages.paragraph(
        f"Gradient norms detect foreign text by {auroc(norms)} on average. Plain likelihood, with "
        f'{auroc(low)}, {does_better}. `method="forward"`, the default for text, holds the '
        f"likelihood; it has {auroc(ours)}."
    )


def table_of(rows: dict[tuple[str, str], Row]) -> str:
    names = list(rows["-log p", "none"]["auroc"])
    lines = []
    for key, title in LINES.items():
        if (row := rows.get(key)) is not None:
            values = [*row["auroc"].values(), row["mean"], min(row["auroc"].values())]
            alarms = pages.percent(row["false alarms at .05"])
            lines.append([title, *map(auroc, values), *rates.cells([row]), alarms])
    return pages.filled(["AUROC", *names, "mean", "worst", *rates.HEADER, "at .05"], lines)
