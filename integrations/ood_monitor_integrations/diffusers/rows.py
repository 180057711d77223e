"""Which rows of a denoiser's batch have the condition, read off what the scheduler was told.

Guidance makes of several predictions one, most often by a weighted sum: of weights that add up to
1, or to -1 where a pipeline turns the sign. The condition has the one that is 1 or more.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ood_monitor.adapters.base import tensors_in
from ood_monitor_integrations.diffusers.capture import Called, Step
from ood_monitor_integrations.diffusers.layouts import Layout, layouts_of, prediction_in
from ood_monitor_integrations.diffusers.templates import Rows, template

__all__ = [
    "Guidance",
    "blocks_of",
    "copy_at",
    "differ",
    "guidance_of",
    "matching",
    "pattern_of",
]

#: Above it, rows hardly differ, and their weights are not told apart.
_LARGEST_CONDITION = 1e4

#: What a sum may leave of the prediction, and how far its weights may be from 1 together: by
#: single precision, and by 16 bits.
_LEFT = {4: 1e-3, 2: 2e-2}

#: Of each prediction, about so many numbers are looked at, that a call need not wait for it.
_NUMBERS = 1 << 15

#: By how much the largest weight may be below 1, and the others above 0.
_SLACK = 0.05

#: Dimensions of samples that are videos: rows, channels, frames, height and width.
_OF_VIDEOS = 5

#: Calls of the denoiser for a step, each by how many times it has the rows of the samples.
Pattern = tuple[int, ...]


@dataclass(frozen=True)
class Guidance:
    """How a step's prediction comes from what the denoiser gave.

    Attributes:
        output: Where the prediction stands in that.
        sign: 1, or -1 where the pipeline turns it.
        block: The call, and which of its copies of the samples, with the condition.
    """

    output: Layout
    sign: int
    block: tuple[int, int]


def pattern_of(step: Step, count: int) -> Pattern:
    """How often each call for a step has the rows of so many samples.

    Raises:
        ValueError: A call has other rows.
    """
    found = tuple(divmod(len(prediction_in(call.output)), count) for call in step.calls)
    if any(rest or not copies for copies, rest in found):
        rows = [len(prediction_in(call.output)) for call in step.calls]
        raise ValueError(f"Expected a multiple of the call's {count} samples, got {rows} rows.")
    return tuple(copies for copies, _ in found)


def blocks_of(pattern: Pattern) -> list[tuple[int, int]]:
    """Each copy of the samples: its call, and its place there."""
    return [(call, copy) for call, copies in enumerate(pattern) for copy in range(copies)]


def copy_at(step: Step, block: tuple[int, int], count: int) -> tuple[Called, Rows]:
    """A call that a copy of the samples is in, and its rows there."""
    call, copy = block
    shape = step.stepped.shape
    frames = shape[2] if len(shape) == _OF_VIDEOS else 1
    total = pattern_of(step, count)[call] * count
    return step.calls[call], Rows(total, copy * count, count, frames)


def guidance_of(steps: Sequence[Step], count: int) -> Guidance | None:
    """The guidance of steps with the last one's calls, all of them by the same weights.

    None if their predictions are no such sum, or do not tell which of the rows have the condition.

    Raises:
        ValueError: The denoiser's rows are not those of the samples.
    """
    pattern = pattern_of(steps[-1], count)
    alike = [s for s in steps if s.calls and pattern_of(s, count) == pattern]
    shape, sizes = steps[-1].stepped.shape[1:], _sizes(steps[-1])
    alike = [s for s in alike if _sizes(s) == sizes]  # a cache may shorten what comes later
    found = []
    for layout in layouts_of(prediction_in(steps[-1].calls[0].output), shape):
        weights, left = _weights(alike, count, layout)
        if weights is not None:
            found.append((left, layout, weights))
    if not found:
        return None
    left, layout, weights = min(found, key=lambda each: each[0])
    sign = 1 if weights.sum() > 0 else -1
    best = int((sign * weights).argmax())
    largest, *others = (sign * weights).sort(descending=True).values.tolist()
    if largest < 1 - _SLACK or any(weight > _SLACK for weight in others):
        return None  # weak guidance, which says little of which rows it is by
    return Guidance(layout, sign, blocks_of(pattern)[best])


def _sizes(step: Step) -> list[int]:
    return [sum(t.numel() for t in tensors_in(prediction_in(c.output))) for c in step.calls]


def _weights(steps: Sequence[Step], count: int, layout: Layout) -> tuple[Tensor | None, float]:
    """Of each copy of the samples, and what their sum leaves as a share; None if it is no sum."""
    shape = steps[-1].stepped.shape[1:]
    rows, told = [], []
    for step in steps:
        outputs = (layout.taken(prediction_in(call.output), shape) for call in step.calls)
        copies = [copy for output in outputs for copy in torch.split(output, count)]
        rows.append(torch.stack([_some(copy) for copy in copies]))
        # Of a learned variance's channels the first half.
        told.append(_some(step.prediction[:count, : shape[0]]))
    a, y = torch.cat(rows, 1), torch.cat(told)
    if not (a.isfinite().all() and y.isfinite().all()) or not y.any():
        return None, 0.0
    # By the few products of the rows with each other: double precision bears the squared condition.
    scales = a.norm(dim=1).clamp_min(1e-300)
    products = (a @ a.T) / scales.outer(scales)
    spread = torch.linalg.eigvalsh(products)
    if spread[-1] > _LARGEST_CONDITION**2 * spread[0]:
        return None, 0.0
    weights = torch.linalg.solve(products, (a @ y) / scales) / scales
    left = float((weights @ a - y).norm() / y.norm())
    limit = _LEFT[max(2, min(4, _precision(steps[-1])))]
    is_sum = left <= limit and abs(abs(float(weights.sum())) - 1) <= 10 * limit
    return (weights if is_sum else None), left


def _precision(step: Step) -> int:
    """Bytes of the numbers that guidance was computed in, at least."""
    outputs = [prediction_in(call.output) for call in step.calls]
    return min(tensor.element_size() for tensor in tensors_in([step.prediction, outputs]))


def _some(tensor: Tensor) -> Tensor:
    """Numbers of all samples alike, as many as tell a few weights."""
    flat = tensor.detach().flatten()
    return _flat(flat[:: max(1, len(flat) // _NUMBERS)])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64).flatten()


def matching(
    step: Step, unguided: Step, count: int, sample: str, layout: Layout
) -> tuple[int, int] | None:
    """Which rows of a guided step have the conditions that an unguided one has.

    None if its calls have other arguments, or no rows alone have these.

    Args:
        step: With guidance.
        unguided: Without.
        count: B.
        sample: The argument with the sample, which is another in each.
        layout: Where it stands there; what stands beside it is a condition.
    """
    step, unguided = (_without_sample(each, sample, layout) for each in (step, unguided))
    [alone], found = _conditions(unguided, count), _conditions(step, count)
    names = [n for n in alone if all(n in each for each in found)]
    # What all rows have says nothing.
    telling = [
        n for n in names if not all(_equal(a[n], b[n]) for a, b in itertools.pairwise(found))
    ]
    pairs = zip(blocks_of(pattern_of(step, count)), found, strict=True)
    hits = [block for block, own in pairs if all(_equal(own[n], alone[n]) for n in telling)]
    return hits[0] if telling and len(hits) == 1 else None


def differ(step: Step, count: int, sample: str, layout: Layout) -> bool:
    """Whether copies of the samples in a step's calls have conditions that differ."""
    found = _conditions(_without_sample(step, sample, layout), count)
    pairs = itertools.pairwise(found)
    return any(a.keys() != b.keys() or not all(_equal(a[n], b[n]) for n in a) for a, b in pairs)


def _without_sample(step: Step, sample: str, layout: Layout) -> Step:
    shape = step.stepped.shape[1:]
    calls = [
        replace(c, arguments={**c.arguments, sample: layout.beside(c.arguments[sample], shape)})
        for c in step.calls
    ]
    return replace(step, calls=tuple(calls))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(_flat(a), _flat(b), rtol=1e-3, atol=1e-6)


def _conditions(step: Step, count: int) -> list[dict[str, Tensor]]:
    """Of each copy of the samples, the tensors with its rows but for numbers and the sample."""
    found = []
    for block in blocks_of(pattern_of(step, count)):
        own: dict[str, Tensor] = {}
        called, rows = copy_at(step, block, count)
        for name, value in called.arguments.items():
            template(value, rows, name, own)
        found.append(own)
    return found
