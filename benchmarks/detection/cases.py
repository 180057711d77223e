"""Models of one set of images, trained here, and the methods side by side on what they are shown.

The models are those of `benchmarks.detection.zoo` where nothing else is said, with so many fewer
steps as there are fewer images, and the protocol is that of `benchmarks.detection.forward`.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from torch import Tensor

from benchmarks.detection import methods, protocol, zoo
from benchmarks.detection.forward import line, misses, of_counts, rows_of
from benchmarks.detection.protocol import FPR
from benchmarks.detection.statements import kept
from benchmarks.detection.train import train
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]

# Options of the commands that measure such models.
Quick: TypeAlias = Annotated[
    bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
]
Models: TypeAlias = Annotated[list[str] | None, typer.Option(help="A model; all if none.")]
Training: TypeAlias = Annotated[
    Path | None, typer.Option(help="Train them, with checkpoints there, instead.")
]
Folder: TypeAlias = Annotated[
    Path, typer.Option(help="Where rows are kept; delete to measure anew.")
]
Output: TypeAlias = Annotated[Path | None, typer.Option(help="Where to write JSON.")]

#: Detectors with their defaults, and what they are compared with.
COMPARED = (
    *("forward", "gradient_norms", "both", methods.PAPER),
    *("typicality", methods.LOG_P, "PNG size"),
)


def of_zoo() -> dict[str, Watched]:
    """Those whose likelihood or bound is known by elements."""
    return {name: it for name, it in zoo.zoo().items() if name != "UNet"}


@dataclass(frozen=True)
class Case:
    """A set of images, and what models of it are shown.

    Attributes:
        name: As rows call it.
        images: uint8, (N, 1, S, S): `train`, those of `protocol.IN_DISTRIBUTION`, then others.
        share: Of a model's steps.
        models: By name.
    """

    name: str
    images: Mapping[str, Tensor]
    share: float = 1.0
    models: Callable[[], dict[str, Watched]] = field(default=of_zoo)

    def watched(self, model: str) -> Watched:
        """A model, with its steps here."""
        whole = self.models()[model]
        return replace(whole, steps=round(self.share * whole.steps))

    def weights(self, model: str) -> Path:
        """The file of its weights, which is committed."""
        stem = f"{self.name}-{model}".lower().replace(" ", "-")
        return zoo.WEIGHTS / f"{stem}.safetensors"

    def sets(self) -> dict[str, Tensor]:
        """What it is fitted to and shown."""
        return {name: each for name, each in self.images.items() if name != "train"}


def run(
    cases: list[Case], models: list[str], training: Path | None, folder: Path, output: Path | None
) -> None:
    """Trains the models of all cases, or measures them and tells what they claim."""
    if training is not None:
        for case in cases:
            trained(case, models, training)
        return
    found = (row for case in cases for row in rows(case, models, folder))
    reported(found, line, claims, output, sizes=sizes(cases))


def run_quick(output: Path | None) -> None:
    """Measures tiny models, and tells what they claim."""
    reported(quick(), line, claims, output)


def trained(case: Case, models: list[str], folder: Path) -> None:
    """Trains them, each from where it was interrupted, and writes their weights."""
    for model in models:
        file = case.weights(model)
        train(
            case.watched(model), case.images["train"], case.images["fit"], folder / file.stem, file
        )


def rows(case: Case, models: list[str], folder: Path) -> Iterator[Row]:
    """A row for each model and method, of files in the folder where it has a model's."""
    for model in models:
        file = folder / f"{case.weights(model).stem}.json"
        yield from kept(file, functools.partial(measured, case, model))


def measured(case: Case, model: str) -> list[Row]:
    """Of one model."""
    watched = case.watched(model)
    module, facts = zoo.load(watched, case.weights(model))
    found = rows_of(model, watched, module, case.sets(), list(COMPARED), timed=False)
    return [{"on": case.name, "training": facts} | row for row in found]


def quick() -> Iterator[Row]:
    """Of tiny models of 8x8 digits."""
    images = protocol.digits()
    train_on = images.pop("train")
    for model, watched, module, facts in zoo.trained_tiny(train_on):
        if model in of_zoo():
            for row in rows_of(model, watched, module, images, list(COMPARED), timed=False):
                yield {"on": "digits", "training": facts} | row


def claims(found: list[Row]) -> list[Row]:
    """That the default is no worse than what it replaces and stands beside, and keeps its rate."""
    ours = mean_of(found, "forward")
    less = {name: mean_of(found, name) - ours for name in COMPARED if name != "forward"}
    missed = {name: statistics.mean(misses(found, name)) for name in ("forward", "gradient_norms")}
    text = f"share missed at fpr {FPR} by forward, in what gradient_norms misses"
    return [
        *(claim(f"mean AUROC: {name} less forward", round(v, 4), 0.0) for name, v in less.items()),
        claim(text, round(missed["forward"] / missed["gradient_norms"], 3), 0.5),
        *of_counts(found),
    ]


def mean_of(found: list[Row], method: str) -> float:
    """Of all pairs of a model and a set."""
    rows = [row for row in found if row["method"] == method]
    return float(statistics.mean(value for row in rows for value in row["auroc"].values()))


def sizes(cases: list[Case]) -> dict[str, dict[str, int]]:
    """Images of each set, by case."""
    return {case.name: {name: len(each) for name, each in case.images.items()} for case in cases}
