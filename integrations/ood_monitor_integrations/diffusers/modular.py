"""Modular pipelines: a block that watches the block that denoises."""

import copy
from typing import Any

from diffusers import ModularPipelineBlocks
from diffusers.modular_pipelines import OutputParam

from ood_monitor import Monitor, Scores
from ood_monitor.checks import flag
from ood_monitor.processes import Lock
from ood_monitor_integrations.diffusers.hook import watcher_of
from ood_monitor_integrations.diffusers.pipeline_monitor import PipelineMonitor

__all__ = ["OODBlock"]


class OODBlock(ModularPipelineBlocks):
    """A denoising block, watched: it does the same, and adds ``ood`` to the pipeline's state.

    To put in the place of the block that it is made of, before the one that decodes; on its own
    there it would see latents, but not the conditioning that they were made with:

        blocks.sub_blocks["denoise"] = OODBlock(blocks.sub_blocks["denoise"], monitor)
        pipe = blocks.init_pipeline()
        pipe(prompt=..., output=["images", "ood"])

    Args:
        denoise: The block.
        monitor: A monitor of a detector of the pipeline's denoiser.
        raise_on_error: Raise what scoring raises, for tests.
    """

    def __init__(self, denoise: Any, monitor: Monitor, *, raise_on_error: bool = False) -> None:
        self._denoise, self._monitor = denoise, monitor
        self._raise_on_error = flag("raise_on_error", raise_on_error)
        self._watcher: PipelineMonitor | None = None
        self._lock = Lock()
        super().__init__()  # type: ignore[no-untyped-call]
        self.sub_blocks = denoise.sub_blocks

    def __deepcopy__(self, memo: Any) -> "OODBlock":
        """With a denoising block of its own, and the same monitor: pipelines copy their blocks."""
        denoise = copy.deepcopy(self._denoise, memo)
        return OODBlock(denoise, self._monitor, raise_on_error=self._raise_on_error)

    @property
    def model_name(self) -> Any:
        """The denoising block's."""
        return self._denoise.model_name

    @property
    def description(self) -> str:
        """The denoising block's, and what is added."""
        return f"{self._denoise.description}\nWatched: adds `ood`, the scores of the latents."

    @property
    def expected_components(self) -> Any:
        """The denoising block's."""
        return self._denoise.expected_components

    @property
    def expected_configs(self) -> Any:
        """The denoising block's."""
        return self._denoise.expected_configs

    @property
    def inputs(self) -> Any:
        """The denoising block's."""
        return self._denoise.inputs

    @property
    def intermediate_outputs(self) -> Any:
        """The denoising block's, and the scores."""
        scores = OutputParam("ood", type_hint=Scores, description="Scores of the latents.")  # type: ignore[no-untyped-call]
        return [*self._denoise.intermediate_outputs, scores]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Denoise, watched."""
        (components, state), scores = self._watching(components).run(
            components, lambda _: self._denoise(components, state), lambda _, stepped: len(stepped)
        )
        state.set("ood", scores.get("outputs"))
        return components, state

    def _watching(self, components: Any) -> PipelineMonitor:
        with self._lock:
            if self._watcher is None:
                self._watcher = watcher_of(
                    components,
                    self._monitor,
                    mode="sync",
                    raise_on_error=self._raise_on_error,
                )
            return self._watcher
