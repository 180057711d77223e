"""Watching a pipeline: each call is scored, and gives what it always did, bit for bit."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, get_args

from diffusers import DiffusionPipeline

from ood_monitor import Detector, Monitor
from ood_monitor.checks import flag, function, whole, word
from ood_monitor_integrations.diffusers.budget import Choice, Worker
from ood_monitor_integrations.diffusers.calls import original_class, parameters_of
from ood_monitor_integrations.diffusers.denoisers import check_pipeline, denoiser_of, original_of
from ood_monitor_integrations.diffusers.deployment import Mode, check_deployment
from ood_monitor_integrations.diffusers.inputs import image_argument
from ood_monitor_integrations.diffusers.origin import Origin, What
from ood_monitor_integrations.diffusers.pipeline_monitor import (
    BatchOf,
    PipelineMonitor,
)
from ood_monitor_integrations.diffusers.plan import WatchingPlan, together
from ood_monitor_integrations.diffusers.replay import ReplayedBound

__all__ = ["What", "monitor_pipeline", "watcher_of", "wrap"]

#: Arguments of a denoiser's forward that an unconditional bound gives itself.
_GIVEN = frozenset({"self", "sample", "hidden_states", "timestep"})


def monitor_pipeline(
    pipe: DiffusionPipeline,
    monitor: Monitor | Detector | Mapping[str, Monitor],
    *,
    what: What = "outputs",
    mode: Mode | None = None,
    sample_rate: float | None = None,
    max_latency_ms: float | None = None,
    queue_size: int = 16,
    batch: BatchOf | None = None,
    seed: int = 0,
    raise_on_error: bool = False,
) -> Any:
    """Watch what a pipeline generates, or is given.

    When a call has its images, the result of its last denoiser call is scored. Scoring draws from
    none of your generators. Its errors are logged and counted, never raised. What a sample costs
    depends on the detector's levels and layers; see :func:`plan_costs`.

    Args:
        pipe: The pipeline.
        monitor: A monitor of a detector by :func:`fit_pipeline`, or such a detector, which then
            gets a monitor. For ``what="both"`` a detector, or monitors by the names ``outputs`` and
            ``inputs``. If the detector has an adapter of your own, or a plain
            :class:`~ood_monitor.DenoisingBound`, it gets the final sample if the denoiser needs no
            conditioning, else what ``batch`` makes of the call.
        what: ``"outputs"``, the generated samples; ``"inputs"``, the user's image of img2img,
            inpainting, upscaling or a ControlNet, encoded by the pipeline itself and with the
            call's conditioning; or ``"both"``, each with a monitor of its own.
        mode: ``"sync"`` scores before the call returns; ``"background"`` hands copies to a thread
            of the monitor's own and returns. By default as the detector's :class:`WatchingPlan`
            says, if it was fitted with a budget, else ``"sync"``.
        sample_rate: The share of samples to score. They are drawn without a look at them, so that
            p-values and alarms keep their meaning. By default the plan's share, else all. With two
            detectors the share keeps both together within the smaller of their budgets.
        max_latency_ms: The most milliseconds that scoring may add to a call. So many samples are
            drawn as fit, by what samples have cost so far. The first call scores one.
        queue_size: How many calls may wait in the background. If the queue is full, a call is
            dropped and counted.
        batch: A function that makes the detector's batch, of a captured call and its number of
            samples.
        seed: Seed of the draws of ``sample_rate``.
        raise_on_error: Raise what scoring raises, for tests.

    Returns:
        The same pipeline object, now also a context manager. Its outputs carry ``.ood``, the
        :class:`~ood_monitor.Scores` of the call's samples, nan for those not chosen (of both, also
        ``.ood_inputs``); with ``return_dict=False``, and in the background, they are the monitor's
        ``last``. ``pipe.ood_monitor`` is the :class:`PipelineMonitor`; its ``detach()``, or leaving
        the context, gives everything back.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: A pipeline that is watched already, is not the detector's, or cannot be scored
            as it is; a detector that was fitted to watch something else; or an option out of its
            range.
    """
    watcher = watcher_of(
        pipe,
        monitor,
        what=what,
        mode=mode,
        sample_rate=sample_rate,
        max_latency_ms=max_latency_ms,
        seed=seed,
        queue_size=queue_size,
        batch=batch,
        raise_on_error=raise_on_error,
    )
    # In __dict__: the pipeline's own __setattr__ would look at it as a component.
    pipe.__dict__["ood_monitor"] = watcher
    pipe.__class__ = _watched_class(original_class(pipe))
    return pipe


@contextmanager
def wrap(
    pipe: DiffusionPipeline,
    monitor: Monitor | Mapping[str, Monitor],
    *,
    what: What = "outputs",
    sample_rate: float | None = None,
    max_latency_ms: float | None = None,
    batch: BatchOf | None = None,
    seed: int | None = None,
    raise_on_error: bool = False,
) -> Iterator[PipelineMonitor]:
    """Watch the calls of a pipeline that lives for a request, as servers make them.

    The pipeline itself is not changed, and the monitor watches on afterwards. To choose samples in
    a way that lasts, or to score in the background, watch the shared pipeline by
    :func:`monitor_pipeline` and call ``shared.ood_monitor.call(pipe, args, kwargs)``.

    Args:
        pipe: The pipeline, such as ``Pipeline.from_pipe(shared, scheduler=...)``.
        monitor: The monitor, or monitors by name.
        what: As for :func:`monitor_pipeline`.
        sample_rate: As for :func:`monitor_pipeline`.
        max_latency_ms: As for :func:`monitor_pipeline`.
        batch: As for :func:`monitor_pipeline`.
        seed: Seed of the draws of ``sample_rate``; by default another one each time.
        raise_on_error: As for :func:`monitor_pipeline`.

    Yields:
        What to call in the pipeline's place.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    watcher = watcher_of(
        pipe,
        monitor,
        what=what,
        mode="sync",
        sample_rate=sample_rate,
        max_latency_ms=max_latency_ms,
        seed=seed,
        batch=batch,
        raise_on_error=raise_on_error,
    )
    with watcher:
        yield watcher


