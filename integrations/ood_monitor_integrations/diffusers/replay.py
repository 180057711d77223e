"""The denoising bound of whatever a pipeline generates, replayed from one call of its denoiser."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ood_monitor import Adapter, DenoisingBound
from ood_monitor.adapters.base import Batch, OnePass, SampleKind, describe
from ood_monitor.checks import flag
from ood_monitor_integrations.diffusers.arguments import (
    BESIDE,
    NULL_PREFIX,
    SAMPLE,
    Recipe,
    filled,
    taken_apart,
)
from ood_monitor_integrations.diffusers.capture import DenoiserCall, sample_argument
from ood_monitor_integrations.diffusers.deployment import settings_of
from ood_monitor_integrations.diffusers.families import family_of, original_of

__all__ = ["LEVELS", "SEED", "ReplayedBound"]

#: Noise levels unless told otherwise, little noise to much. All samples share one draw of the noise
#: a level, and a draw may hide what another shows: four are less at the mercy of luck than two.
LEVELS = (20, 100, 300, 500)

#: Of the noise, unless told otherwise. The same seed in a user's hands, with a level added, would
#: start a pipeline from the very noise that its result is then tested with: none that people use.
SEED = 2403_01485


class ReplayedBound(Adapter):
    """Negative denoising losses of a pipeline's own denoiser, with the pipeline's own conditioning.

    Made by :func:`replayed_bound`. A batch is a mapping of tensors with one B: ``"sample"``, in the
    denoiser's layout, and what the denoiser takes of each sample beside it, by the names of its
    arguments. Terms are those of :class:`~ood_monitor.DenoisingBound`, on a schedule of its own.

    Args:
        denoiser: The pipeline's, also as `torch.compile` wrapped it; what it wrapped is scored.
        scheduler: The pipeline's, of which the numbers are copied.
        call: A call of it.
        count: B, the samples that the pipeline's call gave.
        controlnet: The pipeline's, if it has one.
        levels: Noise levels of the bound, a pass each.
        seed: Of the bound's noise.
        ratios: As of :class:`~ood_monitor.DenoisingBound`, where there is no noise.
        condition_check: Whether to look at what the null condition changes, in one more pass.

    Attributes:
        module: The denoiser.
        settings: What changes the denoiser beside its weights, when this was made.
    """

    sample: SampleKind | None = "diffusion"

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        call: DenoiserCall,
        count: int,
        *,
        controlnet: nn.Module | None = None,
        levels: Sequence[int] = LEVELS,
        seed: int = SEED,
        ratios: Literal[2, 3] | Sequence[float] = 2,
        condition_check: bool = False,
    ) -> None:
        self.module = original_of(denoiser)
        self.settings = settings_of(self.module)
        condition_check = flag("condition_check", condition_check)
        self._ratios, self._condition_check = ratios, condition_check
        self.has_null_condition = condition_check
        self._recipe, _ = taken_apart(self.module, call, count, with_null=condition_check)
        self._bound = DenoisingBound(
            _Network(self.module, controlnet, self._recipe),
            scheduler,
            levels=levels,
            inputs=lambda batch: batch[SAMPLE],
            condition=_conditions,
            time=partial(_divided, divisor=self._recipe.divisor),
            seed=seed,
            ratios=ratios,
            null_condition=_null_conditions if condition_check else None,
        )

    @property
    def levels(self) -> tuple[int, ...]:
        """The noise levels, a term each."""
        return self._bound.levels

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self._bound.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._bound = self._bound.with_levels(self.levels, seed=seed)

    def with_levels(self, levels: Sequence[int]) -> "ReplayedBound":
        """The same bound at other noise levels."""
        other = copy.copy(self)
        other._bound = self._bound.with_levels(levels)
        return other

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield the terms ``t=<level>`` of a batch as :meth:`batch` makes it."""
        if not isinstance(batch, Mapping) or SAMPLE not in batch:
            raise ValueError(f"Expected a mapping with a {SAMPLE!r}, got {describe(batch)}.")
        return self._bound.log_likelihood(batch)

    def residuals(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield what the denoiser leaves of samples without noise, by level."""
        return self._bound.residuals(batch)

    def conditions(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the denoiser is told of each sample beside it."""
        return self._bound.conditions(batch)

    def residuals_at_once(self, batch: Batch) -> tuple[tuple[str, ...], Tensor] | None:
        """All levels in one batch."""
        return self._bound.residuals_at_once(batch)

    def one_pass(self, batch: Batch) -> OnePass | None:
        """All levels at once."""
        return self._bound.one_pass(batch)

    def batch(self, call: DenoiserCall, count: int) -> dict[str, Tensor]:
        """The samples and conditions of another call, copied.

        Args:
            call: The call.
            count: B, the samples that the pipeline's call gave.

        Raises:
            ValueError: The call differs in what does not belong to a sample, such as position ids
                or the scale of an attention processor.
        """
        recipe, batch = taken_apart(self.module, call, count, with_null=self._condition_check)
        self._recipe.check_same(recipe)
        return batch


class _Network(nn.Module):
    """The denoiser as a function of the noisy sample, its time and the batch's conditions."""

    def __init__(self, denoiser: nn.Module, controlnet: nn.Module | None, recipe: Recipe) -> None:
        super().__init__()
        self.denoiser, self._recipe = denoiser, recipe
        self._name, self._outputs = sample_argument(denoiser), family_of(denoiser).control
        # In a tuple, and so no submodule: its parameters are no features.
        self._controlnet = (controlnet,)

    def forward(self, x: Tensor, timestep: Tensor, **condition: Tensor) -> Any:
        beside = self._recipe.beside
        given = x if beside is None else torch.cat([x, condition[BESIDE].to(x)], beside)
        arguments = filled(self._recipe.arguments, condition, x)
        arguments |= self._control(x, timestep, condition)
        output = self.denoiser(
            **{self._name: given}, timestep=timestep, return_dict=False, **arguments
        )[0]
        # Tokens after the sample's are context, for which nothing is predicted.
        return output[:, : x.shape[1]] if beside == 1 and x.ndim == 3 else output

    def _control(
        self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What the ControlNet says of this noise, which is not what it said of the call's."""
        [controlnet] = self._controlnet
        if controlnet is None or self._recipe.control is None:
            return {}
        arguments = filled(self._recipe.control, condition, x)
        with torch.no_grad():
            outputs = controlnet(
                **{self._name: x}, timestep=timestep, return_dict=False, **arguments
            )
        return dict(zip(self._outputs, outputs, strict=False))


def _conditions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != SAMPLE and not k.startswith(NULL_PREFIX)}


def _null_conditions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(NULL_PREFIX): v for k, v in batch.items() if k.startswith(NULL_PREFIX)}


def _divided(t: Tensor, divisor: int) -> Tensor:
    return t if divisor == 1 else t / divisor
