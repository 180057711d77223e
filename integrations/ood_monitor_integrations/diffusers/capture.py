"""What a call does, seen from outside: its denoiser's arguments, its scheduler's steps.

Pipelines differ in everything but this: they call a denoiser, and step a scheduler with what it
predicts. :mod:`~ood_monitor_integrations.diffusers.watching` sees both as they happen.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor_integrations.diffusers.denoisers import original_of
from ood_monitor_integrations.diffusers.layouts import layouts_of, prediction_in

__all__ = ["Called", "Capture", "DenoiserCall", "Step"]

#: In the place of a step's expert where more than one was called.
_SEVERAL = -1


@dataclass
class Called:
    """One call of a module.

    Attributes:
        arguments: By name. Containers are copies: a network may take from what it is given.
        output: What it gave; None while it runs.
    """

    arguments: Mapping[str, Any]
    output: Any = None

    @property
    def numbers(self) -> dict[str, Any]:
        """Those of the arguments that are a number, or one for each row or token."""
        return {k: v for k, v in self.arguments.items() if _is_number(k, v)}


@dataclass(frozen=True)
class Step:
    """A step of the scheduler, and what was called for it.

    Attributes:
        calls: Of the denoiser, in their order.
        control: The first of a ControlNet; None without one.
        prediction: What the scheduler was told, shape (S, ...).
        time: The scheduler's.
        stepped: The sample that the scheduler was given, shape (S, ...).
        sample: What it made of it.
        expert: Of several denoisers the place of the one that was called; -1 of more than one.
    """

    calls: tuple[Called, ...]
    control: Called | None
    prediction: Tensor
    time: Any
    stepped: Tensor
    sample: Tensor
    expert: int = 0


@dataclass(frozen=True)
class DenoiserCall:
    """What is needed of a pipeline's call to replay its denoiser elsewhere.

    Attributes:
        sample: What the call ended with, shape (S, ...), in the scheduler's layout: its last
            step's, or what a callback or the pipeline itself made of that.
        steps: The scheduler's, all or the last alone.
        times: Of each step the scheduler's time, and the arguments that may be the denoiser's.
        grid: The scheduler's times and sigmas of this call, each with its own; None where it has
            no sigmas.
        updates: The last steps, as many as were asked for, with copies of what the scheduler was
            told, and without what was called for it.
        rows: Of all calls of the denoiser together.
        experts: Of each step which of several denoisers was called, as :class:`Step` says.
    """

    sample: Tensor
    steps: tuple[Step, ...]
    times: tuple[tuple[Any, Mapping[str, Any]], ...]
    grid: tuple[Tensor, Tensor] | None = None
    updates: tuple[Step, ...] = ()
    rows: int = 0
    experts: tuple[int, ...] = ()

    def until(self, index: int) -> "DenoiserCall":
        """The call as if a step, of those that were kept all, had been its last."""
        end = index + 1
        return replace(
            self,
            sample=self.steps[index].sample,
            steps=self.steps[:end],
            times=self.times[:end],
            experts=self.experts[:end],
        )

    @property
    def last(self) -> Step:
        """The last step."""
        return self.steps[-1]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of the denoiser's first call for the last step, by name."""
        return self.last.calls[0].arguments


