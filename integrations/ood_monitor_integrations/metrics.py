"""The names and values of metrics, the same in every integration; docs/design.md has the table."""

import re
from collections.abc import Mapping

from ood_monitor.alerts import Status, Summary

__all__ = ["STATUSES", "metrics_of", "prefix_of", "word_of"]

#: The values of the metric `status`, the worst last.
STATUSES: Mapping[Status, float] = {"OK": 0.0, "WARN": 1.0, "ALERT": 2.0}

#: What stores of metrics take in a name; MLflow takes the fewest.
_FOREIGN = re.compile(r"[^A-Za-z0-9_. -]")
_LONGEST = 100


def metrics_of(summary: Summary, prefix: str) -> dict[str, float]:
    """The metrics of a stream, by their full names; a figure that is not defined is left out."""
    figures = {
        "status": STATUSES[summary.status],
        "score_mean": summary.score_mean,
        "score_p95": summary.score_p95,
        "flagged_rate": summary.flagged_rate,
        "log_e_value": summary.log_e_value,
        "invalid": float(sum(summary.invalid.values())),
    }
    return {f"{prefix}/{name}": value for name, value in figures.items() if value is not None}


def prefix_of(*words: str) -> str:
    """What the names of a stream's metrics begin with: `ood`, then its words if it has any."""
    return "/".join(["ood", *words])


def word_of(name: str) -> str:
    """A name as a word of metrics' names, with `_` in the place of what these must not hold."""
    return _FOREIGN.sub("_", name)[:_LONGEST].strip(".") or "_"
