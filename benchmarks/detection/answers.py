"""Answers to the paper's statements: what they are made of, and rules for verdicts.

A verdict is computed from figures, by a rule of its statement, so that it is never of older ones.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness.pages import auroc

Row = dict[str, Any]
#: Rows of each benchmark, by its name.
Results = Mapping[str, list[Row]]

HOLDS, IN_PART, NOT_HERE = "holds", "holds in part", "does not hold here"
COULD_NOT = "could not be run"

#: In what share of the cases a statement is to hold, to hold here, and in part.
OF_CASES, OF_SOME = 0.9, 0.25

#: AUROCs no further apart count as equal.
EQUAL = 0.005


@dataclass(frozen=True)
class Answer:
    """What was found of a statement.

    Attributes:
        verdict: One of the four.
        figure: In words.
    """

    verdict: str
    figure: str


@dataclass(frozen=True)
class Statement:
    """A row of the page.

    Attributes:
        words: Our own.
        needs: Names of the benchmarks that its figures are of.
        answer: Of their results.
    """

    words: str
    needs: tuple[str, ...]
    answer: Callable[[Results], Answer]


def loaded(folder: Path) -> dict[str, list[Row]]:
    """Of a folder of results those that have rows."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        if isinstance(report, dict) and "rows" in report:
            found[file.stem] = report["rows"]
    return found


def of_share(share: float) -> str:
    """The verdict on a statement that holds in this share of the cases."""
    return HOLDS if share >= OF_CASES else IN_PART if share >= OF_SOME else NOT_HERE


def of_cases(holds: Iterable[bool]) -> str:
    """The verdict by case."""
    return of_share(mean(map(float, holds)))


def between(values: Iterable[float], written: Callable[[float], str] = auroc) -> str:
    """The least and the largest."""
    listed = list(values)
    low, high = written(min(listed)), written(max(listed))
    return low if low == high else f"{low} to {high}"


def where(rows: Iterable[Row], **columns: object) -> list[Row]:
    """Those that have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in columns.items())]


def pairs_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    """AUROC by what a model was trained on, the model, and the other set."""
    return {
        (row["on"], row["model"], name): value
        for row in rows
        for name, value in row["auroc"].items()
    }


def counts(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[int, int, int]:
    """Of how many pairs of sets the first are better, equal and worse."""
    others = pairs_of(theirs)
    lead = [value - others[pair] for pair, value in pairs_of(ours).items()]
    better, worse = (sum(sign * value > EQUAL for value in lead) for sign in (1, -1))
    return better, len(lead) - better - worse, worse


def table_of(results: Results, method: str, group: int = 1) -> list[Row]:
    """Rows of one method of the table of `benchmarks.detection.statements`, a model each."""
    return where(results["statements"], part="table", method=method, group=group)


def mean_of(rows: Iterable[Row]) -> float:
    """Of all pairs."""
    return mean(pairs_of(rows).values())


def by_model(rows: Iterable[Row], column: str = "mean") -> dict[tuple[str, str], float]:
    return {(row["on"], row["model"]): row[column] for row in rows}


def gains(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """By model, of mean AUROC."""
    others = by_model(theirs)
    return [value - others[model] for model, value in by_model(ours).items()]


def slashed(found: Sequence[int]) -> str:
    return "/".join(map(str, found))
