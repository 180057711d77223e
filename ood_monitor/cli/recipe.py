"""How a detector's model is made: `model.json`, beside the detector's own files."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ood_monitor.cli.files import open_regular
from ood_monitor.cli.images import ImageFormat
from ood_monitor.importing import check_name, is_name
from ood_monitor.saving.fitted import CONFIG, Fitted
from ood_monitor.saving.format import sample_of

__all__ = ["RECIPE", "Kind", "Recipe", "check_images", "kind_of", "recipe_without_file"]

RECIPE = "model.json"

Kind = Literal["adapter", "pipeline"]

_FORMAT = 1

#: Of the file, at most: it holds names and arguments.
_MOST_BYTES = 2**24

#: The term of a noise level.
_LEVEL = re.compile(r"t=\d+")


@dataclass(frozen=True)
class Recipe:
    """How a model is made, and how its samples are read.

    Attributes:
        kind: A function that makes an adapter, or a folder of a diffusers pipeline.
        model: ``"package.module:function"`` or the folder, as it was given; None in a detector
            that came from elsewhere.
        arguments: Keywords of the function, or of the pipeline's call.
        levels: Noise levels, if they were chosen.
        layers: Name patterns of the parameters that are features; all if None.
        seed: Of the pipeline's noise.
        images: How images are read.
    """

    kind: Kind
    model: str | None
    arguments: dict[str, Any]
    levels: tuple[int, ...] | None
    layers: tuple[str, ...] | None
    seed: int
    images: ImageFormat

    def save(self, directory: Path) -> None:
        """Write :data:`RECIPE`."""
        (directory / RECIPE).write_text(self.to_json())

    def to_json(self) -> str:
        """One JSON object."""
        record = {
            "format": _FORMAT,
            "kind": self.kind,
            "model": self.model,
            "arguments": self.arguments,
            "levels": self.levels,
            "layers": self.layers,
            "seed": self.seed,
            "images": self.images.settings(),
        }
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read :data:`RECIPE`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or of a newer format.
        """
        path = directory / RECIPE
        if not path.exists():
            raise FileNotFoundError(
                f"Expected {RECIPE} in {directory}, as `ood-monitor fit` writes it, or `--model`, "
                "got none."
            )
        with open_regular(path, _MOST_BYTES) as file:
            return cls.parse(file.read(), str(path))

    @classmethod
    def parse(cls, text: str | bytes, name: str = RECIPE) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: Something else.
        """
        try:
            return cls._of(json.loads(text))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"Expected how a model is made in {name}, got {cause}.") from error

    @classmethod
    def _of(cls, record: dict[str, Any]) -> Self:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r}, where this release reads {_FORMAT}")
        if record["kind"] not in get_args(Kind):
            raise ValueError(f"kind {record['kind']!r}")
        return cls(
            kind=record["kind"],
            model=None if record["model"] is None else str(record["model"]),
            arguments={str(k): v for k, v in record["arguments"].items()},
            levels=_whole(record["levels"]),
            layers=None if record["layers"] is None else tuple(map(str, record["layers"])),
            seed=int(record["seed"]),
            images=ImageFormat.parse(record["images"]),
        )

    def shareable(self) -> Self:
        """Without what is only true here, or is nobody's business: paths, a function's arguments.

        A folder from elsewhere must not say what code is run here, so none is loaded with it.
        """
        arguments = self.arguments if self.kind == "pipeline" else {}
        return replace(self, model=None, arguments=arguments)

    def overridden(self, model: str | None, arguments: dict[str, Any]) -> Self:
        """With another model, and with arguments in the place of those of the same name.

        Raises:
            ValueError: It names no model, and none was given.
        """
        if model is None and self.model is None:
            what = "a pipeline's folder" if self.kind == "pipeline" else "package.module:function"
            raise ValueError(f"Expected `--model` to give {what}: this detector came without.")
        if model is not None and kind_of(model) != self.kind:
            raise ValueError(f"Expected `--model` of kind {self.kind}, got {model!r}.")
        return replace(self, model=model or self.model, arguments=self.arguments | arguments)


def recipe_without_file(directory: Path, model: str) -> Recipe:
    """What a detector's own files say of a model, for one that `fit` did not write.

    Raises:
        OSError: A file is missing.
        ValueError: A file is damaged, or the model is none.
    """
    fitted, options = Fitted.load(directory)
    kind, terms = kind_of(model), map(str, fitted.provenance.adapter.get("terms") or ())
    levels = tuple(int(term[2:]) for term in terms if _LEVEL.fullmatch(term))
    layers = options.get("layers")
    return Recipe(
        kind=kind,
        model=model,
        arguments={},
        levels=levels or None if kind == "pipeline" else None,
        layers=(layers,) if isinstance(layers, str) else None if layers is None else tuple(layers),
        seed=0,
        images=_images(fitted.samples) if kind == "adapter" else ImageFormat(),
    )


def kind_of(model: str) -> Kind:
    """What a text on the command line means.

    Raises:
        ValueError: Nothing that is known.
    """
    if os.path.isfile(os.path.join(model, "model_index.json")):
        return "pipeline"
    if is_name(model):
        check_name(model)
        return "adapter"
    raise ValueError(
        "Expected a diffusers pipeline's folder (with model_index.json) or an importable "
        f"package.module:function that returns an adapter, got {model!r}."
    )


def check_images(recipe: Recipe, directory: Path) -> None:
    """Refuse images of another size than the samples that the detector was fitted on.

    A pipeline makes its own samples of images of any size.

    Raises:
        OSError: A file of the detector is missing.
        ValueError: A damaged file, or two that do not belong together.
    """
    said = recipe.images
    if recipe.kind != "adapter" or said.mode is None or said.size is None:
        return
    shape = _shape(Fitted.load(directory)[0].samples)
    if shape is not None and said.shape != shape:
        raise ValueError(
            f"Expected images of one size in {RECIPE} and {CONFIG} of {directory}, got "
            f"{said.shape} in the one and {shape} in the other: one was changed, or is of another "
            "detector."
        )


def _images(samples: Sequence[str]) -> ImageFormat:
    """Those of so many channels, and of that size, if samples are images."""
    return ImageFormat().like(_shape(samples) or [])


def _shape(samples: Sequence[str]) -> tuple[int, ...] | None:
    """Of a sample, if it is one tensor of one shape."""
    return sample_of(samples[0])[0] if len(samples) == 1 else None


def _whole(values: Sequence[Any] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(value) for value in values)
