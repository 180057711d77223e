"""Alerts in accelerate's trackers, written so that they arrive.

A monitor's sinks run in threads of their own. There `accelerator.log` returns as ever, but a
tracker that finds its run by the thread writes elsewhere: MLflow's into a new run that it opens. So
each tracker is written to by what it holds, never by what is current.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ood_monitor.alerts import Alert, Sink, Summary
from ood_monitor.alerts.sink import alert_line
from ood_monitor.checks import text
from ood_monitor.escaping import markdown_text
from ood_monitor_integrations.accelerate.tracker import FileTracker
from ood_monitor_integrations.alert_files import place_of
from ood_monitor_integrations.metrics import metrics_of, prefix_of

__all__ = ["AcceleratorSink"]


class AcceleratorSink:
    """Shows alerts and running figures in the trackers of an `Accelerator`, from any thread.

    ===================  =====================================================================
    tracker              what it has
    ===================  =====================================================================
    mlflow               as of :class:`~ood_monitor_integrations.mlflow.MLflowSink`, by run id
    tensorboard          a text, ``ood/alerts``, and figures, ``ood/status`` and the others
    a `FileTracker`      an alert as a file, and figures as lines of JSON
    a class of your own  figures, by its `log` in the sink's thread, and 1 as ``ood/alert``
    ===================  =====================================================================

    Only the main process writes; in the others it does nothing.

    Args:
        accelerator: With trackers: after `init_trackers`.
        stage: Words that tell several streams of one run apart, such as ``"shard-2"``.

    Raises:
        ValueError: The main process has no tracker, or one of accelerate's other trackers, which
            find their run by the thread or are not known to take calls from another.
        TypeError: What is no `Accelerator`.
    """

    def __init__(self, accelerator: Accelerator, *, stage: str | None = None) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"Expected an Accelerator, got {type(accelerator).__name__}.")
        self._stage = None if stage is None else text("stage", stage)
        self._sinks: list[Sink] = []
        if not accelerator.is_main_process:
            return
        if not accelerator.trackers:
            raise ValueError(
                "Expected an Accelerator with trackers, got none: make it with `log_with=`, and "
                "call `accelerator.init_trackers(name)` before the sink is made."
            )
        self._sinks = [self._sink_of(tracker) for tracker in accelerator.trackers]

    def __call__(self, alert: Alert, /) -> None:
        """Write `alert` to each.

        Raises:
            Exception: What a tracker raises, of the first that does: the alert is tried again, and
                those that have it write it again.
        """
        for sink in self._sinks:
            sink(alert)

    def summarise(self, summary: Summary, /) -> None:
        """Write running figures to each.

        Raises:
            Exception: As a call.
        """
        for sink in self._sinks:
            show = getattr(sink, "summarise", None)
            if show is not None:
                show(summary)

    def _sink_of(self, tracker: GeneralTracker) -> Sink:
        prefix = prefix_of(*(() if self._stage is None else (self._stage,)))
        if isinstance(tracker, FileTracker):
            return _Figures(partial(_write_file, tracker), tracker.log, prefix)
        own = type(tracker).__module__ != GeneralTracker.__module__
        make = _KNOWN.get("" if own else tracker.name)
        if make is None:
            raise ValueError(
                f"Expected trackers among {', '.join(filter(None, _KNOWN))}, a FileTracker or a "
                f"class of your own, got {tracker.name!r}: what is written to it from a sink's "
                "thread may not arrive. Add a `FileTracker`, or give the monitor other sinks."
            )
        return make(tracker, prefix, self._stage)


class _Figures:
    """A sink of functions.

    Args:
        tell: Writes an alert.
        log: Writes figures at a step.
        prefix: Of their names.
    """

    def __init__(self, tell: Callable[[Alert], None], log: Callable[..., Any], prefix: str) -> None:
        self._tell, self._log, self._prefix = tell, log, prefix

    def __call__(self, alert: Alert, /) -> None:
        self._tell(alert)

    def summarise(self, summary: Summary, /) -> None:
        self._log(metrics_of(summary, self._prefix), step=summary.samples_seen)


def _mlflow(tracker: Any, prefix: str, stage: str | None) -> Sink:
    # Here, so that accelerate without MLflow works: this tracker has imported it already.
    from ood_monitor_integrations.mlflow import MLflowSink

    return MLflowSink(str(tracker.tracker.info.run_id), stage=stage)


def _tensorboard(tracker: Any, prefix: str, stage: str | None) -> Sink:
    writer = tracker.tracker

    def tell(alert: Alert) -> None:
        line = markdown_text(f"{alert.severity}: {alert_line(alert)}")
        writer.add_text(f"{prefix}/alerts", line, alert.samples_seen)
        writer.flush()

    def log(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Figures(tell, log, prefix)


def _of_your_own(tracker: Any, prefix: str, stage: str | None) -> Sink:
    def tell(alert: Alert) -> None:
        tracker.log({f"{prefix}/alert": 1.0}, step=alert.samples_seen)

    return _Figures(tell, tracker.log, prefix)


def _write_file(tracker: FileTracker, alert: Alert) -> None:
    tracker.write(f"{place_of(alert)}.json", alert.to_json(indent=2))


_KNOWN: Mapping[str, Callable[[Any, str, str | None], Sink]] = {
    "": _of_your_own,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}
