"""Models by the name of a function or of a pipeline's folder, and batches as they take them."""

import importlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.cli.recipe import Recipe
from ood_monitor.detector.detector import Detector
from ood_monitor.importing import importable_here, imported
from ood_monitor.modules import dtype_of

__all__ = ["Model", "load_model"]


class Model(Protocol):
    """A model that samples are given to."""

    @property
    def adapter(self) -> Adapter:
        """To load a saved detector with."""

    def fit(self, images: Iterable[Tensor], samples: int, **options: Any) -> Detector:
        """A detector fitted on at most so many samples (B, ...), with options of Detector."""

    def batch(self, images: Tensor) -> Batch:
        """Samples (B, ...) as the detector takes them."""


def load_model(recipe: Recipe, device: str | None = None) -> Model:
    """The model of a recipe.

    Args:
        recipe: How it is made.
        device: Where it computes; by default an adapter where its function puts it, and a pipeline
            on the GPU if there is one.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: The function does not say that it returns an adapter.
        ValueError: As :func:`~ood_monitor.importing.imported`, or levels for an adapter without.
    """
    if recipe.kind == "adapter":
        return Imported(recipe, device)
    return _pipeline(recipe, device)


class Imported:
    """The adapter that a user's function returns."""

    def __init__(self, recipe: Recipe, device: str | None) -> None:
        self._adapter, self._recipe = _made(recipe), recipe
        if device is not None:
            self._adapter.module.to(device)

    @property
    def adapter(self) -> Adapter:
        """The user's, at the recipe's levels."""
        return self._adapter

    def fit(self, images: Iterable[Tensor], samples: int, **options: Any) -> Detector:
        """As :meth:`Model.fit`; there are no more samples than that."""
        progress = options.pop("progress")
        layers = None if self._recipe.layers is None else list(self._recipe.layers)
        detector = Detector(self._adapter, layers=layers, **options)
        return detector.fit((self.batch(batch) for batch in images), progress=progress)

    def batch(self, images: Tensor) -> Tensor:
        """The samples, in the model's precision."""
        floating = images.is_floating_point()
        return images.to(dtype_of(self._adapter.module)) if floating else images


def _pipeline(recipe: Recipe, device: str | None) -> Model:
    try:
        importlib.import_module("diffusers")
        from ood_monitor.cli.pipelines import Pipeline
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected diffusers to load {recipe.model}: pip install 'ood-monitor[diffusers]' "
            f"({error})."
        ) from error
    return Pipeline(recipe, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _made(recipe: Recipe) -> Adapter:
    name = str(recipe.model)
    with importable_here():
        adapter = imported(name, Adapter)(**recipe.arguments)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"Expected {name} to return an Adapter, got {type(adapter).__name__}.")
    if recipe.levels is None:
        return adapter
    if not hasattr(adapter, "with_levels"):
        raise ValueError(f"Expected an adapter with noise levels, got {type(adapter).__name__}.")
    found: Adapter = adapter.with_levels(recipe.levels)
    return found
