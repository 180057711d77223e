"""What `benchmarks.drift.real_streams` measured, as a page of the evidence."""

from typing import Any

from benchmarks.harness import pages
from benchmarks.harness.pages import table

Row = dict[str, Any]

INTRODUCTION = (
    "Scores of a VAE of Fashion-MNIST, by two methods. Its own test images are a stream, into "
    "which other images come after 300: at once, slowly, or in bursts. All deciders see the same "
    "scores. Ours promises 1 000 samples to a false alarm on average. The knob of each other was "
    "set, on normal streams of these scores, until its mean run length was at least ours, since a "
    "decider that is wrong more often is early for free. Median samples from the change to the "
    "alarm; in brackets the share of streams without one in 2 000 samples, where there are any."
)


def section(report: Row, measured: str) -> list[str]:
    """The part of the page."""
    blocks = [f"By {measured}", pages.paragraph(INTRODUCTION)]
    for method in dict.fromkeys(row["scores"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["scores"] == method]
        blocks += [f"## Scores by `{method}`", delays(rows), since(rows)]
    return [*blocks, *pages.judged("## Claims of streams", report["claims"])]


def delays(rows: list[Row]) -> str:
    names = [f"{row['decider']} ({row['streams']} streams)" for row in rows]
    lines: list[list[object]] = [
        [change, *(told(row["changes"][change]) for row in rows)] for change in rows[0]["changes"]
    ]
    lines.append(["mean run length without a change", *(row["mean run length"] for row in rows)])
    return table(["stream", *names], lines)


def told(found: Row) -> str:
    median = "never" if found["median delay"] is None else f"{found['median delay']:g}"
    missed = found["undetected"]
    return median + (f" ({pages.percent(missed)})" if missed else "")


def since(rows: list[Row]) -> str:
    """Where ours says that the evidence begins; of changes at once alone it has a true answer."""
    [own] = [row for row in rows if row["decider"] == "ours"]
    lines = [
        [change, its["median distance"], its["coverage"]]
        for change, its in own["changes"].items()
        if change.endswith("at once")
    ]
    lead = pages.paragraph(
        "Since when, as an alarm of ours says it: the median distance from the true sample, and "
        "how often its interval of nine tenths has it."
    )
    return f"{lead}\n\n{table(['stream', 'distance', 'coverage'], lines)}"
