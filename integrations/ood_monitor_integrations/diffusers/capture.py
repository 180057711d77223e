"""What a call does, seen from outside: its denoiser's arguments, its scheduler's steps.

Pipelines differ in everything but this: they call a denoiser, and step a scheduler with what it
predicts. Both are watched in place and for the calling thread only, which a context variable says;
every other user of a shared denoiser or scheduler pays a look at that variable.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.processes import Lock
from ood_monitor_integrations.diffusers.layouts import layouts_of, prediction_in
from ood_monitor_integrations.diffusers.own_calls import Update

__all__ = ["Called", "Capture", "DenoiserCall", "Step", "capturing", "hooked", "stepping"]

#: What a scheduler's step is given, by diffusers' names.
_OF_STEP = ("timestep", "model_output", "sample")

_active: ContextVar["Capture | None"] = ContextVar("ood_monitor_capture", default=None)
#: Taken again where the interpreter collects, within it, a block that was never left.
_lock = Lock()


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
        """Those of the arguments that are a number, or one for each row."""
        return {k: v for k, v in self.arguments.items() if _is_number(v)}


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
        updates: The last of the steps as the scheduler made them, as many as were asked for.
        rows: Of all calls of the denoiser together.
        experts: Of each step which of several denoisers was called, as :class:`Step` says.
    """

    sample: Tensor
    steps: tuple[Step, ...]
    times: tuple[tuple[Any, Mapping[str, Any]], ...]
    grid: tuple[Tensor, Tensor] | None = None
    updates: tuple[Update, ...] = ()
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
        kept: Of how many last steps the tensors are copied.
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
    _updates: tuple[Update, ...] = ()
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
            update = Update.copied(given, prediction, previous)
            self._updates = (*self._updates, update)[-self.kept :]

    @property
    def _denoising(self) -> tuple[nn.Module, ...]:
        return self.called or (self.denoiser,)

    def _calls(self) -> tuple[tuple[Called, ...], int]:
        """The calls of what denoised for a step, and its place among what may have."""
        modules = self._denoising
        found = [i for i, module in enumerate(modules) if id(module) in self._called]
        calls = [call for i in found for call in self._called[id(modules[i])]]
        return tuple(calls), found[0] if len(found) == 1 else -1 if found else 0

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
                f"Expected a call that runs {type(_original(self.denoiser)).__name__} and steps "
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


@contextmanager
def capturing(capture: Capture | None) -> Iterator[None]:
    """Record what this thread calls within the block; None stops an outer recording."""
    token = _active.set(capture)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass
class _Shared:
    """What several blocks put on one object, and how many of them there are.

    A block counts itself before all else. What the interpreter collects meanwhile, a pipeline that
    nobody detached, may end another block in the same thread and finds this one counted.
    """

    users: int = 0
    put: Any = None

    @classmethod
    def joined(cls, among: dict[int, "_Shared"], key: int) -> "_Shared":
        """The one of an object, with another user."""
        while True:
            shared = among.setdefault(key, cls())
            shared.users += 1
            if among.get(key) is shared:  # else its last user left before it was counted
                return shared

    def left(self, among: dict[int, "_Shared"], key: int) -> bool:
        """Whether that was the last user."""
        self.users -= 1
        if self.users == 0:
            del among[key]
        return self.users == 0


_hooks: dict[int, _Shared] = {}


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    """Watch a module's calls; one hook, however many watch it."""
    with _lock:
        shared = _Shared.joined(_hooks, id(module))
        if shared.put is None:
            _drop_copied_hooks(module)
            shared.put = (
                module.register_forward_pre_hook(_before_forward, with_kwargs=True),
                module.register_forward_hook(_after_forward),
            )
    try:
        yield
    finally:
        with _lock:
            if shared.left(_hooks, id(module)):
                for handle in shared.put:
                    handle.remove()


def _drop_copied_hooks(module: nn.Module) -> None:
    """Take off what a copy of a watched module has of its original: each call would count twice."""
    tables = [module._forward_pre_hooks, module._forward_hooks]
    for table, hook in zip(tables, (_before_forward, _after_forward), strict=True):
        for key in [key for key, each in table.items() if each is hook]:
            del table[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # of a module that is compiled in place, whose hooks would be too
def _before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
    # Without keywords when the hook is removed while another thread is about to call it.
    capture = _active.get()
    if capture is not None and kwargs is not None:
        with capture.recording():
            capture.begin(module, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    capture = _active.get()
    if capture is not None:
        with capture.recording():
            capture.end(module, output)


_stepped: dict[int, _Shared] = {}


@contextmanager
def stepping(scheduler: Any) -> Iterator[None]:
    """Watch a scheduler's steps; one patch of the instance, however many calls share it."""
    with _lock:
        shared = _Shared.joined(_stepped, id(scheduler))
        if shared.put is None:
            own = scheduler.__dict__.get("step")
            shared.put = (own,)
            # Bound, so that a deep copy of the scheduler steps itself.
            scheduler.__dict__["step"] = MethodType(_recorded(scheduler, own), scheduler)
    try:
        yield
    finally:
        with _lock:
            if shared.left(_stepped, id(scheduler)):
                [own] = shared.put
                if own is None:
                    del scheduler.__dict__["step"]
                else:
                    scheduler.__dict__["step"] = own


def _recorded(scheduler: Any, own: Callable[..., Any] | None) -> Callable[..., Any]:
    original = type(scheduler).step
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = (own or functools.partial(original, self))(*args, **kwargs)
        capture = _active.get()
        if capture is not None:
            with capture.recording():
                given = signature.bind(self, *args, **kwargs).arguments
                previous = output[0] if isinstance(output, tuple) else output.prev_sample
                capture.step(self, *_taken(given), previous)
        return output

    return step


def _taken(given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Of a scheduler's step the time, the prediction and the sample.

    Raises:
        ValueError: It has other names for them.
    """
    if not set(_OF_STEP) <= given.keys():
        raise ValueError(
            f"Expected a scheduler whose step takes {', '.join(_OF_STEP)}, got one that takes "
            f"{', '.join(list(given)[1:])}."
        )
    time, prediction, sample = (given[name] for name in _OF_STEP)
    return time, prediction, sample


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature_of(module).bind(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


def _original(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def _signature_of(module: nn.Module) -> inspect.Signature:
    kind: Any = type(_original(module))
    return _signature(kind)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim < 2 and value.numel() > 0
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