def watcher_of(
    pipe: DiffusionPipeline,
    monitor: Monitor | Detector | Mapping[str, Monitor],
    *,
    what: What = "outputs",
    mode: Mode | None,
    sample_rate: float | None = None,
    max_latency_ms: float | None = None,
    seed: int | None = 0,
    queue_size: int = 1,
    batch: BatchOf | None = None,
    raise_on_error: bool = False,
) -> PipelineMonitor:
    """What watches a pipeline, which itself is not changed yet; see :func:`monitor_pipeline`."""
    word("what", what, get_args(What))
    if mode is not None:
        word("mode", mode, get_args(Mode))
    if sample_rate is not None:
        Choice(sample_rate, max_latency_ms, seed)  # checked before a monitor is made
    _check_unwatched(pipe)
    queue_size = whole("queue_size", queue_size, 1)
    raise_on_error = flag("raise_on_error", raise_on_error)
    if batch is not None:
        function("batch", batch)
    monitors = _monitors(monitor, what)
    plan = _plan(monitors, is_said=mode is not None and sample_rate is not None)
    mode = mode or (plan.mode if plan else "sync")
    if sample_rate is None:
        sample_rate = plan.sample_rate if plan else 1.0
    _check_all(pipe, monitors, mode, has_batch=batch is not None)
    return PipelineMonitor(
        pipe,
        monitors,
        choice=Choice(sample_rate, max_latency_ms, seed),
        worker=Worker(queue_size) if mode == "background" else None,
        batch=batch,
        raise_on_error=raise_on_error,
        plan=plan and replace(plan, sample_rate=sample_rate, mode=mode),
    )


def _check_unwatched(pipe: Any) -> None:
    if "ood_monitor" in pipe.__dict__:
        raise ValueError(
            f"Expected a pipeline that is not watched yet, got a watched {type(pipe).__name__}: "
            "its calls are scored already; `pipe.ood_monitor.detach()` ends that."
        )


