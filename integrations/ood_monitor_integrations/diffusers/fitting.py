"""Fitting a detector for a pipeline: on held-out images, or on what the pipeline itself makes."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline

from ood_monitor import Detector, NoiseSchedule
from ood_monitor.adapters.base import Batch
from ood_monitor.checks import flag, seed_of, whole, word
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor_integrations.diffusers.calls import original_class
from ood_monitor_integrations.diffusers.denoisers import (
    boundary_of,
    denoiser_of,
)
from ood_monitor_integrations.diffusers.deployment import check_deployment, scorable
from ood_monitor_integrations.diffusers.origin import Origin, What, settings_in
from ood_monitor_integrations.diffusers.own_calls import STEPS
from ood_monitor_integrations.diffusers.plan import checked_budget
from ood_monitor_integrations.diffusers.planning import plan_of
from ood_monitor_integrations.diffusers.reading import read
from ood_monitor_integrations.diffusers.recorded_call import (
    RecordedCall,
    record_call,
    unguided_steps,
)
from ood_monitor_integrations.diffusers.recordings import (
    Call,
    Recording,
    batch_of,
    checked_calls,
    first_samples,
    held_out,
    of_one_size,
    own_samples,
)
from ood_monitor_integrations.diffusers.replay import LEVELS, SEED, ReplayedBound

__all__ = ["fit_pipeline", "replayed_bound"]

#: Of a size at least as many calibration samples are expected as make a group of its own, and twice
#: the square root more, since the split into fit and calibration samples is random.
_SPREAD = 2

#: Steps of a call that is read until both of two experts denoise.
_STEPS_OF_BOTH = (4, 12, 50)


def fit_pipeline(
    pipe: DiffusionPipeline,
    data: Iterable[Any] | None = None,
    *,
    call: Call | Sequence[Call] | None = None,
    levels: Sequence[int] | None = None,
    ratios: Literal[2, 3] | Sequence[float] | None = None,
    max_overhead: float | None = None,
    condition_check: bool = False,
    layers: Layers = None,
    samples: int = 500,
    seed: int = SEED,
    progress: bool = True,
    watches: What | None = None,
    **options: Any,
) -> Detector:
    """Fit a detector on held-out images, with the conditioning that the pipeline itself makes.

    Conditions come from two steps of the pipeline's own call with the given arguments; images take
    the place of what these steps gave. Neither the pipeline nor any random state changes.

    Args:
        pipe: The pipeline.
        data: Held-out batches that the model was not trained on: images as the pipeline's image
            processor takes them, tensors (B, C, H, W) or arrays (B, H, W, C) in [0, 1], or PIL
            images. Or pairs of images and arguments of the call for them: captions by ``prompt``,
            labels by ``class_labels``, embeddings, sizes by ``height`` and ``width``. Without data
            the detector is fitted on the pipeline's own samples, from whole calls. It then tells
            what is unlike those, not what is unlike the training data; its ``source`` says so.
        call: Arguments of all calls. Without data it may be a list of such, which are called in
            turn, for several prompts or sizes. If their samples come in several shapes, the
            detector is for any size.
        levels: Noise levels of the bound for gradient norms, by default 20, 100, 300 and 500. Each
            costs a pass; see :func:`plan_costs`. With fewer levels more depends on the seed:
            ``benchmarks/integrations/diffusers.py``.
        ratios: The levels at which the default method looks at samples without noise, two, three or
            a list, as in :class:`~ood_monitor.DenoisingBound`; by default two.
        max_overhead: A budget, for calls of few steps: by what share of its time watching may
            lengthen a call on average, such as 0.1. The rows that a whole call gives its denoiser
            are counted, and the time to score a sample is measured. The first of these that fits is
            taken: two levels of all samples, one level of all, or one level of a share of them, in
            the background if possible. The log tells the :class:`WatchingPlan`, the detector keeps
            it (``WatchingPlan.of(detector)``), and :func:`monitor_pipeline` follows it. It assumes
            that rows cost alike, and that a call does nothing beside its denoiser. To load the
            detector, give :func:`replayed_bound` the plan's ``ratios``. Without a budget, two
            levels of all samples are scored.
        condition_check: Also make a pass with the null condition of a guided call, which shows that
            a sample does not fit its prompt or label.
        layers: Which parameters; a suffix of the denoiser, such as ``["up_blocks.3.*",
            "conv_norm_out.*", "conv_out.*"]``, costs less than all.
        samples: The most samples to use.
        seed: Seed of the bound's noise, and of the pipeline's own samples.
        progress: Show a progress bar.
        watches: What the detector is for, by default what it is fitted on: ``"inputs"`` for images,
            ``"outputs"`` for own samples. What a model makes is unlike its training data, so a
            detector of the one finds drift in the other at once. To compare them all the same, say
            it here.
        **options: Further options of :class:`~ood_monitor.Detector`. ``parts=["own_calls"]`` looks
            at a call's own last three steps. This costs no pass, and finds too few steps, other
            guidance and strong LoRAs; add ``"output_layer"`` and ``"energies"``, the default's
            parts, to find the rest. ``any_size=True`` watches several sizes with one detector and,
            if they are switched between batches of data, adapters such as LoRA's. Each size that
            has ``minimum_group`` calibration samples is a group of its own. Samples of other sizes
            are counted and not scored.

    Returns:
        The detector, for :func:`monitor_pipeline`. To load it again, see :func:`replayed_bound`.

    Raises:
        TypeError: No pipeline with a denoiser and a scheduler.
        ValueError: The pipeline cannot be replayed. A call has conditions for neither one nor all
            of its images. There is too little data. Images hold whole numbers, as bytes do, or
            values outside [0, 1]. Samples have several sizes without ``any_size=True``, or there
            are too few of one. The budget is not positive, leaves less than one sample in a
            thousand, or stands beside ``ratios``, ``levels`` or another ``method``, which it is to
            choose.
    """
    samples, layers = whole("samples", samples, 1), checked_layers(layers)
    seed, progress = seed_of("seed", seed), flag("progress", progress)
    if max_overhead is not None:
        max_overhead = checked_budget(max_overhead, {"levels": levels, "ratios": ratios} | options)
    calls = checked_calls(call, data)
    kept = _steps_of(options.get("parts"), data, watches)
    recordings: Iterator[Recording] = (
        own_samples(pipe, calls, seed, kept)
        if data is None
        else held_out(pipe, data, calls[0], seed)
    )
    first = list(itertools.islice(recordings, len(calls)))
    if not first:
        raise ValueError("Expected held-out batches, got an empty iterable.")
    adapter = replayed_bound(
        pipe,
        call=first[0].arguments,
        levels=LEVELS if levels is None else levels,
        ratios=2 if ratios is None else ratios,
        condition_check=condition_check,
        seed=seed,
    )
    origin = _origin(pipe, data, watches, [each.arguments for each in first])
    if max_overhead is not None:
        plan = plan_of(pipe, adapter, origin, first, max_overhead, seed)
        origin, adapter = replace(origin, plan=plan), adapter.with_ratios(plan.ratios)
    adapter.origin = origin.dump()
    source = "held-out images" if origin.samples == "images" else "the pipeline's own samples"
    detector = _unfitted(adapter, first, samples, {"layers": layers, "source": source} | options)
    batches = (batch_of(pipe, adapter, each) for each in itertools.chain(first, recordings))
    return _fitted(pipe, detector, first_samples(batches, samples), progress)


def _unfitted(
    adapter: ReplayedBound, first: Sequence[Recording], samples: int, options: dict[str, Any]
) -> Detector:
    """A detector for any size if the calls' samples come in several."""
    several = len({each.found.call.sample.shape[1:] for each in first}) > 1
    detector = Detector(adapter, **{"any_size": several} | options)
    if detector.any_size and len(first) > 1:
        _check_sizes(detector, first, samples)
    return detector


