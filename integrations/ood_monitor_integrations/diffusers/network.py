"""A pipeline's denoiser as a function of a noisy sample, its time and conditions, and its check."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import describe
from ood_monitor_integrations.diffusers.arguments import BESIDE, SAMPLE, Recipe
from ood_monitor_integrations.diffusers.capture import DenoiserCall
from ood_monitor_integrations.diffusers.denoisers import expert_in
from ood_monitor_integrations.diffusers.layouts import (
    Layout,
    layouts_of,
    outputs_of,
    prediction_in,
)
from ood_monitor_integrations.diffusers.reading import Reading
from ood_monitor_integrations.diffusers.rows import copy_at
from ood_monitor_integrations.diffusers.templates import filled
from ood_monitor_integrations.diffusers.watching import capturing

__all__ = ["Kind", "ReplayedNetwork", "kind_of", "verified"]

#: How far a replayed prediction may be from the recorded one, as a share: by single precision, and
#: by fewer bits.
_PRECISE, _ROUNDED = 1e-3, 5e-2

#: Shapes of a sample, and of its conditions by name, rows not counted.
Kind: TypeAlias = tuple[torch.Size, tuple[tuple[str, torch.Size], ...]]


def kind_of(x: Tensor, conditions: Mapping[str, Tensor]) -> Kind:
    """The shapes of samples with their conditions, which have a recipe."""
    return x.shape[1:], tuple(sorted((name, t.shape[1:]) for name, t in conditions.items()))


class ReplayedNetwork(nn.Module):
    """The denoiser as a function of the noisy sample, its time and the batch's conditions.

    Attributes:
        recipes: Of its arguments, by the shapes of samples and conditions.
    """

    def __init__(self, denoiser: nn.Module, controlnet: nn.Module | None, reading: Reading) -> None:
        super().__init__()
        self.denoiser, self._reading = denoiser, reading
        self.recipes: dict[Kind, Recipe] = {}
        # In a tuple, and so no submodule: its parameters are no features.
        self._controlnet = (controlnet,)

    def forward(self, x: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """The prediction, as ``x``, by the recipe of such shapes."""
        recipe = self.recipes.get(kind_of(x, condition))
        if recipe is None:
            raise ValueError(
                "Expected samples and conditions of shapes that a call of the pipeline had, got "
                f"{describe({SAMPLE: x} | condition)}."
            )
        output = self.given(recipe, x, timestep, condition, self._reading.expert_at(timestep))
        return self._reading.sign * recipe.output.taken(output, x.shape[1:])

    def given(
        self,
        recipe: Recipe,
        x: Tensor,
        timestep: Tensor,
        condition: Mapping[str, Tensor],
        expert: int = 0,
    ) -> Any:
        """What the denoiser, of several the expert, gives by a recipe: it holds the prediction."""
        place = self._reading.place
        timestep = _of_type(timestep, recipe.time, x)
        arguments = filled(recipe.arguments, condition, x)
        arguments |= self._control(recipe, x, timestep, condition)
        given = place.layout.put(x, condition.get(BESIDE))
        denoiser = expert_in(self.denoiser, expert)
        return prediction_in(denoiser(**{place.sample: given, place.time: timestep}, **arguments))

    def _control(
        self, recipe: Recipe, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What the ControlNet says of this noise, which is not what it said of the call's."""
        [controlnet] = self._controlnet
        control = recipe.control
        if controlnet is None or control is None:
            return {}
        arguments = filled(control.arguments, condition, x)
        place = control.place
        given = place.layout.put(x, None)
        with torch.no_grad():
            output = controlnet(**{place.sample: given, place.time: timestep}, **arguments)
        pairs = zip(control.outputs, outputs_of(output), strict=True)
        return {name: each for name, each in pairs if name}


def _of_type(time: Tensor, told: torch.dtype | None, x: Tensor) -> Tensor:
    """In the type of the call's own, or of a level's number; no network's is double precision."""
    if told is not None:
        return time.to(told)
    return (
        time.to(torch.promote_types(x.dtype, torch.float32)) if time.is_floating_point() else time
    )


def verified(
    network: ReplayedNetwork,
    recipe: Recipe,
    call: DenoiserCall,
    count: int,
    conditions: Mapping[str, Tensor],
    *,
    twice: bool = False,
) -> Recipe:
    """Replay a call's last step: the recipe, with the place of the prediction in what that gives.

    Args:
        network: What replays it.
        recipe: Of the call.
        call: The call.
        count: B, the samples that it gave.
        conditions: Of each sample.
        twice: Whether to replay a single sample beside itself too: what is as long as one by chance
            belongs to no sample, and shows in no replay of one.

    Raises:
        ValueError: The prediction of the samples, or of the first alone, is not the recorded one.
    """
    reading, step = recipe.reading, call.last
    shape = step.stepped.shape[1:]
    called, rows = copy_at(step, reading.block(step, count), count)
    x = rows.of(reading.place.layout.taken(called.arguments[reading.place.sample], shape))
    time = torch.as_tensor(called.arguments[reading.place.time], device=x.device)
    time = rows.of(time) if time.ndim and len(time) == rows.total else time.expand(count)
    time = time.reshape(count, -1)[:, 0]  # of a time for each token: all are the same
    expected = rows.of(reading.output.taken(prediction_in(called.output), shape))
    chosen = [[0], list(range(count))] if count > 1 else [[0, 0], [0]] if twice else [[0]]
    for these in chosen:
        own = {name: tensor[these] for name, tensor in conditions.items()}
        given = _given(network, recipe, x[these], time[these], own, step.expert)
        recipe = replace(recipe, output=_place_of(expected[these], given))
    return recipe


def _given(
    network: ReplayedNetwork,
    recipe: Recipe,
    x: Tensor,
    time: Tensor,
    conditions: Mapping[str, Tensor],
    expert: int,
) -> Any:
    try:
        with torch.no_grad(), capturing(None):
            return network.given(recipe, x, time, conditions, expert)
    except torch.OutOfMemoryError:  # which says nothing of the arguments
        raise
    except Exception as error:  # of any kind: what a foreign network raises of other shapes
        raise ValueError(
            "Expected the denoiser to take the last step's arguments of the rows with the "
            f"condition alone, got {type(error).__name__}: {error}"
        ) from error


def _place_of(expected: Tensor, given: Any) -> Layout:
    """Where a recorded prediction stands in what a replay gave."""
    shape = expected.shape[1:]
    left = {each: _left(each.taken(given, shape), expected) for each in layouts_of(given, shape)}
    best = min(left, key=lambda each: left[each], default=None)
    precise = expected.dtype in (torch.float32, torch.float64)
    if best is None or left[best] > (_PRECISE if precise else _ROUNDED):
        differs = "another shape" if best is None else f"one that differs by {left[best]:.2g} of it"
        raise ValueError(
            "Expected the call's last step, replayed, to give the prediction that was recorded, "
            f"got {differs}: the denoiser takes more than its arguments into account, or its rows "
            "are mixed. Of a cache of earlier steps: give `fit_pipeline` a `call=` of such shapes, "
            "which is read without it; else `monitor_pipeline(batch=...)` with an adapter of your "
            "own."
        )
    return best


def _left(found: Tensor, expected: Tensor) -> float:
    """By how much two predictions differ, as a share, where both are finite."""
    finite = expected.isfinite() & found.isfinite()
    a, b = (each[finite].to("cpu", torch.float64) for each in (found, expected))
    return float((a - b).norm()) / max(float(b.norm()), 1e-300) if len(b) else 0.0
