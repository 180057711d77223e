"""Options that the callbacks of all trainers have, checked where they are given."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

from ood_monitor import TrainingStream
from ood_monitor.alerts import Sink
from ood_monitor.checks import (
    batches,
    flag,
    function,
    items,
    meant,
    number,
    path_of,
    text,
    whole,
    word,
)
from ood_monitor_integrations.training.figures import LeftOpen

__all__ = [
    "Policy",
    "Settings",
    "checked_every",
    "checked_held_out",
    "checked_policy",
    "checked_stages",
    "checked_stream",
]

#: Which checkpoints of a training get a detector.
Policy: TypeAlias = Literal["best", "every checkpoint", "last", "never"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chose of the stages that are watched; see the callbacks' options.

    Attributes:
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        every: Score every n-th batch.
        sinks: Told of alerts, and left open.
        scores_dir: Where to write scores, if anywhere.
        log_alerts: Whether what the trainer logs to is told too.
        console: Whether a line is printed of each alert.
        name: Of the streams.
    """

    ert: float
    fpr: float
    every: int
    sinks: Sequence[LeftOpen]
    scores_dir: Path | None
    log_alerts: bool
    console: bool
    name: str

    @classmethod
    def checked(
        cls,
        *,
        ert: float,
        fpr: float,
        every_n_batches: int,
        sinks: Sequence[Sink],
        scores_dir: str | Path | None,
        log_alerts: bool,
        console: bool,
        name: str,
        **others: Any,
    ) -> Self:
        """From options as they were given; ``others`` are a subclass's own, checked before.

        Raises:
            ValueError: One is out of its range.
            TypeError: One is of another type.
        """
        return cls(
            ert=number("ert", ert, 2, ends="[)"),
            fpr=number("fpr", fpr, 0, 1, ends="()"),
            every=whole("every_n_batches", every_n_batches, 1),
            sinks=[LeftOpen(function("a sink", sink)) for sink in items("sinks", sinks)],
            scores_dir=None if scores_dir is None else path_of("scores_dir", scores_dir),
            log_alerts=flag("log_alerts", log_alerts),
            console=flag("console", console),
            name=text("name", name),
            **others,
        )


def checked_stages(
    watch: Sequence[Any], known: Sequence[str], others: Mapping[Any, str]
) -> frozenset[str]:
    """The stages to watch.

    Args:
        watch: As they were given.
        known: What they are called.
        others: What else people call them, by that name.

    Raises:
        ValueError: One is none of these.
    """
    stages = [others.get(stage, stage) for stage in items("watch", watch)]
    if unknown := [stage for stage in stages if stage not in known]:
        raise ValueError(
            f"Expected stages of {', '.join(known)} to watch, got {unknown}."
            f"{meant(unknown[0], known)}"
        )
    return frozenset(stages)


def checked_held_out(held_out: Any) -> Any:
    """Batches that each calibration can go through anew, or None."""
    if held_out is None:
        return None
    if isinstance(held_out, Iterator):
        raise TypeError(
            "Expected held_out as batches that can be gone through again, as a loader or a list, "
            f"got an iterator, {type(held_out).__name__}."
        )
    return batches("held_out", held_out)


def checked_every(name: str, every: int | None, held_out: Any) -> int | None:
    """How often to calibrate within a training, if at all.

    Args:
        name: What the option is called.
        every: What was given.
        held_out: The data of calibrations, if any were given.
    """
    if every is None:
        return None
    if held_out is None:
        raise ValueError(
            f"Expected `held_out=` with `{name}`, got None: data that calibrated a detector are no "
            "news to it."
        )
    return whole(name, every, 1)


def checked_policy(calibrate: Policy | None, *, is_given: bool, is_needed: bool) -> Policy | None:
    """Which checkpoints get a detector; None for what a trainer's own settings ask for.

    Args:
        calibrate: What was given.
        is_given: Whether a detector was: without a word none is fitted beside it.
        is_needed: Whether anything is watched that takes one.
    """
    policy = None if calibrate is None else word("calibrate", calibrate, get_args(Policy))
    return "never" if not is_needed or (calibrate is None and is_given) else policy


def checked_stream(training: TrainingStream | None) -> TrainingStream:
    """The settings of the training stream, the usual ones if none were given."""
    if training is None:
        return TrainingStream()
    if not isinstance(training, TrainingStream):
        raise TypeError(f"Expected training as a TrainingStream, got {training!r}.")
    return training
