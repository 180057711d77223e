"""The calls that a detector of a pipeline is fitted on, and the batches that are made of them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.checks import items
from ood_monitor_integrations.diffusers.arguments import SAMPLE
from ood_monitor_integrations.diffusers.calls import parameters_of, size_of
from ood_monitor_integrations.diffusers.denoisers import (
    check_pipeline,
    denoiser_of,
    original_of,
)
from ood_monitor_integrations.diffusers.groups import adapters_in
from ood_monitor_integrations.diffusers.inputs import check_images, encoded, image_argument
from ood_monitor_integrations.diffusers.recorded_call import (
    RecordedCall,
    needs_image,
    record_call,
)
from ood_monitor_integrations.diffusers.replay import ReplayedBound

__all__ = [
    "Call",
    "Recording",
    "batch_of",
    "checked_calls",
    "first_samples",
    "held_out",
    "of_one_size",
    "own_samples",
]

#: Arguments of a pipeline's call.
Call: TypeAlias = Mapping[str, Any]

#: Samples that a pipeline is asked for at once where it can be.
_AT_ONCE = 16


@dataclass(frozen=True)
class Recording:
    """A call that was recorded.

    Attributes:
        found: What was recorded of it.
        arguments: Its arguments.
        images: What takes the place of its samples; None where these count themselves.
    """

    found: RecordedCall
    arguments: Call
    images: Any = None


def checked_calls(call: Call | Sequence[Call] | None, data: Any) -> list[dict[str, Any]]:
    """The arguments of calls that are made in turn.

    Raises:
        ValueError: None, or several with images, each batch of which has a call of its own.
        TypeError: Something else.
    """
    if call is None or isinstance(call, Mapping):
        return [dict(call or {})]
    found = items("call", call)
    if not all(isinstance(each, Mapping) for each in found):
        raise TypeError(f"Expected arguments of a call, or a list of such, got {call!r}.")
    if not found or (data is not None and len(found) > 1):
        raise ValueError(
            f"Expected several calls without images, got {len(found)}: give each batch of images "
            "with arguments of its own, `(images, {'height': ...})`."
        )
    return [dict(each) for each in found]


def held_out(
    pipe: Any, data: Iterable[Any], call: dict[str, Any], seed: int
) -> Iterator[Recording]:
    """A few steps of a call for each batch of held-out images, as `fit_pipeline` takes them."""
    check_pipeline(pipe)
    common: RecordedCall | None = None
    needs: bool | None = None
    adapters = ""
    for item in data:
        images, own = item if isinstance(item, tuple | list) and _is_pair(item) else (item, None)
        check_images(pipe, images)  # before the pipeline is called with them
        arguments = call | dict(own or {})
        needs = needs_image(pipe, arguments, seed) if needs is None else needs
        if needs:
            arguments = {image_argument(parameters_of(pipe)): images} | arguments
        # What does not depend on the batch is recorded once for the adapters that are on.
        before, adapters = adapters, adapters_in(original_of(denoiser_of(pipe)))
        is_same = own is None and arguments.keys() == call.keys() and adapters == before
        if common is None or not is_same:
            common = record_call(pipe, arguments, seed)
        yield Recording(common, arguments, images)


def _is_pair(item: Sequence[Any]) -> bool:
    return len(item) == 2 and isinstance(item[1], Mapping)


def own_samples(
    pipe: Any, calls: list[dict[str, Any]], seed: int, kept: int
) -> Iterator[Recording]:
    """Whole calls in turn, each with a seed of its own.

    Args:
        pipe: The pipeline.
        calls: Their arguments.
        seed: Of the first.
        kept: How many last steps of each are kept.

    Raises:
        ValueError: A call again, with another seed, gives the same samples.
    """
    check_pipeline(pipe)
    takes_size = "batch_size" in parameters_of(pipe)
    firsts = dict[int, Tensor]()
    for turn, (place, call) in enumerate(itertools.cycle(enumerate(calls))):
        size = {"batch_size": _AT_ONCE} if takes_size and "batch_size" not in call else {}
        found = record_call(pipe, call, seed + turn, "whole", kept=kept, if_taken=size)
        sample = found.call.sample
        if place in firsts and _are_same(firsts[place], sample):
            raise ValueError(
                "Expected samples that differ from call to call, got the same with seeds "
                f"{seed + turn - len(calls)} and {seed + turn}: the pipeline's noise is fixed "
                "by the call's arguments, such as `latents` or a `generator`, or drawn from a "
                "generator of its own: leave them out of `call`, have the pipeline take a "
                "`generator`, or fit on images."
            )
        firsts[place] = sample
        yield Recording(found, call)


def _are_same(a: Tensor, b: Tensor) -> bool:
    """But for what a device rounds by chance."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def batch_of(pipe: Any, adapter: ReplayedBound, recording: Recording) -> dict[str, Tensor]:
    """The samples of a call, or its images as such, with its conditions."""
    found = recording.found
    batch = adapter.batch(found.call, found.count)
    if recording.images is None:
        return batch
    size = size_of(pipe, recording.arguments)
    latents = encoded(pipe, recording.images, batch[SAMPLE][:1], size)
    return {SAMPLE: latents} | _expanded(batch, len(latents))


def _expanded(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The conditions of so many images, or of one for all of them."""
    given, batch = len(batch[SAMPLE]), {k: t for k, t in batch.items() if k != SAMPLE}
    if batch and given not in (1, count):
        raise ValueError(
            f"Expected a call's conditions for 1 or all {count} images of a batch, got {given}."
        )
    return {k: t.expand(count, *t.shape[1:]) if given == 1 else t for k, t in batch.items()}


def first_samples(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches up to so many samples."""
    left = samples
    for batch in batches:
        count = min(left, len(batch[SAMPLE]))
        yield map_tensors(lambda tensor, count=count: tensor[:count], batch)  # type: ignore[misc]
        left -= count
        if not left:
            return


def of_one_size(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, unless their samples come in several shapes.

    Raises:
        ValueError: They do.
    """
    shape = None
    for batch in batches:
        found = batch[SAMPLE].shape[1:]
        shape = found if shape is None else shape
        if found != shape:
            raise ValueError(
                f"Expected samples of one size, got {tuple(shape)} and {tuple(found)}: fit with "
                "any_size=True."
            )
        yield batch
