"""What stops, keeps or slows a training by a metric of the monitor: whether it will be there."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ood_monitor_integrations.metrics import prefix_of
from ood_monitor_integrations.training.failures import Failures

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["refuse_unfed_monitors"]

_OF_LOADER = frozenset({"score_mean", "score_p95", "flagged_rate", "invalid"})
_OF_STAGE = _OF_LOADER | {"status", "log_e_value"}
_OF_TRAINING = frozenset({"score_mean", "flagged_rate"})


def refuse_unfed_monitors(
    trainer: "Trainer",
    words: tuple[str, ...],
    failures: Failures,
    *,
    stages: frozenset[str],
    has_detector: bool,
    recalibrates: bool,
    strict: bool,
) -> None:
    """Refuse a callback or scheduler that waits for a metric which this training will not log.

    One that is told to go on without it (its own ``strict=False``) is warned of only.

    Args:
        trainer: It has the callbacks.
        words: Of the monitor's metrics, before that of the stage.
        failures: Told of what is not refused.
        stages: Those watched.
        has_detector: Whether one was given, which watches the validation of `fit`.
        recalibrates: Whether one is fitted while training.
        strict: Whether anything is refused.

    Raises:
        ValueError: There is one; the text says which, and what to give.
    """
    is_fed = has_detector or recalibrates
    prefix = f"{prefix_of(*words)}/"
    for who, name, is_needed in _monitors(trainer):
        if not name.startswith(prefix):
            continue
        if missing := _missing(name.removeprefix(prefix).split("/"), stages, is_fed=is_fed):
            told = f"{who} monitors {name!r}, which is not logged: {missing}"
            if strict and is_needed:
                raise ValueError(told)
            failures.tell("has no metric that another waits for", told)


def _missing(parts: list[str], stages: frozenset[str], *, is_fed: bool) -> str | None:
    """Why a metric will not be there and what to do, or None if it will be, or is another's."""
    stage, figure = parts[0], parts[-1]
    if stage in ("test", "predict"):
        return "that stage is no part of `fit`. Monitor one of 'val'."
    if stage not in ("train", "val"):
        return None
    if stage not in stages:
        return f"give OODMonitor `watch=[..., {stage!r}]`."
    known = _OF_TRAINING if stage == "train" else _OF_STAGE if len(parts) == 2 else _OF_LOADER
    if figure not in known:
        return f"of {stage!r} there are {', '.join(sorted(known))}."
    if stage == "val" and not is_fed:
        return (
            "there is no detector before training ends. Give OODMonitor "
            "`calibrate_every_n_epochs=1`, with `held_out=` data of their own so that validation "
            "data are new to it, or a fitted one, `detector=`."
        )
    return None


def _monitors(trainer: "Trainer") -> Iterator[tuple[str, str, bool]]:
    """What goes by a metric, the metric, and whether it cannot go on without it."""
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    each: list[tuple[object, Any]] = [(callback, callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    each += [(config.scheduler, config) for config in plateaus]
    for owner, settings in each:
        name = getattr(settings, "monitor", None)
        if isinstance(name, str):
            yield type(owner).__name__, name, bool(getattr(settings, "strict", True))
