"""`ood-monitor watch`: a stream of images, alerts as lines, and a status to exit with."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ood_monitor.alerts.alert import Alert, Status
from ood_monitor.alerts.guidance import told
from ood_monitor.alerts.page_sink import PageSink
from ood_monitor.checks import text
from ood_monitor.cli.console import AsJson, Debug, checked, say
from ood_monitor.cli.images import ImageFormat, no_image
from ood_monitor.cli.models import Model
from ood_monitor.cli.options import (
    Argument,
    BatchSize,
    Device,
    Directory,
    Ert,
    Fpr,
    ModelOverride,
    load_detector,
)
from ood_monitor.cli.sources import FolderFiles, ListedFiles, Quiet, Source
from ood_monitor.cli.state import StateFile
from ood_monitor.escaping import utf8
from ood_monitor.monitor.decisions import Decisions
from ood_monitor.monitor.monitor import Monitor
from ood_monitor.monitor.rules import Rules
from ood_monitor.saving.fitted import Fitted

__all__ = ["EXIT_CODES", "accepted", "watch"]

#: What `watch` exits with, by the stream's status.
EXIT_CODES: Mapping[Status, int] = {"OK": 0, "WARN": 3, "ALERT": 4}

#: Seconds between two writings of the state while nothing is alerted.
_SAVE_EVERY = 1.0

#: Seconds between two words to the page while nothing comes, so that it is known to be watched.
_SHOW_EVERY = 20.0


@checked
def watch(
    directory: Directory,
    where: Annotated[
        str, typer.Argument(metavar="FOLDER|-", help="A folder, or - for paths on stdin.")
    ],
    ert: Ert = 10_000,
    fpr: Fpr = 0.01,
    state: Annotated[
        Path | None, typer.Option(help="A file to resume from, and to keep the state in.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Stop when everything there has been processed.")
    ] = False,
    idle: Annotated[
        float | None, typer.Option(min=0, help="Stop when nothing came for so many seconds.")
    ] = None,
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks.")] = 1.0,
    batch_size: BatchSize = 32,
    name: Annotated[str, typer.Option(help="The stream's name in alerts.")] = "stream",
    page: Annotated[
        Path | None,
        typer.Option(help="An HTML file that shows how the stream stands; watches can share it."),
    ] = None,
    model: ModelOverride = None,
    argument: Argument = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Watch a folder that fills with images, or paths on stdin, and print alerts.

    Each alert is a line of JSON on stdout. A line for people goes to stderr: what it is, since
    when, and what to do now. A file that cannot be read is reported on stderr, and counts as an
    invalid sample. The watch ends at the end of stdin, with --once or --idle, by Ctrl-C or a TERM
    signal, and for no other reason. With --json the last line is a summary, {"summary": ...}.

    --page writes an HTML file that needs no server and no script: the status, since when, what to
    do, the evidence, rates and last alerts. Watches that are given the same file share it.

    --state lets a watch go on where it ended, also after a crash. Alerts are printed before the
    state is written: none is lost, but those of the last batch may come twice. The file is for you
    alone and for one watch at a time. It is refused if a bit of it has changed.

    \b
    Exit codes:
        0  OK       nothing, or recovered
        1  an error
        2  a wrong use
        3  WARN     a sample was flagged lately
        4  ALERT    the stream has drifted

    \b
    Examples:
        ood-monitor watch runs/detector inbox --state watch.json --page status.html
        find inbox -name '*.png' | ood-monitor watch runs/detector - >> alerts.jsonl
    """
    source: Source = (
        ListedFiles(sys.stdin.fileno())
        if where == "-"
        else FolderFiles(Path(where), poll, once=once)
    )
    with ExitStack() as stack:
        # First of all: who comes second is to know before its model is loaded.
        kept = None if state is None else stack.enter_context(StateFile.locked(state))
        detector, loaded, recipe = load_detector(
            directory, model=model, arguments=argument, device=device
        )
        sinks = [] if page is None else [PageSink(page)]
        monitor = Monitor(detector, ert=ert, fpr=fpr, name=utf8(name), sinks=sinks)
        stack.enter_context(monitor)
        stop = stack.enter_context(_stopped_by_signals())
        watched = _Watch(monitor, loaded, recipe.images, source, kept, has_page=page is not None)
        watched.run(stop, batch_size, Quiet(idle))
    watched.summarise(as_json=as_json)
    raise typer.Exit(EXIT_CODES[monitor.status])


