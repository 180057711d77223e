"""What watches a pipeline: takes each call apart, chooses samples, has them scored, and counts."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeAlias

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ood_monitor import Alert, Monitor, Scores
from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.processes import Lock
from ood_monitor_integrations.diffusers.arguments import SAMPLE
from ood_monitor_integrations.diffusers.budget import Choice, Worker
from ood_monitor_integrations.diffusers.callbacks import with_callback
from ood_monitor_integrations.diffusers.calls import (
    can_carry,
    given_to,
    original_class,
    samples_of,
    size_of,
)
from ood_monitor_integrations.diffusers.capture import Capture, DenoiserCall
from ood_monitor_integrations.diffusers.changes import Changes
from ood_monitor_integrations.diffusers.denoisers import called_in, denoiser_of
from ood_monitor_integrations.diffusers.deployment import (
    Mode,
    check_denoiser,
    check_deployment,
    scorable,
)
from ood_monitor_integrations.diffusers.groups import group_in, is_fitted_on
from ood_monitor_integrations.diffusers.inputs import copied, count_of, encoded, image_argument
from ood_monitor_integrations.diffusers.origin import Origin
from ood_monitor_integrations.diffusers.own_calls import checked_updates, steps_kept
from ood_monitor_integrations.diffusers.plan import WatchingPlan
from ood_monitor_integrations.diffusers.replay import ReplayedBound
from ood_monitor_integrations.diffusers.telling import Failures, UnlikeTheFit
from ood_monitor_integrations.diffusers.watching import capturing, hooked, stepping

__all__ = ["BatchOf", "Counts", "PipelineMonitor"]

_log = logging.getLogger(__name__)

#: Makes a detector's batch of a captured call and the number of its samples.
BatchOf: TypeAlias = Callable[[DenoiserCall, int], Batch]

#: Alerts that are remembered.
_ALERTS = 1000

#: Where a call's output carries the scores of what.
_ATTRIBUTES = {"outputs": "ood", "inputs": "ood_inputs"}


@dataclass(frozen=True)
class Counts:
    """What has become of the samples of all calls so far.

    Attributes:
        scored: Scored samples.
        skipped: Samples not chosen, by ``sample_rate`` or for ``max_latency_ms``.
        dropped: Samples chosen that found the queue full, or closed.
        interrupted: Samples of calls that were interrupted, and are no images.
        new: Samples of a group that the detector for any size was not fitted on: of a size, or with
            adapters such as LoRA's, of which there were no or too few samples. They are neither
            flagged nor tested; each such group is warned of once.
        failures: Calls that could not be scored; their images were returned all the same.
    """

    scored: int = 0
    skipped: int = 0
    dropped: int = 0
    interrupted: int = 0
    new: int = 0
    failures: int = 0


@dataclass(frozen=True)
class _Task:
    """Samples to score.

    Attributes:
        pipe: The pipeline that was called.
        what: What they are of, outputs or inputs.
        batch: Gives the chosen samples as the detector takes them.
        rows: Which of the call's samples they are.
        count: The samples of the call.
        group: Theirs, of a detector with groups of its adapter's.
        is_new: Whether it was not fitted on that group.
    """

    pipe: Any
    what: str
    batch: Callable[[], Batch]
    rows: list[int]
    count: int
    group: str = ""
    is_new: bool = False


class PipelineMonitor:
    """What watches one pipeline: reached as ``pipe.ood_monitor``, or made by :func:`wrap`.

    Attributes:
        monitors: The monitors that take the samples, by what these are of: outputs, inputs.
        alerts: The latest alerts raised.
        plan: How calls are watched of a detector with a budget, with the rate and mode that were
            said in place of the budget's, if they were; None without one.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        monitors: Mapping[str, Monitor],
        *,
        choice: Choice,
        worker: Worker | None,
        batch: BatchOf | None,
        raise_on_error: bool,
        plan: WatchingPlan | None = None,
    ) -> None:
        self.monitors = dict(monitors)
        self.alerts: deque[Alert] = deque(maxlen=_ALERTS)
        self._pipe, self._original = pipe, original_class(pipe)
        self._choice, self._worker, self._raise_on_error = choice, worker, raise_on_error
        self._batch, self.plan = batch, plan
        self._counts, self._lock = Counts(), Lock()
        self._last = dict[str, Scores]()
        denoiser = denoiser_of(pipe)
        self._changes = Changes(denoiser, self.monitor)
        for monitor in self.monitors.values():
            monitor.read_weights_in_background()
        self._unlike = UnlikeTheFit(self._original, Origin.of(self.monitor.detector), plan)
        self._failures = Failures()
        self._hooks, self._hooked = ExitStack(), list[Any]()
        self._follow(pipe)
        self._changes.tell(denoiser)

    @property
    def monitor(self) -> Monitor:
        """The monitor of what is scored; of the outputs if both are."""
        return next(iter(self.monitors.values()))

    @property
    def counts(self) -> Counts:
        """What has become of the samples so far."""
        with self._lock:
            return self._counts

    @property
    def last(self) -> Mapping[str, Scores]:
        """Scores of the samples of the last call, by what they are of; empty before.

        As an output carries them, nan for samples not chosen. Here too where it cannot: lists,
        tuples, dictionaries, arrays, tensors and images are returned as they are. In the
        background, of the last call that was scored.
        """
        with self._lock:
            return dict(self._last)

    @property
    def failures(self) -> dict[str, int]:
        """How many calls could not be scored, by the first error of each kind.

        Errors that differ in numbers are of one kind. Each kind is warned of once.
        """
        return self._failures.counts

    @property
    def stale(self) -> bool:
        """Whether the denoiser is not as it was when the detector was fitted.

        P-values and promises are then those of another model: weights were swapped, a LoRA was
        switched on or fused, FreeU switched on. It is logged once a state, when it is known, and
        scoring goes on. Here all weights are read if they may be others. To a detector for any
        size, which adapters are on is a group and no change.
        """
        return self._changes.are_there(denoiser_of(self._pipe))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's call, watched."""
        return self.call(self._pipe, args, kwargs)

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A watched call of the pipeline, or of a copy of it that shares its denoiser."""
        output, scores = self.run(
            pipe,
            partial(self._call, pipe, args, kwargs),
            partial(samples_of, is_settled=self._batch is not None),
            lambda: given_to(pipe, args, kwargs),
        )
        if scores and can_carry(output):
            # Attributes, not items: `to_tuple()` stays as long as it was.
            output.__dict__["ood"] = next(iter(scores.values()))
            output.__dict__.update({_ATTRIBUTES[what]: found for what, found in scores.items()})
        return output

    def _call(
        self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capture: Capture | None
    ) -> Any:
        args = (pipe, *args)
        if capture is not None:
            args, kwargs = with_callback(self._original, args, kwargs, capture)
        return self._original.__call__(*args, **kwargs)

    def run(
        self,
        pipe: Any,
        run: Callable[[Capture | None], Any],
        count: Callable[[Any, Tensor], int],
        arguments: Callable[[], Mapping[str, Any]] = dict,
    ) -> tuple[Any, dict[str, Scores]]:
        """Watch what uses a pipeline's denoiser and scheduler.

        Args:
            pipe: What has both.
            run: What to watch; it is given what records it, if anything can.
            count: The number of samples, of what ``run`` gave and of what the scheduler was
                given last.
            arguments: Gives the user's, by name.

        Returns:
            What ``run`` gave, and scores by what they are of; none if they failed or come later.
        """
        scores: dict[str, Scores] = {}
        with ExitStack() as stack:
            captures: list[Capture] = []
            with self._never_failing():
                captures.append(self._recording(pipe, stack))
            output = run(next(iter(captures), None))
        if not captures:
            return output, scores
        [capture] = captures
        with capturing(None), self._never_failing():
            call = capture.call()
            samples = count(output, call.last.stepped)
            given = arguments()
            self._unlike.tell_of_settings(given)
            if getattr(pipe, "_interrupt", False):  # what is half denoised is no image
                self._count(interrupted=samples)
                return output, scores
            self._unlike.tell_of_rows(call.rows / samples)
            tasks = [self._task(pipe, what, call, samples, given) for what in self.monitors]
            if any(task.rows for task in tasks):
                self._check(pipe, capture.denoiser)
            for task in tasks:
                found = self._scored(task)
                scores |= {} if found is None else {task.what: found}
        return output, scores

    def _recording(self, pipe: Any, stack: ExitStack) -> Capture:
        """What records a call within the stack's block."""
        self._follow(pipe)
        kept = max(steps_kept(monitor.detector) for monitor in self.monitors.values())
        controlnet = getattr(pipe, "controlnet", None)
        capture = Capture(denoiser_of(pipe), controlnet, kept=kept, called=called_in(pipe))
        stack.enter_context(stepping(pipe.scheduler))
        stack.enter_context(capturing(capture))
        return capture

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that is queued is scored, and told; False if the time is up first."""
        deadline = time.monotonic() + timeout
        done = [self._worker is None or self._worker.flush(timeout)]
        for monitor in self.monitors.values():
            done.append(monitor.flush(max(0.0, deadline - time.monotonic())))
        return all(done)

    def detach(self, timeout: float = 5.0) -> None:
        """Score what is queued within ``timeout`` seconds, and give everything back as it was.

        The monitors deliver the alerts that are left, and are closed.
        """
        self.release(timeout)
        for monitor in self.monitors.values():
            monitor.close(timeout)

    def release(self, timeout: float = 5.0) -> None:
        """As :meth:`detach`, for monitors that watch on."""
        if self._pipe.__dict__.get("ood_monitor") is self:
            del self._pipe.__dict__["ood_monitor"]
            self._pipe.__class__ = self._original
        self._hooks.close()
        self._hooked = []
        if self._worker is not None:
            self._worker.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def _follow(self, pipe: Any) -> None:
        """Watch the pipeline's modules, which `torch.compile` may have replaced since."""
        modules = [*called_in(pipe), getattr(pipe, "controlnet", None)]
        with self._lock:
            if list(map(id, modules)) == list(map(id, self._hooked)):
                return
            hooks = ExitStack()
            for module in modules:
                if isinstance(module, nn.Module):
                    hooks.enter_context(hooked(module))
            old, self._hooks, self._hooked = self._hooks, hooks, modules
        old.close()

    def _check(self, pipe: Any, denoiser: nn.Module) -> None:
        """The denoiser may have been changed since the last call."""
        self._changes.tell(denoiser)
        mode: Mode = "sync" if self._worker is None else "background"
        for monitor in self.monitors.values():
            check_denoiser(denoiser, monitor.detector)
            check_deployment(pipe, denoiser, mode, monitor.detector)

    def _task(
        self,
        pipe: Any,
        what: str,
        call: DenoiserCall,
        samples: int,
        given: Mapping[str, Any],
    ) -> _Task:
        """The chosen samples of a call, copied, to be scored now or later."""
        images = None if what == "outputs" else given[image_argument(given)]
        count = samples if images is None else count_of(images)
        group = self._group(pipe, what, call, samples)
        if not is_fitted_on(self.monitors[what].detector, group):
            self._unlike.tell_of_group(group)
            return _Task(pipe, what, dict, [], count, group, is_new=True)
        rows = self._choice.rows(count)
        if not rows:
            return _Task(pipe, what, dict, rows, count, group)
        # Of several samples that a call makes of an image, the condition of the first.
        every = max(1, samples // count)
        whole = self._taken(pipe, what, call, samples)
        batch = map_tensors(lambda tensor: tensor[::every][rows], whole)
        if images is None:
            return _Task(pipe, what, lambda: batch, rows, count, group)
        images = images if self._worker is None else copied(images)
        encode = partial(_with_encoded, pipe, batch, images, size_of(pipe, given), rows)
        return _Task(pipe, what, encode, rows, count, group)

    def _group(self, pipe: Any, what: str, call: DenoiserCall, samples: int) -> str:
        """That of a call's samples, as the detector's adapter tells it; empty if it does not."""
        detector = self.monitors[what].detector
        if not detector.fitted.groups_of_adapter:
            return ""
        if self._batch is None and isinstance(detector.adapter, ReplayedBound):
            return group_in(detector, {SAMPLE: call.sample[:1]})  # replaying nothing for a shape
        return group_in(detector, self._taken(pipe, what, call, samples))

    def _taken(self, pipe: Any, what: str, call: DenoiserCall, samples: int) -> Batch:
        """The detector's batch of a call, whose last step is replayed where none like it was."""
        detector = self.monitors[what].detector
        adapter = detector.adapter
        if self._batch is not None:
            return self._batch(call, samples)
        call = replace(call, updates=checked_updates(call.updates, detector))
        if not isinstance(adapter, ReplayedBound):
            return call.sample
        adapter.check_scheduler(pipe.scheduler)
        return adapter.batch(call, samples, partial(scorable, pipe, denoiser_of(pipe)))

    def _scored(self, task: _Task) -> Scores | None:
        """The scores of a call's samples, nan for those not chosen; None if they come later."""
        self._count(**{"new" if task.is_new else "skipped": task.count - len(task.rows)})
        if self._worker is None:
            if task.rows:
                return self._run(task)
            return self._kept(task, Scores.none().among(task.count, []))
        if task.rows and not self._worker.submit(partial(self._run_later, task)):
            self._count(dropped=len(task.rows))
        return None

    def _run(self, task: _Task) -> Scores:
        start, monitor = time.perf_counter(), self.monitors[task.what]
        with scorable(task.pipe, denoiser_of(task.pipe)):
            batch = task.batch()
            self._check_group(task, batch)
            scores = monitor.score(batch)
        self._choice.measured(len(task.rows), 1000 * (time.perf_counter() - start))
        alerts = monitor.observe(scores)
        self.alerts.extend(alerts)
        self._count(scored=len(task.rows))
        return self._kept(task, scores.among(task.count, task.rows))

    def _kept(self, task: _Task, scores: Scores) -> Scores:
        with self._lock:
            self._last[task.what] = scores
        return scores

    def _check_group(self, task: _Task, batch: Batch) -> None:
        """Refuse to score samples by a denoiser whose adapters have been changed since the call."""
        found = group_in(self.monitors[task.what].detector, batch)
        if found != task.group:
            raise ValueError(
                f"Expected the size and adapters of the samples' call, {task.group}, got {found}: "
                "adapters were changed before they were scored in the background."
            )

    def _run_later(self, task: _Task) -> None:
        with self._never_failing(may_raise=False):
            self._run(task)

    @contextmanager
    def _never_failing(self, may_raise: bool = True) -> Iterator[None]:
        """Count and log what is raised: a call's images are returned whatever happens."""
        try:
            yield
        except Exception as error:  # whatever a foreign pipeline or model raises
            is_new = self._failures.add(error)
            self._count(failures=1)
            if self._raise_on_error and may_raise:
                raise
            level = logging.WARNING if is_new else logging.DEBUG
            _log.log(level, "A pipeline's call was not scored: %s [OOD604]", error, exc_info=True)

    def _count(self, **more: int) -> None:
        with self._lock:
            counts = {name: getattr(self._counts, name) + by for name, by in more.items()}
            self._counts = replace(self._counts, **counts)


def _with_encoded(
    pipe: Any,
    batch: dict[str, Tensor],
    images: Any,
    size: tuple[int, int] | None,
    rows: list[int],
) -> Batch:
    """The batch with the user's images in the place of its samples."""
    return batch | {SAMPLE: encoded(pipe, images, batch[SAMPLE][:1], size)[rows]}
