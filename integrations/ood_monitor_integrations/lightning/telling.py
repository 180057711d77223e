"""Alerts where people who run a Trainer look: the console, and the Trainer's loggers.

None of these sinks raises: a logger that fails is warned of once, and the others are told.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import fsspec

from ood_monitor import Alert
from ood_monitor.alerts import Sink
from ood_monitor.alerts.sink import alert_line
from ood_monitor.escaping import markdown_text, terminal
from ood_monitor_integrations.alert_files import figure_of, place_of
from ood_monitor_integrations.training.failures import Failures

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pytorch_lightning import Trainer

__all__ = ["LoggerSink", "logger_sinks", "step_of"]

_COLUMNS = ["kind", "severity", "samples_seen", "message", "id"]


class _Book(Protocol):
    """What a logger takes of an alert."""

    def add(self, alert: Alert, figure: "Figure | None") -> None:
        """Take it, and its figure if there is one."""


class LoggerSink:
    """Shows alerts in one logger, each as text and, where there is something to draw, a figure.

    Args:
        book: What takes them.
        failures: Told of failures.
    """

    def __init__(self, book: _Book, failures: Failures) -> None:
        self._book, self._failures = book, failures
        self._ids: set[str] = set()

    def __call__(self, alert: Alert, /) -> None:
        """Show `alert`, once."""
        if alert.id in self._ids:
            return
        self._ids.add(alert.id)
        figure = None
        with self._failures.contained("could not draw an alert"):
            figure = figure_of(alert)
        with self._failures.contained("could not write an alert to a logger"):
            self._book.add(alert, figure)


def logger_sinks(
    loggers: Iterable[Any], prefix: str, at: Callable[[Alert], int], failures: Failures
) -> Iterator[Sink]:
    """A sink for each logger that takes text, figures or files; MLflow's has one of its own.

    Args:
        loggers: The Trainer's.
        prefix: Of the stage's metrics, such as ``"ood/test"``; alerts stand beside these.
        at: The step of an alert.
        failures: Told of failures.
    """
    for logger in loggers:
        book = None
        with failures.contained("could not reach a logger"):
            book = _book_of(logger, f"{prefix}/alerts", at)
        if book is not None:
            yield LoggerSink(book, failures)


def step_of(trainer: "Trainer") -> int:
    """The step that Lightning logs at: of batches, where `global_step` counts each optimiser's."""
    batches = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return int(batches)


def _book_of(logger: Any, name: str, at: Callable[[Alert], int]) -> _Book | None:
    """By what a logger and its experiment have, not by what they are."""
    experiment = logger.experiment
    if _has(experiment, "add_text", "add_figure"):
        return _Board(experiment, name, at)
    if _has(experiment, "log") and _has(logger, "log_text", "log_image"):
        return _Tables(logger, name, at)
    path = getattr(experiment, "metrics_file_path", None)
    return _Files(os.path.dirname(path)) if isinstance(path, str) else None


def _has(target: object, *methods: str) -> bool:
    return all(callable(getattr(target, method, None)) for method in methods)


class _Board:
    """TensorBoard, whose texts are Markdown."""

    def __init__(self, writer: Any, name: str, at: Callable[[Alert], int]) -> None:
        self._writer, self._name, self._at = writer, name, at

    def add(self, alert: Alert, figure: "Figure | None") -> None:
        text = markdown_text(f"{alert.severity}: {alert_line(alert)}")
        self._writer.add_text(self._name, text, self._at(alert))
        if figure is not None:
            self._writer.add_figure(self._name, figure, self._at(alert))


class _Tables:
    """Weights & Biases: a table of one row, and an image."""

    def __init__(self, logger: Any, name: str, at: Callable[[Alert], int]) -> None:
        self._logger, self._name, self._at = logger, name, at

    def add(self, alert: Alert, figure: "Figure | None") -> None:
        row = [terminal(str(getattr(alert, column))) for column in _COLUMNS]
        self._logger.log_text(self._name, columns=_COLUMNS, data=[row], step=self._at(alert))
        if figure is not None:
            self._logger.log_image(f"{self._name}/figure", [figure], step=self._at(alert))


class _Files:
    """Files beside a table of metrics, as in an MLflow run: ``ood/alerts/<id>.json`` and `.png`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder  # maybe of another file system

    def add(self, alert: Alert, figure: "Figure | None") -> None:
        place = os.path.join(self._folder, place_of(alert))
        with fsspec.open(f"{place}.json", "w", encoding="utf-8") as file:
            file.write(alert.to_json(indent=2))
        if figure is not None:
            with fsspec.open(f"{place}.png", "wb") as file:
                figure.savefig(file, format="png")
