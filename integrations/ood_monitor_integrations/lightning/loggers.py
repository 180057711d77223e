"""Figures of a stage to the Trainer's loggers, and alerts to the run of an MLflow logger."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ood_monitor.alerts import Sink
from ood_monitor_integrations.training.failures import Failures

__all__ = ["is_mlflow", "mlflow_sinks", "write"]


def write(
    loggers: Iterable[Any], metrics: Mapping[str, float], step: int, failures: Failures
) -> None:
    """Write metrics where `self.log` may not, or takes too long."""
    for logger in loggers:
        with failures.contained("could not write its figures"):
            if metrics:
                logger.log_metrics(dict(metrics), step=step)


def mlflow_sinks(
    loggers: Iterable[Any], stage: str, *, metrics: bool, first_step: int
) -> Iterator[Sink]:
    """A sink for each MLflow run that the Trainer logs to, where it tells of one stage."""
    for logger in loggers:
        if is_mlflow(logger):
            # Here, so that Lightning without MLflow works: this logger has MLflow imported already.
            from ood_monitor_integrations.mlflow import MLflowSink

            yield MLflowSink.from_logger(
                logger, stage=stage, metrics=metrics, first_step=first_step
            )


def is_mlflow(logger: Any) -> bool:
    """Whether a logger writes to a run of MLflow; by what it has, not by its namespace."""
    client = getattr(logger, "experiment", None)
    return hasattr(client, "log_batch") and isinstance(getattr(logger, "run_id", None), str)
