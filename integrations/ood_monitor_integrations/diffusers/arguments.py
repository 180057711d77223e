"""A captured call as what belongs to each sample, a batch, and what to the call, its recipe."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ood_monitor.adapters.base import describe, tensors_in
from ood_monitor_integrations.diffusers.capture import Called, DenoiserCall, Step
from ood_monitor_integrations.diffusers.layouts import Layout, outputs_of
from ood_monitor_integrations.diffusers.reading import Place, Reading, sample_in, told_time
from ood_monitor_integrations.diffusers.rows import blocks_of, copy_at, pattern_of
from ood_monitor_integrations.diffusers.templates import Rows, alike, same, template

__all__ = ["BESIDE", "NULL_PREFIX", "SAMPLE", "Control", "Recipe", "taken_apart"]

#: Names in the batch: of the samples, and of what the denoiser is given beside them.
SAMPLE, BESIDE = "sample", "beside"

#: Before the name of a condition: the one that guidance takes for none.
NULL_PREFIX = "null."

#: What a denoiser remembers of the step before, which is another sample's here.
_CACHES = ("kv_cache", "kv_cache_mode")

#: Two copies of the samples, with the condition and without.
_GUIDED = 2


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet's call for a step.

    Attributes:
        place: Where it takes the sample and the time.
        arguments: The further ones, by name, with slots for tensors of the batch.
        outputs: Of its outputs, in their order, the denoiser's arguments that they are.
    """

    place: Place
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Recipe:
    """All of a call that does not belong to a sample.

    Attributes:
        reading: How the pipeline calls its denoiser.
        arguments: The denoiser's, by name, with slots for tensors of the batch.
        control: A ControlNet's call; None without one.
        time: The type of the time that the denoiser is told, if it is no whole number.
        output: Where the prediction stands in what the denoiser gives. Without its cache it may
            give more than it gave in the call.
    """

    reading: Reading
    arguments: Mapping[str, Any]
    control: Control | None
    time: torch.dtype | None
    output: Layout

    def check_same(self, other: "Recipe", *, of_another_size: bool = False) -> None:
        """Refuse another call's recipe if it differs.

        Args:
            other: The other call's.
            of_another_size: Whether its samples or conditions have other shapes. Its position ids
                and masks then have others too.

        Raises:
            ValueError: It does.
        """
        agree = alike if of_another_size else same
        pairs = [("", self.arguments, other.arguments)]
        if (self.control is None) != (other.control is None):
            raise ValueError(
                "Expected a call with a ControlNet as the detector was fitted, got one "
                f"{'without' if other.control is None else 'with'} it."
            )
        if self.control is not None and other.control is not None:
            pairs.append(("controlnet.", self.control.arguments, other.control.arguments))
        for prefix, mine, its in pairs:
            for key in dict.fromkeys([*mine, *its]):
                if not agree(mine.get(key), its.get(key)):
                    a, b = _told(mine.get(key)), _told(its.get(key))
                    raise ValueError(
                        f"Expected a call with the {prefix}{key} that the detector was fitted on, "
                        f"{a}, got {b}{' of other values' if a == b else ''}."
                    )


def taken_apart(
    reading: Reading,
    call: DenoiserCall,
    count: int,
    *,
    like: Recipe | None = None,
    constants: Collection[str] = (),
    with_null: bool = False,
) -> tuple[Recipe, dict[str, Tensor]]:
    """A captured call as its recipe and its batch.

    Args:
        reading: How the pipeline calls its denoiser.
        call: The call.
        count: B, the samples that the pipeline's call gave; guidance has doubled the denoiser's.
        like: Another call's recipe, which tells what belongs to rows where lengths do not.
        constants: Arguments that are the call's, though as long as it has rows.
        with_null: Whether to take the null conditions too, under names with ``NULL_PREFIX``.

    Returns:
        The recipe, and the batch: ``"sample"``, (B, ...) in single precision at least, and the
        denoiser's further tensors of each sample by name.

    Raises:
        ValueError: The denoiser was not given the scheduler's sample, or not its time; or null
            conditions are asked for and the call has none.
    """
    reading.check(call, count)
    step, found = call.last, dict[str, Tensor]()
    block = reading.block(step, count)
    recipe = _recipe(reading, step, block, count, found, like, constants)
    # In single precision: what the bound adds and subtracts is not the denoiser's arithmetic.
    precise = torch.promote_types(call.sample.dtype, torch.float32)
    # In one order, whatever the order in which a pipeline names them.
    batch = {SAMPLE: call.sample[:count].to(precise).detach().clone()} | dict(sorted(found.items()))
    if with_null:
        batch |= _nulls(reading, step, block, count, recipe)
    return recipe, batch


