"""A denoiser's call, taken apart: what belongs to each sample, and what to the call.

Embeddings, labels and masks have a row a sample and go into the batch. Position ids, flags and
scales are the call's, as is how the denoiser is told the time: together they are the recipe.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import describe, map_tensors
from ood_monitor_integrations.diffusers.capture import DenoiserCall, sample_argument
from ood_monitor_integrations.diffusers.families import Family, family_of

__all__ = ["BESIDE", "NULL_PREFIX", "SAMPLE", "Recipe", "filled", "taken_apart"]

#: Names in the batch: of the samples, and of what the denoiser is given beside them as channels.
SAMPLE, BESIDE = "sample", "beside"

#: Before the name of a condition: the one that guidance takes for none.
NULL_PREFIX = "null."

#: Arguments that a replay gives itself.
_GIVEN = ("timestep", "return_dict")

#: How far a denoiser's input may be from a multiple of the scheduler's sample, and its time from
#: the scheduler's: rounding in 16 bits.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of the batch goes."""

    name: str


@dataclass(frozen=True, eq=False)
class Recipe:
    """All of a call that does not belong to a sample.

    Attributes:
        arguments: The denoiser's, by name, with slots for tensors of the batch.
        control: A ControlNet's, likewise; None without one.
        divisor: The denoiser is told the scheduler's time divided by this.
        beside: The dimension along which the denoiser's input goes on after the sample, if it does.
    """

    arguments: Mapping[str, Any]
    control: Mapping[str, Any] | None
    divisor: int
    beside: int | None

    def check_same(self, other: "Recipe") -> None:
        """Refuse another call's recipe if it differs.

        Raises:
            ValueError: It does.
        """
        for name in ("arguments", "control", "divisor", "beside"):
            mine, its = getattr(self, name), getattr(other, name)
            for key in _keys(mine, its):
                if not _same(_item(mine, key), _item(its, key)):
                    raise ValueError(
                        f"Expected a call with the {key or name} that the detector was fitted on, "
                        f"{_told(_item(mine, key))}, got {_told(_item(its, key))}."
                    )


def taken_apart(
    denoiser: nn.Module, call: DenoiserCall, count: int, *, with_null: bool = False
) -> tuple[Recipe, dict[str, Tensor]]:
    """A captured call as its recipe and its batch.

    Args:
        denoiser: What was called.
        call: The call.
        count: B, the samples that the pipeline's call gave; guidance has doubled the denoiser's.
        with_null: Whether to take the null conditions too, under names with ``NULL_PREFIX``.

    Returns:
        The recipe, and the batch: ``"sample"``, (B, ...) in single precision at least, and the
        denoiser's further tensors of each sample by name.

    Raises:
        ValueError: The denoiser was not given the scheduler's sample, or not its time; or null
            conditions are asked for and the call has none.
    """
    family, found = family_of(denoiser), dict[str, Tensor]()
    given = {
        k: v for k, v in call.arguments.items() if call.control is None or k not in family.control
    }
    arguments = _template(given, len(call.noisy), "", family, found)
    control = None
    if call.control is not None:
        given = dict(call.control)
        rows = len(given.pop(sample_argument(denoiser)))
        control = _template(given, rows, "controlnet.", family, found)
    beside, rest = _beside(call, count, family)
    if rest is not None:
        found[BESIDE] = rest
    # In single precision: what the bound adds and subtracts is not the denoiser's arithmetic.
    precise = torch.promote_types(call.sample.dtype, torch.float32)
    # In one order, whatever the order in which a pipeline names them.
    batch = {SAMPLE: call.sample.to(precise)} | dict(sorted(found.items()))
    nulls = _nulls(batch, count, family) if with_null else {}
    batch = {name: _conditional(tensor, count, family) for name, tensor in batch.items()} | nulls
    recipe = Recipe(arguments, control, _divisor(*call.times), beside)
    return recipe, map_tensors(lambda tensor: tensor.detach().clone(), batch)


