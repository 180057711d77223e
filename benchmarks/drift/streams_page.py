"""What `benchmarks.drift.real_streams` measured, as a page of the evidence."""

from typing import Any

from benchmarks.harness import pages
from benchmarks.harness.pages import table

Row = dict[str, Any]

INTRODUCTION = (
    "Scores of a VAE of Fashion-MNIST, by two methods. Its own test images are a stream, into "
    "which other images come after 300: at once, slowly, or in bursts. All deciders see the same "
    "scores. Ours promises 1 000 samples to a false alarm on average, and alibi-detect's test is "
    "set to as many. The knob of each other was set, on normal streams of these scores, until its "
    "mean run length was at least ours, since a decider that is wrong more often is early for "
    "free; claims leave out one that is. Median samples from the change to the alarm; in brackets "
    "the share of streams without one in 2 000 samples, where there are any."
)


def section(report: Row, measured: str) -> list[str]:
    """The part of the page."""
    blocks = [f"By {measured}", pages.paragraph(INTRODUCTION)]
    for method in dict.fromkeys(row["scores"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["scores"] == method]
        blocks += [f"## Scores by `{method}`", delays(rows), since(rows)]
    return [*blocks, *pages.judged("## Claims of streams", report["claims"])]


SERIES = (
    "Series that statsmodels carries (BSD licence), forecast by zuko's flow of a row given the row "
    "before it or the season: half of the early rows train it, the other half calibrates, the rest "
    "is the stream. Each column has a test of its own; all columns of a series together promise "
    "1 000 samples to a false alarm. Nobody knows the truth of such data. What is known: "
    "economists date the calmer growth of the United States to 1984, and the winter of 1982 to "
    "1983 had one of the strongest El Niños of the century. *In random order*: the share of "
    "streams with an alarm of the same rows shuffled, where there is no drift."
)


def series(report: Row, measured: str) -> list[str]:
    """The part of the page on series in time."""
    lines = [
        [
            row["series"],
            row["column"],
            " to ".join(row["stream"]),
            row["alarm"] or "none",
            row["since"],
            None if row["interval"] is None else " to ".join(row["interval"]),
            pages.percent(row["false alarms in random order"]),
        ]
        for row in report["rows"]
    ]
    header = ["series", "column", "stream", "alarm", "since", "interval", "in random order"]
    return [
        "## Real series: which columns, since when",
        f"By {measured}",
        pages.paragraph(SERIES),
        table(header, lines),
        *pages.judged("### Claims of series", report["claims"]),
    ]


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