def _recipe(
    reading: Reading,
    step: Step,
    block: tuple[int, int],
    count: int,
    found: dict[str, Tensor],
    like: Recipe | None,
    constants: Collection[str] = (),
) -> Recipe:
    called, rows = copy_at(step, block, count)
    place = reading.place
    of_control = None if like is None else like.control
    control = _control(step, called, place.time, rows, found, of_control)
    own = () if control is None else control.outputs
    known = dict(called.arguments) if like is None else like.arguments
    known = {k: v for k, v in known.items() if like is not None or k in constants}
    arguments = _further(called, place, rows, "", found, known, without=(*own, *_CACHES))
    shape = step.stepped.shape[1:]
    beside = place.layout.beside(called.arguments[place.sample], shape)
    if beside is not None:
        found[BESIDE] = rows.of(beside)
    return Recipe(
        reading, arguments, control, _type_of(called.arguments[place.time]), reading.output
    )


def _type_of(time: Any) -> torch.dtype | None:
    if isinstance(time, Tensor):
        return time.dtype if time.is_floating_point() else None
    return torch.float32 if isinstance(time, float) else None


def _further(
    called: Called,
    place: Place,
    rows: Rows,
    prefix: str,
    found: dict[str, Tensor],
    like: Mapping[str, Any],
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The arguments beside the sample and the time, with slots for what belongs to rows."""
    return {
        name: template(value, rows, prefix + name, found, like.get(name))
        for name, value in called.arguments.items()
        if name not in (place.sample, place.time, *without)
    }


def _control(
    step: Step,
    called: Called,
    time: str,
    rows: Rows,
    found: dict[str, Tensor],
    like: Control | None,
) -> Control | None:
    """The ControlNet's call, and which of the denoiser's arguments it gives; None without one.

    Raises:
        ValueError: The pipeline changes what it gave.
    """
    control = step.control
    if control is None:
        return None
    outputs = outputs_of(control.output)
    names = [_argument_of(output, called) for output in outputs]
    if None in names:
        raise ValueError(
            "Expected a ControlNet whose outputs are the denoiser's arguments as they are, got one "
            "whose outputs are changed (`guess_mode`), so that they cannot be replayed."
        )
    name, layout, _ = sample_in([(step, control)])
    place = Place(name, layout, told_time(control, called.arguments[time], time))
    size = len(layout.taken(control.arguments[name], step.stepped.shape[1:]))
    # It may be called for the rows with the condition alone.
    own = Rows(size, 0, rows.count) if size != rows.total else rows
    known = {} if like is None else like.arguments
    given = _further(control, place, own, "controlnet.", found, known)
    return Control(place, given, tuple(each for each in names if each is not None))


def _argument_of(output: Any, called: Called) -> str | None:
    """The argument that is a ControlNet's output; empty of an output that is none."""
    mine = list(tensors_in(output))
    if not mine:
        return ""
    for name, value in called.arguments.items():
        its = list(tensors_in(value))
        if len(its) == len(mine) and all(map(_is_same_tensor, mine, its)):
            return name
    return None


def _is_same_tensor(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _nulls(
    reading: Reading, step: Step, block: tuple[int, int], count: int, recipe: Recipe
) -> dict[str, Tensor]:
    """The rows without the condition, of what guidance has doubled."""
    pattern = pattern_of(step, count)
    blocks = blocks_of(pattern)
    found: dict[str, Tensor] = {}
    if len(blocks) == _GUIDED:
        [other] = [each for each in blocks if each != block]
        recipe.check_same(_recipe(reading, step, other, count, found, recipe))
    if not found:
        raise ValueError(
            "Expected a guided call, whose denoiser is given a null condition beside each sample's "
            f"own, for condition_check=True, got denoiser calls of {pattern} times the samples: "
            "pass `call=` with guidance, or leave out the check."
        )
    return {NULL_PREFIX + name: each for name, each in sorted(found.items())}


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {', '.join(map(_told, value))}"
    return describe(value) if isinstance(value, Tensor | Mapping) else repr(value)