@dataclass
class Capture:
    """Records one call as it runs.

    Args:
        denoiser: What denoises.
        controlnet: The pipeline's, if it has one.
        whole: Whether all steps are kept, or the last.
        kept: How many last steps are kept without what was called for them.
        called: What is called for that, one of these for each step; by default the denoiser.
    """

    denoiser: nn.Module
    controlnet: nn.Module | None = None
    whole: bool = False
    kept: int = 0
    called: tuple[nn.Module, ...] = ()
    _pending: dict[int, list[Called]] = field(default_factory=dict)
    _called: dict[int, list[Called]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)
    _times: list[tuple[Any, Mapping[str, Any]]] = field(default_factory=list)
    _experts: list[int] = field(default_factory=list)
    _grid: tuple[Tensor, Tensor] | None = None
    _updates: tuple[Step, ...] = ()
    _rows: int = 0
    _before: Tensor | None = None
    _final: Tensor | None = None
    _failure: Exception | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is raised while recording for :meth:`call`: it is not the pipeline's."""
        try:
            yield
        except Exception as error:  # whatever a foreign module or scheduler gives
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Have :meth:`call` raise it: what was recorded is of no use."""
        self._failure = error

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the arguments of a watched module's call."""
        arguments = {k: _copied(v) for k, v in _bound(module, args, kwargs).items()}
        self._pending.setdefault(id(module), []).append(Called(arguments))

    def end(self, module: nn.Module, output: Any) -> None:
        """Take what it gave."""
        if calls := self._pending.get(id(module)):
            calls[-1].output = output
        if any(module is each for each in self._denoising):
            self._rows += _rows_in(output)

    def step(
        self, scheduler: Any, time: Any, prediction: Tensor, given: Tensor, previous: Tensor
    ) -> None:
        """Take a step of the scheduler."""
        times, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
        if isinstance(times, Tensor) and isinstance(sigmas, Tensor) and len(sigmas) >= len(times):
            self._grid = times, sigmas
        if self._pending:
            self._called, self._pending = self._pending, {}
        calls, expert = self._calls()
        calls = tuple(_kept(each, given) for each in calls)
        control = next(iter(self._called.get(id(self.controlnet), ())), None)
        self._before = self._steps[-1].sample if self._steps else None
        # Copies, since what follows may write into them.
        stepped, sample = given.detach().clone(), previous.detach().clone()
        step = Step(calls, control, prediction.detach(), time, stepped, sample, expert)
        self._steps = [*self._steps, step] if self.whole else [step]
        self._experts.append(expert)
        self._times.append((time, calls[0].numbers if calls else {}))
        if self.kept:
            told = prediction.detach().clone()
            update = replace(step, calls=(), control=None, prediction=told)
            self._updates = (*self._updates, update)[-self.kept :]

    @property
    def _denoising(self) -> tuple[nn.Module, ...]:
        return self.called or (self.denoiser,)

    def _calls(self) -> tuple[tuple[Called, ...], int]:
        """The calls of what denoised for a step, and its place among what may have."""
        modules = self._denoising
        found = [i for i, module in enumerate(modules) if id(module) in self._called]
        calls = tuple(call for i in found for call in self._called[id(modules[i])])
        if len(found) > 1:
            return calls, _SEVERAL
        return calls, next(iter(found), 0)

    def after(self, sample: Tensor) -> None:
        """Take what is left of a step when the pipeline, and the user's callback, are done."""
        self._final = sample.detach().clone()

    def call(self) -> DenoiserCall:
        """What was recorded.

        Raises:
            RuntimeError: The call did not use its denoiser, or did not step its scheduler.
            ValueError: What it ended with is not known: the pipeline changes its samples between
                steps, and takes no callback that sees them.
        """
        if self._failure is not None:
            raise self._failure
        if not self._steps or not self._steps[-1].calls:
            raise RuntimeError(
                f"Expected a call that runs {type(original_of(self.denoiser)).__name__} and steps "
                "its scheduler, got none."
            )
        last, before = self._steps[-1], self._before
        if self._final is None and before is not None and not _begins_with(last.stepped, before):
            raise ValueError(
                "Expected samples that only the scheduler changes, or a pipeline that takes "
                "`callback_on_step_end`, got one that changes them after a step: have its call "
                "take that, and hand the latents to it."
            )
        sample = last.sample if self._final is None else _within(self._final, last.sample)
        return DenoiserCall(
            sample,
            tuple(self._steps),
            tuple(self._times),
            self._grid,
            updates=self._updates,
            rows=self._rows,
            experts=tuple(self._experts),
        )


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature_of(module).bind(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


def _signature_of(module: nn.Module) -> inspect.Signature:
    kind: Any = type(original_of(module))
    return _signature(kind)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _is_number(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        # By name, since to look at every pooled embedding would make a GPU wait at each step.
        return value.ndim < (3 if "timestep" in name else 2) and value.numel() > 0
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows_in(output: Any) -> int:
    """Of what a denoiser gave; none of what is no prediction."""
    found = prediction_in(output)
    if isinstance(found, Tensor):
        return len(found) if found.ndim else 0
    return len(found) if isinstance(found, list | tuple) else 0


def _copied(value: Any) -> Any:
    """With containers of its own, of the same tensors."""
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _kept(called: Called, given: Tensor) -> Called:
    """With a copy of what shares its memory with a sample, into which the next may be written."""
    memory = given.untyped_storage().data_ptr()
    shared = {
        name: value.detach().clone()
        for name, value in called.arguments.items()
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory
    }
    return Called({**called.arguments, **shared}, called.output) if shared else called


def _within(final: Tensor, stepped: Tensor) -> Tensor:
    """What a callback left of a step's sample; of latents with context beside it, the sample.

    Raises:
        ValueError: It is not in the scheduler's layout, and the sample is not in it as it was.
    """
    if final.shape == stepped.shape:
        return final
    shape = stepped.shape[1:]
    parts = (layout.taken(final, shape) for layout in layouts_of(final, shape))
    for part in parts:
        if part.shape == stepped.shape and torch.equal(part.nan_to_num(), stepped.nan_to_num()):
            return part
    raise ValueError(
        "Expected the callback's latents in the scheduler's layout, "
        f"{tuple(stepped.shape)}, got {tuple(final.shape)}."
    )


def _begins_with(given: Tensor, before: Tensor) -> bool:
    """Whether a step goes on with what the last one gave; its rows may have been copied."""
    rows = min(len(given), len(before))
    return given.shape[1:] == before.shape[1:] and bool(
        torch.equal(given[:rows], before[:rows].to(given))
    )
