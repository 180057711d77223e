"""Figures of a stage to the Trainer's loggers, and alerts to the run of an MLflow logger."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ood_monitor import Alert, Scores
from ood_monitor.alerts import Sink, Summary
from ood_monitor_integrations.lightning.failures import Failures

__all__ = ["LeftOpen", "figures", "is_mlflow", "mlflow_sinks", "write"]


class LeftOpen:
    """A sink that outlives the monitor of one stage: closing is left to whoever made it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, alert: Alert, /) -> None:
        """Pass it on."""
        self._sink(alert)

    def summarise(self, summary: Summary, /) -> None:
        """Pass it on to a sink that shows running figures."""
        if callable(show := getattr(self._sink, "summarise", None)):
            show(summary)


def figures(scores: Scores, fpr: float, log_e_value: float, prefix: str) -> dict[str, float]:
    """The metrics of a stage; none if no sample could be scored."""
    valid = scores.valid
    if not valid.any():
        return {}
    values = {
        "score_mean": float(scores.score[valid].mean()),
        "flagged_rate": float((scores.p_value[valid] <= fpr).double().mean()),
        "log_e_value": log_e_value,
    }
    return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}


def write(
    loggers: Iterable[Any], metrics: Mapping[str, float], step: int, failures: Failures
) -> None:
    """Write metrics where `self.log` may not, or takes too long."""
    for logger in loggers:
        with failures.contained("could not write its figures"):
            if metrics:
                logger.log_metrics(dict(metrics), step=step)


def mlflow_sinks(loggers: Iterable[Any]) -> Iterator[Sink]:
    """A sink for each MLflow run that the Trainer logs to."""
    for logger in loggers:
        if is_mlflow(logger):
            # Here, so that Lightning without MLflow works: this logger has MLflow imported already.
            from ood_monitor_integrations.mlflow import MLflowSink

            yield MLflowSink.from_logger(logger)


def is_mlflow(logger: Any) -> bool:
    """Whether a logger writes to a run of MLflow; by what it has, not by its namespace."""
    client = getattr(logger, "experiment", None)
    return hasattr(client, "log_batch") and isinstance(getattr(logger, "run_id", None), str)
