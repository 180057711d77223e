"""diffusers: an inference hook around a pipeline.

    with monitor_pipeline(pipe, monitor) as pipe:
        images = pipe(batch_size=4)
        images.ood.p_value

Each call's final sample, as the scheduler's last step gives it, is scored by the detector. The call
itself is not changed: same images, bit for bit, with and without.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ood_monitor import Alert, Detector, Monitor

__all__ = ["PipelineMonitor", "monitor_pipeline"]

_log = logging.getLogger(__name__)

#: Arguments of a denoiser's forward that the replayed bound gives itself.
_GIVEN = frozenset({"self", "sample", "hidden_states", "timestep"})


class PipelineMonitor:
    """What watches one pipeline: reached as ``pipe.ood_monitor``.

    Attributes:
        monitor: The monitor that takes each call's samples.
        alerts: All alerts raised so far.
        failures: Calls whose samples could not be scored; their images were returned all the same.
    """

    def __init__(self, pipe: DiffusionPipeline, monitor: Monitor, raise_on_error: bool) -> None:
        self.monitor = monitor
        self.alerts: list[Alert] = []
        self.failures = 0
        self._pipe, self._raise_on_error = pipe, raise_on_error

    def observe(self, sample: Tensor | None) -> bool:
        """Score a call's final sample; False, and counted, if that failed."""
        try:
            if sample is None:
                raise RuntimeError("Expected the pipeline to step its scheduler, got no step.")
            self.alerts += self.monitor.update(sample)
        except Exception:  # a call's images are returned whatever happens to its score
            self.failures += 1
            if self._raise_on_error:
                raise
            _log.warning(
                "A pipeline call was not scored (%d so far).", self.failures, exc_info=True
            )
            return False
        return True

    def detach(self) -> None:
        """Give the pipeline its own class back and deliver the alerts that are left."""
        if self._pipe.__dict__.pop("ood_monitor", None) is self:
            self._pipe.__class__ = type(self._pipe).__mro__[1]
        self.monitor.close()


def monitor_pipeline(
    pipe: DiffusionPipeline, monitor: Monitor | Detector, *, raise_on_error: bool = False
) -> Any:
    """Watch what an unconditional pipeline generates.

    Args:
        pipe: A pipeline whose denoiser is the detector's model and needs no conditioning (DDPM,
            DDIM and their like).
        monitor: A monitor, or a detector for which one is made.
        raise_on_error: Raise what scoring raises, for tests; otherwise it is counted and logged.

    Returns:
        The same pipeline object, now also a context manager. Its outputs carry ``.ood``, the
        :class:`~ood_monitor.Scores`; with ``return_dict=False`` a call returns what it always did,
        and the scores are ``pipe.ood_monitor.monitor.last``. ``pipe.ood_monitor.detach()`` ends it.

    Raises:
        TypeError: Not a pipeline with a scheduler and a denoiser.
        ValueError: It is watched already, its denoiser is not the detector's model, or it needs
            conditioning.
    """
    monitor = Monitor(monitor) if isinstance(monitor, Detector) else monitor
    _check(pipe, monitor.detector)
    # Set in __dict__: the pipeline's own __setattr__ would look at it as a component.
    pipe.__dict__["ood_monitor"] = PipelineMonitor(pipe, monitor, raise_on_error)
    pipe.__class__ = _watched_class(type(pipe))
    return pipe


def _watched_class(original: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass under the same name, so that `save_pretrained` writes what it always did."""

    @wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _last_sample(self.scheduler) as last:
            output = original.__call__(self, *args, **kwargs)
        if self.ood_monitor.observe(last.get("sample")) and not isinstance(output, tuple):
            # An attribute, not an item: `to_tuple()` stays as long as it was.
            output.__dict__["ood"] = self.ood_monitor.monitor.last
        return output

    def leave(self: Any, *error: object) -> None:
        self.ood_monitor.detach()

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    methods = {"__call__": call, "__enter__": lambda self: self, "__exit__": leave}
    return type(original.__name__, (original,), names | methods)


@contextmanager
def _last_sample(scheduler: Any) -> Iterator[dict[str, Tensor]]:
    """The sample that the scheduler's last step within the block gave."""
    last: dict[str, Tensor] = {}
    step = scheduler.step

    @wraps(step)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        sample = output[0] if isinstance(output, tuple) else output.prev_sample
        last["sample"] = sample.detach()
        return output

    scheduler.step = recorded
    try:
        yield last
    finally:
        del scheduler.step


def _check(pipe: DiffusionPipeline, detector: Detector) -> None:
    name = type(pipe).__name__
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, nn.Module) or not hasattr(pipe, "scheduler"):
        raise TypeError(f"Expected a pipeline with a denoiser and a scheduler, got {name}.")
    if "ood_monitor" in pipe.__dict__:
        raise ValueError(f"Expected a pipeline that is not watched yet, got a watched {name}.")
    if detector.adapter.module is not denoiser:
        raise ValueError(
            f"Expected a detector of {name}'s {type(denoiser).__name__}, got one of another "
            f"{type(detector.adapter.module).__name__}."
        )
    required = [
        parameter.name
        for parameter in inspect.signature(type(denoiser).forward).parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.name not in _GIVEN
    ]
    if required:
        raise ValueError(
            f"Expected an unconditional denoiser, got {type(denoiser).__name__}, which needs "
            f"{required}."
        )
