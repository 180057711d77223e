"""The denoising bound of whatever a pipeline generates, replayed from one call of its denoiser."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ood_monitor import Adapter, DenoisingBound, NoiseSchedule
from ood_monitor.adapters.base import Batch, OnePass, SampleKind, describe
from ood_monitor.adapters.schedules import is_preconditioned, stated_prediction
from ood_monitor.checks import flag, items
from ood_monitor_integrations.diffusers.arguments import (
    NULL_PREFIX,
    SAMPLE,
    Recipe,
    taken_apart,
)
from ood_monitor_integrations.diffusers.capture import DenoiserCall
from ood_monitor_integrations.diffusers.denoisers import original_of
from ood_monitor_integrations.diffusers.deployment import settings_of
from ood_monitor_integrations.diffusers.groups import adapters_in
from ood_monitor_integrations.diffusers.network import ReplayedNetwork, kind_of, verified
from ood_monitor_integrations.diffusers.own_calls import OWN_CALLS, columns_in, columns_of
from ood_monitor_integrations.diffusers.reading import Reading
from ood_monitor_integrations.diffusers.rows import pattern_of

__all__ = ["LEVELS", "SEED", "ReplayedBound"]

#: Noise levels unless told otherwise, little noise to much. All samples share one draw of the noise
#: a level, and a draw may hide what another shows: four are less at the mercy of luck than two.
LEVELS = (20, 100, 300, 500)

#: On a schedule of so many.
_OF_LEVELS = 1000

#: Of the noise, unless told otherwise. The same seed in a user's hands, with a level added, would
#: start a pipeline from the very noise that its result is then tested with: none that people use.
SEED = 2403_01485

#: Noise to signal where residuals of latents are taken, as of :class:`DenoisingBound`.
_RATIOS: Mapping[int, tuple[float, ...]] = {2: (0.33, 3.4), 3: (0.015, 0.33, 3.4)}

#: Shapes of samples and conditions whose recipes are kept.
_KINDS = 64


class ReplayedBound(Adapter):
    """Negative denoising losses of a pipeline's own denoiser, with the pipeline's own conditioning.

    Made by :func:`replayed_bound`. A batch is a mapping of tensors with one B: ``"sample"``, in the
    denoiser's layout, and what the denoiser takes of each sample beside it, by the names of its
    arguments. Terms are those of :class:`~ood_monitor.DenoisingBound`, on a schedule of its own.

    Args:
        denoiser: The pipeline's, also as `torch.compile` wrapped it; what it wrapped is scored.
        scheduler: The pipeline's, of which the numbers are copied.
        reading: How the pipeline calls it.
        call: A call of it, whose last step is replayed to verify the reading.
        count: B, the samples that the pipeline's call gave.
        controlnet: The pipeline's, if it has one.
        levels: Noise levels of the bound, a pass each.
        seed: Of the bound's noise.
        ratios: As of :class:`~ood_monitor.DenoisingBound`, where there is no noise.
        condition_check: Whether to look at what the null condition changes, in one more pass.

    Attributes:
        module: The denoiser.
        settings: What changes the denoiser beside its weights, when this was made.
        own_settings: The same without adapters such as LoRA's, which are a group of samples.
        adapters: Those that were on.
        origin: What a detector was fitted on, as :func:`fit_pipeline` says; empty before.
    """

    sample: SampleKind | None = "diffusion"

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        reading: Reading,
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
        self.own_settings = settings_of(self.module, with_adapters=False)
        self.adapters = adapters_in(self.module)
        self.origin: Mapping[str, Any] = {}
        condition_check = flag("condition_check", condition_check)
        self._ratios, self._condition_check = ratios, condition_check
        self.has_null_condition = condition_check
        self._reading, schedule = reading, reading.schedule
        levels, ratios = of_both_experts(reading, scaled(levels, len(schedule)), ratios)
        self._network = ReplayedNetwork(self.module, controlnet, reading)
        self._predicts = _prediction(scheduler, schedule)
        self._verified: set[Any] = set()
        self._bound = DenoisingBound(
            self._network,
            schedule,
            levels=levels,
            prediction_type=self._predicts,
            inputs=lambda batch: batch[SAMPLE],
            condition=_conditions,
            seed=seed,
            ratios=ratios,
            null_condition=_null_conditions if condition_check else None,
        )
        # For the record that a detector has of its adapter.
        self._scheduler = replace(reading.levels, prediction_type=self._predicts)
        self._levels, self._seed = self._bound.levels, self._bound.seed
        self._verify_other(call, count, self.batch(call, count))

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
        self._seed = seed

    def with_levels(self, levels: Sequence[int]) -> "ReplayedBound":
        """The same bound at other noise levels."""
        other = copy.copy(self)
        other._bound = self._bound.with_levels(levels)
        other._levels = other._bound.levels
        return other

    def with_ratios(self, ratios: Literal[2, 3] | Sequence[float]) -> "ReplayedBound":
        """The same bound, whose residuals are taken at other ratios of noise to signal.

        Raises:
            ValueError: They are those of one of two experts alone.
        """
        other = copy.copy(self)
        _, of_both = of_both_experts(self._reading, self.levels, ratios)
        other._bound = self._bound.with_ratios(of_both)
        other._ratios = ratios
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

    def group_of(self, batch: Batch) -> Sequence[str]:
        """The samples' shape and the adapters that are on now, as ``"4x64x64 style:0.7"``."""
        adapters = adapters_in(self.module)
        return [f"{shape} {adapters}".rstrip() for shape in self._bound.group_of(batch)]

    def residuals_at_once(self, batch: Batch) -> tuple[tuple[str, ...], Tensor] | None:
        """All levels in one batch; None of two experts, which take their own."""
        return None if self.has_experts else self._bound.residuals_at_once(batch)

    def one_pass(self, batch: Batch) -> OnePass | None:
        """All levels at once; None of two experts."""
        return None if self.has_experts else self._bound.one_pass(batch)

    def batch(
        self,
        call: DenoiserCall,
        count: int,
        ready: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, Tensor]:
        """The samples and conditions of another call, copied.

        Args:
            call: The call.
            count: B, the samples that the pipeline's call gave.
            ready: Makes the denoiser ready for the replay of the call's last step, should there be
                none of such shapes before.

        Raises:
            ValueError: The call differs in what does not belong to a sample, such as position ids
                or the scale of an attention processor; or, of samples of new shapes, its last step
                replayed gives another prediction.
        """
        return self._replayed(call, count, ready) | columns_of(call.updates, count)

    def own_calls(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the pipeline's own last steps show of samples that came with them."""
        return columns_in(batch)

    def _replayed(
        self, call: DenoiserCall, count: int, ready: Callable[[], AbstractContextManager[None]]
    ) -> dict[str, Tensor]:
        known = self._network.recipes
        if not known:
            return self._first(call, count)
        first = next(iter(known.values()))
        recipe, batch = self._taken_apart(call, count, like=first)
        kind = kind_of(batch[SAMPLE], _conditions(batch))
        known.get(kind, first).check_same(recipe, of_another_size=kind not in known)
        if (pattern_of(call.last, count), kind) not in self._verified:
            with ready():
                self._verify(recipe, call, count, batch)
        return batch

    def _first(self, call: DenoiserCall, count: int) -> dict[str, Tensor]:
        """Of the call that was read. What is as long as it has rows by chance belongs to none."""
        recipe, batch = self._taken_apart(call, count)
        try:
            self._verify(recipe, call, count, batch, twice=True)
        except ValueError:
            names = {name.split(".")[0] for name, t in batch.items() if name != SAMPLE}
            for constants in [{name} for name in sorted(names)] + [names]:
                recipe, other = self._taken_apart(call, count, constants=constants)
                with suppress(ValueError):
                    self._verify(recipe, call, count, other, twice=True)
                    return other
            raise
        return batch

    def _taken_apart(
        self, call: DenoiserCall, count: int, **options: Any
    ) -> tuple[Recipe, dict[str, Tensor]]:
        with_null = self._condition_check
        return taken_apart(self._reading, call, count, with_null=with_null, **options)

    def _verify(
        self,
        recipe: Recipe,
        call: DenoiserCall,
        count: int,
        batch: Mapping[str, Tensor],
        *,
        twice: bool = False,
    ) -> None:
        """Replay a call's last step, and replay calls of its shapes by its recipe from now on."""
        recipe = verified(self._network, recipe, call, count, _conditions(batch), twice=twice)
        known, pattern = self._network.recipes, pattern_of(call.last, count)
        for conditions in (_conditions(batch), _null_conditions(batch)):
            known[kind_of(batch[SAMPLE], conditions)] = recipe
        self._verified.add((pattern, kind_of(batch[SAMPLE], _conditions(batch))))
        for kind in list(known)[1:-_KINDS]:  # the first is what others are compared with
            known.pop(kind, None)
            self._verified = {each for each in self._verified if each[1] != kind}

    @property
    def has_experts(self) -> bool:
        """Whether two networks denoise in turn, each of which has a level of its own."""
        return self._reading.boundary is not None

    def _verify_other(self, call: DenoiserCall, count: int, batch: Mapping[str, Tensor]) -> None:
        """Replay the last step of the other expert too, which is called as the last step's is.

        Raises:
            ValueError: It is called otherwise, or not at all; or gives another prediction.
        """
        if not self.has_experts:
            return
        own = call.last.expert
        others = [i for i, s in enumerate(call.steps) if s.calls and s.expert not in (own, -1)]
        if not others:
            raise ValueError("Expected a call in which both transformers are called, got one.")
        recipe, earlier = self._network.recipes[kind_of(batch[SAMPLE], _conditions(batch))], call
        earlier = call.until(others[-1])
        other, its = taken_apart(self._reading, earlier, count, like=recipe)
        recipe.check_same(other)
        mine = _conditions(batch)
        for name in dict.fromkeys([*mine, *_conditions(its)]):
            if not (name in mine and name in its and torch.equal(mine[name], its[name])):
                raise ValueError(
                    f"Expected both transformers to be given the same {name!r}, got others."
                )
        if verified(self._network, recipe, earlier, count, mine).output != recipe.output:
            raise ValueError("Expected both transformers to give predictions alike, got others.")

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse another scheduler than the fit's, but for how it samples.

        Raises:
            ValueError: It has other noise levels, or says that the denoiser predicts another thing.
        """
        levels, fitted = NoiseSchedule.of(scheduler), self._reading.levels
        predicts = _prediction(scheduler, levels)
        if predicts != self._predicts:
            raise ValueError(
                f"Expected a scheduler with prediction_type={self._predicts!r}, as the detector "
                f"was fitted, got {predicts!r}."
            )
        # Of straight lines another shift leaves out other levels, and trains no other network.
        is_table = levels.is_variance_preserving and not is_preconditioned(scheduler)
        if levels.sigma_data != fitted.sigma_data:
            raise ValueError(
                f"Expected a scheduler with sigma_data = {fitted.sigma_data:g}, as the detector "
                f"was fitted, got {levels.sigma_data:g}."
            )
        if is_table and not (
            len(levels) == len(fitted) and torch.allclose(levels.alpha, fitted.alpha, rtol=1e-3)
        ):
            raise ValueError(
                "Expected a scheduler with the noise levels that the detector was fitted at, got "
                f"one of {len(levels)}, to alpha = {float(levels.alpha[-1]):.4g}, in place of "
                f"{len(fitted)}, to {float(fitted.alpha[-1]):.4g}: make it by `from_config` of the "
                "pipeline's own."
            )

    def compared(self, batch: Batch) -> Batch:
        """The samples: embeddings may be of prompts of any length."""
        return {SAMPLE: batch[SAMPLE]} if isinstance(batch, Mapping) else batch


def scaled(levels: Sequence[int], length: int) -> Sequence[int]:
    """The default levels on a schedule of another length; those of a user as they are."""
    if tuple(items("levels", levels)) != LEVELS:
        return levels
    return [level * length // _OF_LEVELS for level in levels]


def of_both_experts(
    reading: Reading, levels: Sequence[int], ratios: Literal[2, 3] | Sequence[float]
) -> tuple[Sequence[int], Literal[2, 3] | Sequence[float]]:
    """Levels and ratios with one at least of each of two experts; those of one network as given.

    To the default ones the nearest level of an expert that has none is added.

    Raises:
        ValueError: Others have none of an expert.
    """
    if reading.boundary is None:
        return levels, ratios
    schedule, experts = reading.levels, reading.experts()
    known = _RATIOS.get(ratios) if isinstance(ratios, int) else None
    chosen = [schedule.nearest(ratio) for ratio in known or items("ratios", ratios)]
    more = _of_absent(experts, chosen, "ratios", is_default=known is not None)
    at = [float(schedule.sigma[level] / schedule.alpha[level]) for level in more]
    is_default = tuple(levels) == LEVELS
    added = _of_absent(experts, list(levels), "levels", is_default=is_default)
    return [*levels, *added], [*(known or items("ratios", ratios)), *at]


def _of_absent(experts: Tensor, chosen: list[int], name: str, *, is_default: bool) -> list[int]:
    """The levels to add so that each expert has one: those nearest to the boundary.

    Raises:
        ValueError: They may not be added, or there are none.
    """
    found = []
    for expert, what in enumerate(("transformer", "transformer_2")):
        own = (experts == expert).nonzero().flatten().tolist()
        if any(level in own for level in chosen):
            continue
        if not is_default or not own:
            raise ValueError(
                f"Expected {name} with a noise level of `{what}`, which denoises "
                f"{f'{own[0]} to {own[-1]}' if own else 'none'}, got levels {chosen}."
            )
        found.append(own[0] if expert == 0 else own[-1])
    return found


def _conditions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    no_conditions = (NULL_PREFIX, OWN_CALLS)
    return {k: v for k, v in batch.items() if k != SAMPLE and not k.startswith(no_conditions)}


def _null_conditions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(NULL_PREFIX): v for k, v in batch.items() if k.startswith(NULL_PREFIX)}


def _prediction(scheduler: Any, schedule: NoiseSchedule) -> str:
    """What the scheduler says that its denoiser predicts; straight lines leave no choice."""
    if schedule.prediction_type != "epsilon":
        return schedule.prediction_type
    return stated_prediction(scheduler) or schedule.prediction_type
