"""What benchmarks found, as parts of a page in Markdown."""

import re
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; a cell that is None is empty."""
    return "\n".join([_line(header), "|" + "---|" * len(header), *map(_line, rows)])


def filled(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table without the columns in which no row has a cell."""
    listed = list(rows)
    kept = [i for i in range(len(header)) if any(row[i] is not None for row in listed)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in listed])


def _line(cells: Sequence[object]) -> str:
    texts = ("" if cell is None else str(cell) for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"


def paragraph(text: str) -> str:
    """Words in lines of at most 100 characters."""
    return fill(text, 100, break_long_words=False, break_on_hyphens=False)


def auroc(value: float) -> str:
    """With three decimals, and none before the point unless it is 1."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:z.3f}")


def ratio(value: float) -> str:
    """With two decimals."""
    return f"{value:z.2f}"


def percent(share: float) -> str:
    """Of a share of 1."""
    return f"{100 * share:z.1f} %"


def described(machine: Row) -> str:
    """Where and when something was measured, of a report's `machine`."""
    versions = {k: v for k, v in machine.items() if k not in _NOT_VERSIONS}
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    packages = [f"{name} {version}" for name, version in versions.items()]
    return ", ".join([machine["processor"], threads, *packages, machine["date"]])


_NOT_VERSIONS = {"processor", "threads", "date", "seconds"}


def judged(title: str, found: Sequence[Row]) -> list[str]:
    """A part of a page: the claims that are missed, then all of them."""
    return [title, missed(found), claims(found)]


def claims(found: Iterable[Row]) -> str:
    """A table of what was claimed, as `benchmarks.harness.measurement.claim` gives it."""
    return table(
        ["claim", "value", "target, at most", ""],
        [
            (c["claim"], f"{c['value']:g}", f"{c['target']:g}", "holds" if c["holds"] else "missed")
            for c in found
        ],
    )


def missed(found: Sequence[Row]) -> str:
    """How many claims do not hold, and which."""
    failed = [c for c in found if not c["holds"]]
    items = [f"- {c['claim']}: {c['value']:g}; the target is {c['target']:g}" for c in failed]
    count = f"{len(failed)} of {len(found)} claims are missed"
    return f"{count}:\n\n" + "\n".join(items) if failed else f"{count}."
