"""`ood-monitor fit`: from a model and held-out data to a detector's folder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from ood_monitor.cli.console import AsJson, Debug, Progress, checked, print_facts, wants_progress
from ood_monitor.cli.data import Samples, batches, open_samples
from ood_monitor.cli.images import ImageFormat
from ood_monitor.cli.models import load_model
from ood_monitor.cli.options import (
    Argument,
    BatchSize,
    Data,
    Device,
    Fpr,
    Key,
    Split,
    arguments_of,
    size_of,
)
from ood_monitor.cli.recipe import Recipe, kind_of
from ood_monitor.cli.showing import facts_of
from ood_monitor.densities.parts import Method
from ood_monitor.gradients import Granularity
from ood_monitor.saving.fitted import CONFIG

__all__ = ["fit"]


@checked
def fit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers pipeline's folder, or package.module:function that returns an "
            "Adapter; the current directory is importable.",
        ),
    ],
    data: Data,
    directory: Annotated[Path, typer.Argument(metavar="DETECTOR", help="The folder to write.")],
    argument: Argument = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="PATTERN",
            help="Parameters that become features, such as 'up_blocks.3.*'. Repeat for more; by "
            "default all are.",
        ),
    ] = None,
    levels: Annotated[
        list[int] | None,
        typer.Option(
            "--level",
            min=0,
            help="A noise level of a diffusion model, which costs a pass. Repeat for more; by "
            "default a pipeline has 20, 100, 300 and 500.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Take at most so many, at random; half of them calibrate.")
    ] = 1000,
    fpr: Fpr = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random draw.")] = 0,
    batch_size: BatchSize = 32,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per pass, to bound memory.")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="Gradient norms by layer, as in the paper; what one forward pass gives; or both. "
            "By default what was best in measurements: forward for images, sequences and rows of "
            "a table, if the adapter says what they are, and gradient norms for pipelines."
        ),
    ] = None,
    granularity: Annotated[
        Granularity,
        typer.Option(help="One feature for each tensor, or for each of its rows or columns."),
    ] = "tensor",
    key: Key = None,
    split: Split = None,
    mode: Annotated[
        Literal["L", "RGB"] | None,
        typer.Option(help="Images in grey or colour; by default as the first one."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Resize images; by default other sizes are refused."),
    ] = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a detector that is there.")
    ] = False,
    progress: Progress = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Fit a detector on data that the model was NOT trained on.

    Images are given to an adapter as tensors (B, C, H, W) in [0, 1], and to a pipeline by its own
    image processor. The detector's folder also says how its model is made (model.json), so that the
    other commands need nothing else.

    \b
    Examples:
        ood-monitor fit runs/pipeline data/held_out runs/detector
        ood-monitor fit runs/sd data/held_out runs/detector --arg 'prompt="a cat"' --level 500
        ood-monitor fit digits:adapter held_out.npz runs/detector --arg 'checkpoint="flow.pt"'

    where digits.py has

    \b
        def adapter(checkpoint: str) -> ood_monitor.Adapter:
            flow = ...
            return ood_monitor.LogLikelihood(flow)
    """
    _check_free(directory, overwrite=overwrite)
    kind = kind_of(model)
    whole = size_of(size)
    images = ImageFormat(mode, whole, whole is not None)
    source = open_samples(data, images, key=key, split=split)
    chosen = _chosen(source, samples, seed)
    _check_fpr(fpr, len(chosen))
    recipe = Recipe(
        kind=kind,
        model=model,
        arguments=arguments_of(argument),
        levels=tuple(levels) if levels else None,
        layers=tuple(layers) if layers else None,
        seed=seed,
        images=source.images,
    )
    loaded = load_model(recipe, device)
    detector = loaded.fit(
        batches(source, chosen, batch_size),
        samples,
        seed=seed,
        method=method,
        chunk_size=chunk_size,
        granularity=granularity,
        progress=wants_progress(progress),
    )
    detector.save_pretrained(directory)
    recipe.save(directory)
    facts: dict[str, Any] = {"detector": str(directory), **facts_of(detector.fitted)}
    print_facts(facts, as_json=as_json)


def _check_free(directory: Path, *, overwrite: bool) -> None:
    if (directory / CONFIG).exists() and not overwrite:
        raise FileExistsError(
            f"Expected a new folder, got a detector in {directory}: `--overwrite` replaces it."
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to, got the file {directory}.")


def _chosen(source: Samples, samples: int, seed: int) -> Sequence[int]:
    """At random, in random order: files sorted by class are not exchangeable as they come."""
    order = np.random.default_rng(seed).permutation(len(source.ids))
    return [int(i) for i in order[:samples]]


def _check_fpr(fpr: float, count: int) -> None:
    """Before hours of fitting, what the detector would say after them."""
    if not 0 < fpr < 1:
        raise ValueError(f"Expected a false-positive rate in (0, 1), got {fpr}.")
    calibration = round(count / 2)
    if 1 / (calibration + 1) > fpr:
        needed = 2 * (math.ceil(1 / fpr) - 1)
        raise ValueError(
            f"Expected at least {needed} samples for `--fpr {fpr:g}`, half of which calibrate, got "
            f"{count}."
        )
