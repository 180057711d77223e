"""diffusers pipelines by their folder. Imported when one is asked for."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from ood_monitor_integrations.diffusers import fit_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.arguments import SAMPLE
from ood_monitor_integrations.diffusers.calls import parameters_of, size_of
from ood_monitor_integrations.diffusers.inputs import encoded, image_argument
from ood_monitor_integrations.diffusers.recorded_call import (
    RecordedCall,
    needs_image,
    record_call,
)
from ood_monitor_integrations.diffusers.replay import LEVELS, SEED, ReplayedBound
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.cli.recipe import Recipe
from ood_monitor.detector.detector import Detector

__all__ = ["Pipeline"]


class Pipeline:
    """A pipeline, its bound, and the conditions of its call."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        pipe = _loaded(str(recipe.model))
        self._pipe, self._recipe = pipe.to(device), recipe
        self._seed = SEED + recipe.seed  # never one that a user's own samples begin with
        self._options: dict[str, Any] = {
            "call": recipe.arguments,
            "levels": recipe.levels or LEVELS,
            "seed": self._seed,
        }
        self._layers = None if recipe.layers is None else list(recipe.layers)
        self._bound: ReplayedBound | None = None
        self._recorded: RecordedCall | None = None
        self._needs: bool | None = None

    @property
    def adapter(self) -> Adapter:
        """The pipeline's denoising bound."""
        return self._replayed()

    def fit(self, images: Iterable[Tensor], samples: int, **options: Any) -> Detector:
        """As :meth:`~ood_monitor.cli.models.Model.fit`."""
        options.pop("seed")  # of the split, which a pipeline's detector has at 0
        options |= self._options | {"layers": self._layers}
        return fit_pipeline(self._pipe, images, samples=samples, **options)

    def batch(self, images: Tensor) -> Batch:
        """Images (B, C, H, W) in [0, 1] as latents, with the conditions of the call."""
        arguments = self._arguments(images)
        if self._recorded is None or arguments.keys() != self._recipe.arguments.keys():
            self._recorded = record_call(self._pipe, arguments, self._seed)
        batch = self._replayed().batch(self._recorded.call, self._recorded.count)
        size = size_of(self._pipe, arguments)
        latents = encoded(self._pipe, images, batch[SAMPLE][:1], size)
        count = len(latents)
        conditions = {k: _expanded(t, count) for k, t in batch.items() if k != SAMPLE}
        return {SAMPLE: latents} | conditions

    def _replayed(self) -> ReplayedBound:
        if self._bound is None:
            self._bound = replayed_bound(self._pipe, **self._options)
        return self._bound

    def _arguments(self, images: Tensor) -> dict[str, Any]:
        """Of a call, with the images where the pipeline asks for the user's."""
        arguments = dict(self._recipe.arguments)
        if self._needs is None:
            self._needs = needs_image(self._pipe, arguments, self._seed)
        if not self._needs:
            return arguments
        return {image_argument(parameters_of(self._pipe)): images} | arguments


def _loaded(folder: str) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    with ExitStack() as stack:
        if logging.is_progress_bar_enabled() and not sys.stderr.isatty():
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        # Safetensors alone: other weights are pickles.
        pipe = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _expanded(condition: Tensor, count: int) -> Tensor:
    if len(condition) == count:
        return condition
    if len(condition) != 1:
        raise ValueError(f"Expected a call for 1 or {count} images, got one for {len(condition)}.")
    return condition.expand(count, *condition.shape[1:])
