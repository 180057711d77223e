"""`ood-monitor verify`, `recalibrate`, `accept`: a detector elsewhere, later, after an alert."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ood_monitor.adapters.base import Batch
from ood_monitor.alerts.alert import Alert
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts, say
from ood_monitor.cli.data import readable
from ood_monitor.cli.models import Model
from ood_monitor.cli.options import Data, Directory, Fpr, Scoring, asking_for_scoring
from ood_monitor.cli.recipe import RECIPE, Recipe
from ood_monitor.cli.showing import facts_of
from ood_monitor.cli.watching import accepted
from ood_monitor.saving.fitted import CONFIG, Fitted

__all__ = ["accept", "recalibrate", "verify"]


@checked
@asking_for_scoring
def verify(
    directory: Directory,
    data: Data,
    fpr: Fpr = 0.01,
    *,
    scoring: Scoring,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Check that a detector gives the same p-values here as where it was fitted.

    A detector remembers sixteen of its calibration samples, by their SHA-256, and their scores.
    This command finds them among the data and scores them again, on this device and with these
    versions. A p-value that differs by more than half of fpr is an error, which names both sides.

    \b
    Example:
        ood-monitor verify runs/detector data/held_out
    """
    detector, model, recipe = scoring.detector(directory)
    found = detector.verify(_batches(scoring, data, model, recipe), fpr=fpr)
    if as_json:
        print_facts(asdict(found), as_json=True)
        return
    say(
        f"as where it was fitted: {found.found} of {found.remembered} remembered samples, p-values "
        f"within {found.difference:.3g} ({found.steps} steps)."
    )


@checked
@asking_for_scoring
def recalibrate(
    directory: Directory,
    data: Data,
    output: Annotated[Path, typer.Argument(metavar="NEW", help="The folder to write.")],
    *,
    scoring: Scoring,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Calibrate a detector again, on data that are known to be normal, and keep what it learned.

    The data must be new to the detector: it was not fitted on them, and they were not chosen by
    their scores. After `ood-monitor accept` a watch goes on with the new detector.

    \b
    Example:
        ood-monitor recalibrate runs/detector data/new_normal runs/recalibrated
    """
    if (output / CONFIG).exists():
        raise FileExistsError(f"Expected a new folder, got a detector in {output}: give another.")
    detector, model, recipe = scoring.detector(directory)
    normal = _batches(scoring, data, model, recipe)
    detector.recalibrate(normal, progress=scoring.shows_progress)
    detector.save_pretrained(output)
    shutil.copyfile(directory / RECIPE, output / RECIPE)
    facts = {"detector": str(output), **facts_of(detector.fitted)}
    print_facts(facts, as_json=as_json)


@checked
def accept(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="What `watch --state` wrote.")],
    directory: Directory,
    reason: Annotated[str, typer.Option(help="Why the stream is right as it is now, in words.")],
    name: Annotated[str, typer.Option(help="The stream's name in alerts.")] = "stream",
    fpr: Fpr = 0.01,
    debug: Debug = False,
) -> None:
    r"""Accept a stream as it is now, and begin anew with a detector, usually a recalibrated one.

    Status, figures and the drift test begin anew, and counts go on. An alert of kind "accepted",
    with your reason, is printed as a line of JSON. End the watch first, since it holds the state.

    \b
    Example:
        ood-monitor accept watch.json runs/recalibrated --reason "new camera, approved by Ada"
        ood-monitor watch runs/recalibrated inbox --state watch.json
    """
    alert: Alert = accepted(state, Fitted.load(directory)[0], reason, name=name, fpr=fpr)
    typer.echo(alert.to_json())


def _batches(scoring: Scoring, data: Path, model: Model, recipe: Recipe) -> Iterator[Batch]:
    """All samples that can be read, by batch."""
    source = scoring.samples(data, recipe)
    for start in range(0, len(source.ids), scoring.batch_size):
        indices = range(start, min(start + scoring.batch_size, len(source.ids)))
        samples, reasons = readable(source, indices)
        if reasons:
            raise ValueError(f"Expected samples that can be read: {next(iter(reasons.values()))}")
        yield model.batch(samples)
