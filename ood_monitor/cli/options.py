"""Arguments and options that several commands have, and what their texts mean."""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ood_monitor.cli.console import Progress, wants_progress
from ood_monitor.cli.data import Samples, open_samples
from ood_monitor.cli.models import Model, load_model
from ood_monitor.cli.recipe import RECIPE, Recipe, check_images, recipe_without_file
from ood_monitor.detector.detector import Detector

__all__ = [
    "Argument",
    "BatchSize",
    "Data",
    "Device",
    "Directory",
    "Ert",
    "Fpr",
    "Key",
    "ModelOverride",
    "Scoring",
    "Split",
    "arguments_of",
    "asking_for_scoring",
    "load_detector",
    "size_of",
]

Directory = Annotated[
    Path, typer.Argument(metavar="DETECTOR", help="The folder that `fit` wrote or `pull` fetched.")
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder of images, an .npz file, a .csv of numbers, or a Hugging Face dataset on "
        "disk.",
    ),
]
Argument = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        metavar="NAME=JSON",
        help="An argument of the function, or of the pipeline's call; repeat for more.",
    ),
]
Key = Annotated[str | None, typer.Option(help="Which array of the .npz, or column of the dataset.")]
Split = Annotated[str | None, typer.Option(help="Which split of the dataset.")]
Device = Annotated[str | None, typer.Option(help="Where the model computes, such as cuda:0.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples that are scored together.")]
Fpr = Annotated[
    float, typer.Option(help="Share of normal samples that may be flagged, between 0 and 1.")
]
Ert = Annotated[
    float, typer.Option(help="Mean number of normal samples between two false drift alarms.")
]
ModelOverride = Annotated[
    str | None,
    typer.Option("--model", help="Where the model is now, in place of what was given to `fit`."),
]


@dataclass(frozen=True)
class Scoring:
    """How data are scored: the options of every command that scores data at rest."""

    batch_size: BatchSize = 32
    key: Key = None
    split: Split = None
    model: ModelOverride = None
    argument: Argument = None
    device: Device = None
    progress: Progress = None

    @property
    def shows_progress(self) -> bool:
        """Whether a bar is shown."""
        return wants_progress(self.progress)

    def detector(self, directory: Path) -> tuple[Detector, Model, Recipe]:
        """As :func:`load_detector`."""
        return load_detector(
            directory, model=self.model, arguments=self.argument, device=self.device
        )

    def samples(self, data: Path, recipe: Recipe) -> Samples:
        """As :func:`~ood_monitor.cli.data.open_samples`."""
        return open_samples(data, recipe.images, key=self.key, split=self.split)


def asking_for_scoring(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with an option for each field in the place of its keyword ``scoring``."""
    signature = inspect.signature(command)
    names = [field.name for field in fields(Scoring)]
    options = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(Scoring).parameters.values()
    ]
    own = list(signature.parameters.values())
    at = [parameter.name for parameter in own].index("scoring")

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        scoring = Scoring(**{name: given.pop(name) for name in names if name in given})
        command(*args, scoring=scoring, **given)

    own[at : at + 1] = options
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return run


def arguments_of(texts: Sequence[str] | None) -> dict[str, Any]:
    """Keywords from texts NAME=JSON.

    Raises:
        ValueError: A text is none.
    """
    return dict(_pair(text) for text in texts or ())


def size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width from a text HxW.

    Raises:
        ValueError: It is none.
    """
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"Expected a size HxW in pixels, such as 64x64, got {text!r}.")
    return int(height), int(width)


def load_detector(
    directory: Path,
    *,
    model: str | None,
    arguments: Sequence[str] | None,
    device: str | None,
) -> tuple[Detector, Model, Recipe]:
    """A detector with its model.

    Raises:
        OSError: A file is missing.
        ValueError: A damaged file, two that do not belong together, or another model than the
            detector's.
    """
    own = model is not None and not (directory / RECIPE).exists()
    recipe = recipe_without_file(directory, str(model)) if own else Recipe.load(directory)
    check_images(recipe, directory)  # before any code of the user's is run
    recipe = recipe.overridden(model, arguments_of(arguments))
    loaded = load_model(recipe, device)
    return Detector.from_pretrained(directory, loaded.adapter), loaded, recipe


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals or not name.isidentifier():
            raise ValueError("no name")
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"Expected `--arg NAME=JSON`, such as steps=4 or 'prompt=\"a cat\"', got {text!r}."
        ) from error
