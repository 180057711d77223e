"""Adapters of diffusers pipelines, as functions for the flavour's ``log_model`` to name.

A pipeline is a folder that is copied into the model, or a name on the Hub with its revision::

    flavour.log_model(
        detector,
        "detector",
        factory="ood_monitor_integrations.mlflow.pipelines:denoising_bound",
        files={"folder": "pipelines/ddpm"},  # or arguments={"name": ..., "revision": ...}
        arguments={"levels": [20, 100, 300, 500]},
        weights=False,
    )

Weights are read from safetensors alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from diffusers import DiffusionPipeline

from ood_monitor import DenoisingBound
from ood_monitor.checks import path_of, text
from ood_monitor_integrations.diffusers import replayed_bound
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from ood_monitor_integrations.diffusers.replay import LEVELS, SEED, ReplayedBound

__all__ = ["denoising_bound", "replayed"]


def denoising_bound(
    folder: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> DenoisingBound:
    """The bound of a pipeline's denoiser without conditions, on its own schedule.

    Args:
        folder: Of the pipeline; or its name.
        name: On the Hub.
        revision: Its commit.
        **options: Of :class:`~ood_monitor.DenoisingBound`: ``levels``, ``loss``, ``seed``, ...
    """
    pipe = _pipeline(folder, name, revision)
    return DenoisingBound(denoiser_of(pipe), pipe.scheduler, **options)


def replayed(
    folder: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    call: Mapping[str, Any] | None = None,
    levels: Sequence[int] = LEVELS,
    ratios: Literal[2, 3] | Sequence[float] = 2,
    condition_check: bool = False,
    seed: int = SEED,
) -> ReplayedBound:
    """What :func:`~ood_monitor_integrations.diffusers.fit_pipeline` made; arguments as there.

    Args:
        folder: Of the pipeline; or its name.
        name: On the Hub.
        revision: Its commit.
        call: Arguments of a call, JSON-able.
        levels: Those that the detector was fitted at.
        ratios: As of the fit.
        condition_check: As of the fit.
        seed: That of the fit.
    """
    pipe = _pipeline(folder, name, revision)
    return replayed_bound(
        pipe, call=call, levels=levels, ratios=ratios, condition_check=condition_check, seed=seed
    )


def _pipeline(folder: str | None, name: str | None, revision: str | None) -> Any:
    if (folder is None) == (name is None):
        raise ValueError(f"Expected a folder or a name, got {folder!r} and {name!r}.")
    for given, value in (("name", name), ("revision", revision)):
        if value is not None:
            text(given, value)
    where = name if folder is None else str(path_of("folder", folder))
    load = cast(Any, DiffusionPipeline).from_pretrained
    return load(where, revision=revision, use_safetensors=True, low_cpu_mem_usage=False)
