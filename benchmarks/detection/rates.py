"""What an operator sees of a method, as cells of a table: of all its pairs, and of the worst pair.

Cells are of rows of `benchmarks.detection.protocol`. What a row does not have is left out.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.detection.protocol import Sizes
from benchmarks.harness.pages import percent

Row = dict[str, Any]

#: Heads of these columns, with what they say.
LEGENDS = {
    "found": "the share of foreign samples with p <= .01, by the detector's own p-values",
    "FPR 95": "the share of normal samples above a threshold that finds 95 % of the foreign ones",
    "alarm": "samples to a drift alarm when a fifth of a stream is foreign, the median of the "
    "pairs (*never*: not within the test samples)",
}
HEADER = tuple(LEGENDS)


def legend(rows: Iterable[Row]) -> str:
    """What the columns say that these rows have."""
    there = [cell is not None for cell in cells(rows)]
    told = [
        f"*{name[0].upper()}{name[1:]}*: {words}."
        for (name, words), is_there in zip(LEGENDS.items(), there, strict=True)
        if is_there
    ]
    return " ".join([*told, "In brackets the worst pair."]) if told else ""


def cells(rows: Iterable[Row]) -> list[str | None]:
    """Under `HEADER`."""
    listed = list(rows)
    return [
        shares(listed, "found", min),
        shares(listed, "fpr_at_95_tpr", max),
        alarm(listed),
    ]


def shares(
    rows: Sequence[Row], column: str, worst: Callable[[Iterable[float]], float]
) -> str | None:
    """The mean of a column of shares by set, and the worst."""
    values = [value for row in rows for value in row.get(column, {}).values()]
    if not values:
        return None
    return f"{percent(statistics.mean(values))} ({percent(worst(values))})"


def alarm(rows: Sequence[Row]) -> str | None:
    """The median of delays, and the longest."""
    found = [
        (value, value > stream(row)) for row in rows for value in row.get("delay", {}).values()
    ]
    if not found:
        return None
    # A median of an even number is of two, of which one may be never.
    middle, longest = delay(*statistics.median_high(found)), delay(*max(found))
    return middle if middle == "never" else f"{middle} ({longest})"


def delay(samples: float, is_never: bool) -> str:
    return "never" if is_never else f"{samples:.0f}"


def stream(row: Row) -> int:
    """How long a stream of a row is: as many as test samples; older rows do not say so."""
    return int(row.get("tested", Sizes().test // row.get("group", 1)))
