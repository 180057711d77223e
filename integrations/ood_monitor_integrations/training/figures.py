"""Figures of all samples of a stage, and sinks that outlive it."""

import math

import numpy as np
import torch

from ood_monitor import Alert, Scores
from ood_monitor.alerts import Sink, Summary
from ood_monitor_integrations.training.stage_scores import StageScores

__all__ = ["LeftOpen", "figures"]


class LeftOpen:
    """A sink that outlives the monitor of one stage: closing is left to whoever made it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, alert: Alert, /) -> None:
        """Pass it on."""
        self._sink(alert)

    def summarise(self, summary: Summary, /) -> None:
        """Pass it on to a sink that shows running figures."""
        if callable(show := getattr(self._sink, "summarise", None)):
            show(summary)


def figures(recorded: StageScores, fpr: float) -> dict[str, float]:
    """Figures of all samples of a stage, and of each dataloader's if there are several.

    Those of a dataloader stand under its index. What is not finite is left out.
    """
    found = _figures(recorded.scores, fpr)
    loaders = np.unique(recorded.dataloader_index)
    for loader in loaders if len(loaders) > 1 else ():
        rows = np.flatnonzero(recorded.dataloader_index == loader)
        own = _figures(recorded.scores.take(torch.from_numpy(rows)), fpr)
        found |= {f"{loader}/{name}": value for name, value in own.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _figures(scores: Scores, fpr: float) -> dict[str, float]:
    valid = scores.valid
    if not valid.any():
        return {"invalid": float(len(valid))}
    score = scores.score[valid].double().numpy()
    return {
        "score_mean": float(score.mean()),
        "score_p95": float(np.quantile(score, 0.95)),
        "flagged_rate": float((scores.p_value[valid] <= fpr).double().mean()),
        "invalid": float((~valid).sum()),
    }