def _fitted(pipe: Any, detector: Detector, batches: Iterable[Batch], progress: bool) -> Detector:
    denoiser = denoiser_of(pipe)
    check_deployment(pipe, denoiser, "sync", detector)
    with scorable(pipe, denoiser):
        detector.fit(batches if detector.any_size else of_one_size(batches), progress=progress)
    _check_groups(detector)
    return detector


def _check_sizes(detector: Detector, first: Sequence[Recording], samples: int) -> None:
    """Refuse too few samples for groups of their own before they are made.

    Raises:
        ValueError: They are.
    """
    counts = Counter[Any]()
    for each in first:
        counts[each.found.call.sample.shape[1:]] += each.found.count
    needed = detector.minimum_group + _SPREAD * math.sqrt(detector.minimum_group)
    share = min(counts.values()) / counts.total() * detector.calibration_fraction
    if samples * share < needed:
        raise ValueError(
            f"Expected at least {math.ceil(needed / share)} samples, so that each of {len(counts)} "
            f"sizes has minimum_group={detector.minimum_group} calibration samples, got samples="
            f"{samples}: make more, or expect fewer of each."
        )


def _check_groups(detector: Detector) -> None:
    """Refuse a detector that would score nothing.

    Raises:
        ValueError: It has no group of its own.
    """
    fitted = detector.fitted
    if fitted.groups_of_adapter and fitted.grouped is not None and not fitted.grouped.large:
        raise ValueError(
            f"Expected a size with minimum_group={detector.minimum_group} calibration samples, got "
            f"{dict(Counter(fitted.grouped.labels))}: give more samples, or a smaller minimum."
        )


