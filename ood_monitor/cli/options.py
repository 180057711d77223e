"""Arguments and options that several commands have, and what their texts mean."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ood_monitor.cli.models import Model, load_model
from ood_monitor.cli.recipe import RECIPE, Recipe, recipe_without_file
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
    "Split",
    "arguments_of",
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
        help="A folder of images, an .npz file, or a Hugging Face dataset on disk.",
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
        ValueError: A damaged file, or another model than the detector's.
    """
    own = model is not None and not (directory / RECIPE).exists()
    recipe = recipe_without_file(directory, str(model)) if own else Recipe.load(directory)
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