class _Watch:
    """A monitor on files, and what is kept of it."""

    def __init__(
        self,
        monitor: Monitor,
        model: Model,
        images: ImageFormat,
        source: Source,
        state: StateFile | None,
        *,
        has_page: bool,
    ) -> None:
        self._monitor, self._model, self._images = monitor, model, images
        self._source, self._state = source, state
        self._shape = images.shape
        self._saved, self._unsaved = time.monotonic(), False
        self._alerts = self._unreadable = 0
        if state is not None and state.is_there:
            self._resume(state)
        self._has_page, self._shown = has_page, -math.inf
        self._show(came=True)
        if state is not None:
            self._save()  # a place that cannot be written to is told of at once

    def run(self, stop: Event, batch_size: int, quiet: Quiet) -> None:
        while not stop.is_set():
            files = self._source.next(batch_size, stop)
            if files is None:
                break
            if files:
                self._take(files)
            # Also while nothing comes: what came last must not wait for the next file.
            if self._unsaved and time.monotonic() - self._saved >= _SAVE_EVERY:
                self._save()
            self._show(came=bool(files))
            if quiet.is_over(came=bool(files)):
                break
        self._show(came=True, last=True)
        self._save()

    def summarise(self, *, as_json: bool) -> None:
        monitor = self._monitor
        facts = {
            "status": monitor.status,
            "samples_seen": monitor.samples_seen,
            "invalid": monitor.invalid,
            "unreadable": self._unreadable,
            "alerts": self._alerts,
        }
        if as_json:
            typer.echo(json.dumps({"summary": facts}))
        say(
            f"{monitor.status}: {monitor.samples_seen:,} samples, {monitor.invalid:,} of them "
            f"invalid, {self._alerts:,} alerts in this run."
        )

    def _take(self, files: Sequence[Path]) -> None:
        alerts = self._update(files)
        self._print(alerts)
        self._tell_flagged(files)
        self._print(self._monitor.explain())
        self._unsaved = True
        if alerts:
            self._save()

    def _show(self, *, came: bool, last: bool = False) -> None:
        """Have the page say how the stream stands, now and then also while nothing comes."""
        waited = time.monotonic() - self._shown
        if self._has_page and (last or waited >= (_SAVE_EVERY if came else _SHOW_EVERY)):
            self._monitor.summarise()
            self._shown = time.monotonic()

    def _print(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            typer.echo(alert.to_json())
        sys.stdout.flush()
        for alert in alerts:
            say(told(alert))
        self._alerts += len(alerts)

    def _update(self, files: Sequence[Path]) -> list[Alert]:
        """Of files that the model refuses, all that there are, none is scored.

        Raises:
            Exception: The model's, if it has scored others in this run, so that it is broken now,
                or if it has never scored any.
        """
        names = [utf8(str(file)) for file in files]
        try:
            return self._monitor.update(self._model.batch(self._read(files)), ids=names)
        except Exception as error:  # of any kind: a model is anybody's code
            if (
                self._monitor.last is not None
                or self._monitor.samples_seen == self._monitor.invalid
            ):
                raise
            say(f"not scored: {', '.join(names)}: {type(error).__name__}: {error}")
            nothing = torch.stack([no_image(self._shape)] * len(files))
            return self._monitor.update(self._model.batch(nothing), ids=names)

    def _read(self, files: Sequence[Path]) -> Tensor:
        """(B, C, H, W); nan for a file that cannot be read, which the monitor counts."""
        images = []
        for file in files:
            try:
                images.append(self._images.read(file))
            except (OSError, ValueError) as error:
                self._unreadable += 1
                say(f"unreadable: {error}")
                images.append(no_image(self._shape))
        return torch.stack(images)

    def _tell_flagged(self, files: Sequence[Path]) -> None:
        scores = self._monitor.last
        if scores is None:
            return
        for file, p_value in zip(files, scores.p_value.tolist(), strict=True):
            if p_value <= self._monitor.fpr:
                say(f"flagged: {file} (p-value {p_value:.3g})")

    def _resume(self, state: StateFile) -> None:
        with _read(state) as record:
            self._monitor.load_state_dict(record["monitor"])
            self._source.load_state(record["files"])

    def _save(self) -> None:
        if self._state is None:
            return
        self._state.write({"monitor": self._monitor.state_dict(), "files": self._source.state()})
        self._saved, self._unsaved = time.monotonic(), False


@contextmanager
def _read(state: StateFile) -> Iterator[dict[str, Any]]:
    """What a watch has written, and a word on what is wrong with it."""
    try:
        yield state.read()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the state of a watch with this detector and --ert in {state.path}, got "
            f"{error}"
        ) from error


def accepted(path: Path, fitted: Fitted, reason: str, *, name: str, fpr: float) -> Alert:
    """Let a watch that has ended begin anew in its state, judged by what a detector learned.

    Args:
        path: What the watch has written, which is written anew.
        fitted: By what it is judged.
        reason: In words.
        name: The stream's name.
        fpr: For the alert's figures.

    Returns:
        The alert that says so.

    Raises:
        BlockingIOError: The watch goes on.
        FileNotFoundError: There is none.
        ValueError: No state of a watch, or of a detector with other layers.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"Expected the state of a watch, got nothing there: {path}.")
    with StateFile.locked(path) as state:
        return _accepted(state, fitted, reason, name=name, fpr=fpr)


def _accepted(state: StateFile, fitted: Fitted, reason: str, *, name: str, fpr: float) -> Alert:
    with _read(state) as record:
        ert = record["monitor"]["drift"]["data"]["ert"]
        rules = Rules(name=utf8(name), fpr=fpr, ert=ert)
        fitted.check_fpr(rules.fpr)
        decisions = Decisions.of(rules, fitted, seed=0)
        decisions = decisions.resumed(record["monitor"], with_test=False)
    decisions.accept(text("reason", reason))
    alert = decisions.memory.owed.pop()
    state.write(record | {"monitor": decisions.dump()})
    return alert


@contextmanager
def _stopped_by_signals() -> Iterator[Event]:
    """An event that Ctrl-C or TERM sets, once: a second Ctrl-C does not wait for the batch."""
    stop = Event()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