def filled(template: Any, batch: Mapping[str, Tensor], like: Tensor) -> Any:
    """A template with its slots filled from a batch, on the device of ``like``.

    What a pipeline computes in the denoiser's precision stays in it.
    """
    if isinstance(template, _Slot):
        return batch[template.name]
    if isinstance(template, Tensor):
        return template.to(like.device)
    if isinstance(template, Mapping):
        return {key: filled(value, batch, like) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return type(template)(filled(value, batch, like) for value in template)
    return template


def _template(
    arguments: Mapping[str, Any],
    rows: int,
    prefix: str,
    family: Family,
    found: dict[str, Tensor],
) -> dict[str, Any]:
    return {
        name: _constant(value)
        if name in family.constants
        else _slotted(value, rows, prefix + name, found)
        for name, value in arguments.items()
        if name not in _GIVEN
    }


def _slotted(value: Any, rows: int, name: str, found: dict[str, Tensor]) -> Any:
    """The value with tensors of so many rows put into ``found``, and slots in their places."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != rows:
            return _constant(value)
        found[name] = value
        return _Slot(name)
    if isinstance(value, Mapping):
        return {k: _slotted(v, rows, f"{name}.{k}", found) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_slotted(v, rows, f"{name}.{i}", found) for i, v in enumerate(value))
    return value


def _constant(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def _conditional(tensor: Tensor, count: int, family: Family) -> Tensor:
    """Of a batch that is doubled for guidance, the rows with the condition."""
    copies, rest = divmod(len(tensor), count)
    if rest or not copies:
        raise ValueError(
            f"Expected a multiple of the call's {count} samples, got {describe(tensor)}."
        )
    return tensor.chunk(copies)[family.conditional] if copies > 1 else tensor


def _nulls(batch: Mapping[str, Tensor], count: int, family: Family) -> dict[str, Tensor]:
    """The rows without the condition, of what guidance has doubled."""
    conditions = {name: each for name, each in batch.items() if name != SAMPLE}
    if not conditions or any(len(each) != 2 * count for each in conditions.values()):
        told = describe(conditions) if conditions else "no condition"
        raise ValueError(
            "Expected a guided call, whose denoiser is given a null condition beside each sample's "
            f"own, for condition_check=True, got {told} for {count} samples: pass `call=` with "
            "guidance, or leave out the check."
        )
    without = family.conditional - 1
    return {NULL_PREFIX + name: each.chunk(2)[without] for name, each in conditions.items()}


def _beside(call: DenoiserCall, count: int, family: Family) -> tuple[int | None, Tensor | None]:
    """Where the denoiser's input goes on after the sample, and with what."""
    noisy = _conditional(call.noisy, count, family)
    stepped = _conditional(call.stepped, count, family)
    if noisy.ndim not in (3, 4):
        raise ValueError(f"Expected images or tokens to denoise, got {describe(noisy)}.")
    longer = [i for i in range(noisy.ndim) if noisy.shape[i] != stepped.shape[i]]
    if noisy.ndim == stepped.ndim and len(longer) <= 1 and 0 not in longer:
        dim = longer[0] if longer else 1
        length = stepped.shape[dim]
        if noisy.shape[dim] >= length and _proportional(noisy.narrow(dim, 0, length), stepped):
            rest = noisy.narrow(dim, length, noisy.shape[dim] - length)
            return (dim, rest) if longer else (None, None)
    raise ValueError(
        "Expected the denoiser's input to be the scheduler's sample up to a factor, or to begin "
        f"with it, got {describe(noisy)} for {describe(stepped)}."
    )


def _proportional(a: Tensor, b: Tensor) -> bool:
    finite = a.isfinite() & b.isfinite()  # the rest is for the monitor to count
    a, b = a[finite].detach().double(), b[finite].detach().double()
    factor = (a @ b) / (b @ b)
    return not a.numel() or bool((a - factor * b).norm() <= _TOLERANCE * a.norm())


def _divisor(denoiser_time: float, scheduler_time: float) -> int:
    if denoiser_time:
        for divisor in (1, 1000):
            if math.isclose(scheduler_time / denoiser_time, divisor, rel_tol=_TOLERANCE):
                return divisor
    raise ValueError(
        "Expected the denoiser to be told the scheduler's time or a thousandth of it, above 0 at "
        f"the first step, got {denoiser_time:g} for {scheduler_time:g}."
    )


def _keys(mine: Any, its: Any) -> list[str]:
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        return list(dict.fromkeys([*mine, *its]))
    return [""]


def _item(value: Any, key: str) -> Any:
    return value.get(key) if key else value


def _same(mine: Any, its: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(its, Tensor):
        return mine.shape == its.shape and torch.equal(mine.cpu(), its.cpu())
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        # Some pipelines leave out what others give as None.
        return all(_same(mine.get(k), its.get(k)) for k in [*mine, *its])
    if isinstance(mine, list | tuple) and isinstance(its, list | tuple):
        return len(mine) == len(its) and all(map(_same, mine, its))
    return type(mine) is type(its) and bool(mine == its)


def _told(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor | Mapping | list | tuple) else repr(value)