def _check_all(pipe: Any, monitors: Mapping[str, Monitor], mode: Mode, *, has_batch: bool) -> None:
    """Refuse, by name, what one of the monitors cannot watch."""
    for name, each in monitors.items():
        _check(pipe, each.detector, mode, has_batch=has_batch)
        if origin := Origin.of(each.detector):
            origin.check(name)
    if "inputs" in monitors:
        _check_inputs(pipe, monitors["inputs"].detector)


def _plan(monitors: Mapping[str, Monitor], *, is_said: bool) -> WatchingPlan | None:
    """By which samples are watched, by all monitors together; None without a budget.

    Raises:
        ValueError: One detector alone has a budget, and it is not said how to watch by both.
    """
    found = [WatchingPlan.of(each.detector) for each in monitors.values()]
    plans = [plan for plan in found if plan is not None]
    if len(plans) < len(found):
        if plans and not is_said:
            raise ValueError(
                "Expected two detectors with a budget or none, got one: fit the other with "
                "max_overhead= too, or say mode= and sample_rate=."
            )
        return None
    return together(plans)


def _monitors(
    monitor: Monitor | Detector | Mapping[str, Monitor], what: What
) -> dict[str, Monitor]:
    names = ("outputs", "inputs") if what == "both" else (what,)
    if isinstance(monitor, Mapping):
        if monitor.keys() != set(names):
            raise ValueError(f"Expected monitors of {names}, got {sorted(monitor)}.")
        return {name: monitor[name] for name in names}
    if isinstance(monitor, Detector):
        return {name: Monitor(monitor, name=name) for name in names}
    if len(names) > 1:
        raise ValueError("Expected a detector, or a monitor for each of both, got one monitor.")
    return {names[0]: monitor}


def _check(pipe: Any, detector: Detector, mode: Mode, *, has_batch: bool) -> None:
    denoiser = original_of(denoiser_of(pipe))
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"Expected a pipeline with a scheduler, got {type(pipe).__name__}.")
    if detector.adapter.module is not denoiser:
        raise ValueError(
            f"Expected a detector of {type(pipe).__name__}'s {type(denoiser).__name__}, got one of "
            f"another {type(detector.adapter.module).__name__}."
        )
    check_deployment(pipe, denoiser, mode, detector)
    if isinstance(detector.adapter, ReplayedBound):
        check_pipeline(pipe)
    elif not has_batch:
        _check_unconditional(denoiser)


def _check_unconditional(denoiser: Any) -> None:
    parameters = inspect.signature(type(denoiser).forward).parameters.values()
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty and parameter.name not in _GIVEN
    ]
    if required:
        raise ValueError(
            f"Expected a detector by `fit_pipeline`, or `batch=`, for {type(denoiser).__name__}, "
            f"which needs {required}, got a detector of samples alone."
        )


def _check_inputs(pipe: Any, detector: Detector) -> None:
    image_argument(parameters_of(pipe))
    if not isinstance(detector.adapter, ReplayedBound):
        raise ValueError(
            "Expected a detector by `fit_pipeline` to score inputs, got one of a "
            f"{type(detector.adapter).__name__}."
        )


def _watched_class(original: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass under the same name, so that `save_pretrained` writes what it always did."""

    @wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = self.__dict__.get("ood_monitor")
        if watcher is None:  # made by `from_pipe` of a watched one
            return original.__call__(self, *args, **kwargs)
        return watcher.call(self, args, kwargs)

    def leave(self: Any, *error: object) -> None:
        self.ood_monitor.detach()

    def copied(self: Any) -> Any:
        """Of the same components, and so watched by the same monitor."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def reduced(self: Any, protocol: Any) -> Any:
        """What has components of its own, deep-copied or unpickled, is not watched."""
        state = {k: v for k, v in self.__dict__.items() if k != "ood_monitor"}
        return object.__new__, (original,), state

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    methods = {"__call__": call, "__enter__": lambda self: self, "__exit__": leave}
    methods |= {"__copy__": copied, "__reduce_ex__": reduced}
    kept = {"_ood_monitor_original": original}
    return type(original.__name__, (original,), names | methods | kept)
