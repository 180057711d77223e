"""The share of false discoveries, by simulation, and how a stream is cut into windows."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ood_monitor_integrations.online_fdr import Discoveries

import ood_monitor as om
from ood_monitor.calibration import ConformalPValue


def scores(p_values: NDArray[np.float64]) -> om.Scores:
    p = torch.as_tensor(p_values)
    return om.Scores(p, p, p, {}, {}, ~p.isnan())


def stream(
    n_calibration: int, share: float, seed: int, n: int = 2000
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Conformal p-values, and which samples are anomalous."""
    generator = np.random.default_rng(seed)
    calibration = ConformalPValue.fit(generator.normal(size=n_calibration))
    odd = generator.random(n) < share
    return calibration.p_value(generator.normal(size=n) + 4.0 * odd), odd


@pytest.mark.parametrize(("n_calibration", "least_power"), [(500, 0.0), (2000, 0.6), (10_000, 0.8)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_few_of_those_named_are_normal(
    n_calibration: int, least_power: float, share: float
) -> None:
    false, power = [], []
    for seed in range(40):
        p_values, odd = stream(n_calibration, share, seed)
        named = np.zeros(len(odd), dtype=bool)
        named[Discoveries(fdr=0.1).update(scores(p_values))] = True
        false.append((named & ~odd).sum() / max(named.sum(), 1))
        power.append((named & odd).sum() / max(odd.sum(), 1))
    # A mean of 40 shares, each with a deviation of .3 at most, that of a lone false discovery.
    assert np.mean(false) < 0.1 + 3 * max(np.std(false), 0.02) / math.sqrt(40)
    assert share == 0 or np.mean(power) >= least_power


def test_far_more_are_false_at_a_false_positive_rate() -> None:
    p_values, odd = stream(10_000, 0.02, seed=0, n=5000)
    flagged = p_values <= 0.01
    named = Discoveries(fdr=0.1).update(scores(p_values))
    assert (flagged & ~odd).sum() / flagged.sum() > 0.25
    assert len(named) > 50
    assert np.mean(~odd[named]) < 0.1


@pytest.mark.parametrize("size", [1, 37, 2000])
def test_batches_change_nothing(size: int) -> None:
    p_values, _ = stream(2000, 0.05, seed=1)
    found = Discoveries(window=150)
    batches = np.split(p_values, range(size, 2000, size))
    parts = [found.update(scores(batch)) for batch in batches] + [found.flush()]
    whole = Discoveries(window=150)
    together = whole.update(scores(p_values)) + whole.flush()
    assert [named for part in parts for named in part] == together
    assert found.flush() == []


def test_what_was_not_scored_counts_and_is_not_named() -> None:
    p_values, _ = stream(2000, 0.2, seed=2, n=300)
    named = Discoveries().update(scores(p_values))
    spread = np.insert(p_values, [0, 10, 200], np.nan)
    found = Discoveries().update(scores(spread))
    kept = np.flatnonzero(~np.isnan(spread))
    assert named
    assert found == kept[named].tolist()


@pytest.mark.parametrize(("fdr", "window"), [(0.0, 100), (1.0, 100), (math.nan, 100), (0.1, 0)])
def test_a_rate_or_window_that_will_not_do_is_refused(fdr: float, window: int) -> None:
    with pytest.raises(ValueError, match=r"rate in \(0, 1\) and a window of at least 1, got"):
        Discoveries(fdr, window)
