"""How long scoring a sample takes, in forward passes of its denoiser."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ood_monitor.adapters.base import Batch
from ood_monitor.statistics import denoiser_statistics
from ood_monitor_integrations.diffusers.replay import ReplayedBound

__all__ = ["forwards_without_noise", "times_of"]


def forwards_without_noise(bound: ReplayedBound, batch: Batch, rounds: int) -> tuple[float, float]:
    """Milliseconds of scoring samples without noise, and the same in forward passes on them."""
    return times_of(bound, batch, rounds, partial(_without_noise, bound, batch))


def times_of(
    bound: ReplayedBound, batch: Batch, rounds: int, run: Callable[[], Tensor]
) -> tuple[float, float]:
    """Milliseconds of a run, median over rounds, and the same in forward passes on a batch."""
    run()  # whose first use of a model checks it
    plain = partial(_forward, bound, batch)
    times: dict[Callable[[], Tensor], list[float]] = {run: [], plain: []}
    for _ in range(rounds):
        for each, spent in times.items():
            start = time.perf_counter()
            each().cpu()  # waits for the device
            spent.append(time.perf_counter() - start)
    mine, forward = map(statistics.median, times.values())
    return 1000 * mine, mine / forward


def _without_noise(bound: ReplayedBound, batch: Batch) -> Tensor:
    return next(iter(denoiser_statistics(bound, batch).energies.values()))


@torch.no_grad()
def _forward(bound: ReplayedBound, batch: Batch) -> Tensor:
    return next(iter(bound.residuals(batch)))[1]