def _origin(pipe: Any, data: Any, watches: What | None, calls: Sequence[Call]) -> Origin:
    if watches is not None:
        word("watches", watches, get_args(What))
    if data is not None:
        return Origin(watches or "inputs", "images")
    settings, *others = (settings_in(original_class(pipe), each) for each in calls)
    alike = {k: v for k, v in settings.items() if all(other.get(k) == v for other in others)}
    return Origin(watches or "outputs", "own samples", alike)


def replayed_bound(
    pipe: Any,
    *,
    call: Call | None = None,
    levels: Sequence[int] = LEVELS,
    ratios: Literal[2, 3] | Sequence[float] = 2,
    condition_check: bool = False,
    seed: int = SEED,
) -> ReplayedBound:
    """The adapter of a pipeline, as :func:`fit_pipeline` makes it, to load a saved detector with.

    Args:
        pipe: The pipeline.
        call: Arguments of a call, for a few steps of which the pipeline is run.
        levels: Those that the detector was fitted at.
        ratios: As of the fit.
        condition_check: As of the fit.
        seed: That of the fit.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    seed, arguments = seed_of("seed", seed), dict(call or {})
    found = _call_to_read(pipe, arguments, seed)
    unguided = partial(unguided_steps, pipe, arguments, seed)
    schedule, boundary = NoiseSchedule.of(pipe.scheduler), boundary_of(pipe)
    reading = read(found.call, found.count, schedule, unguided, boundary)
    with scorable(pipe, denoiser_of(pipe)):
        return ReplayedBound(
            denoiser_of(pipe),
            pipe.scheduler,
            reading,
            found.call,
            found.count,
            controlnet=getattr(pipe, "controlnet", None),
            levels=levels,
            seed=seed,
            ratios=ratios,
            condition_check=condition_check,
        )


def _call_to_read(pipe: Any, arguments: dict[str, Any], seed: int) -> RecordedCall:
    """A call of a few steps; of two experts, of as many as make both denoise.

    Raises:
        ValueError: One of them does not.
    """
    boundary = boundary_of(pipe)
    for steps in (None,) if boundary is None else _STEPS_OF_BOTH:
        found = record_call(pipe, arguments, seed, "reading", steps=steps)
        if boundary is None or {0, 1} <= set(found.call.experts):
            return found
    raise ValueError(
        f"Expected a call in which both transformers denoise, of which each is verified, got "
        f"{type(pipe).__name__} that calls one of them at the times of {steps} steps with its "
        f"boundary at {boundary:g}."
    )


def _steps_of(parts: Any, data: Any, watches: What | None) -> int:
    """How many last steps of calls a detector of such parts looks at.

    Raises:
        ValueError: Any of images, which no call made.
    """
    if "own_calls" not in [getattr(part, "kind", part) for part in parts or ()]:
        return 0
    if data is not None or watches == "inputs":
        raise ValueError(
            "Expected a detector of the pipeline's own samples, for its outputs, with the part "
            f"'own_calls', got {'images' if data is not None else 'one for inputs'}, which no call "
            "of it made: fit without images."
        )
    return STEPS
