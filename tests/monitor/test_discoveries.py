"""The share of false discoveries by window, by simulation, and how a stream is cut into windows."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ood_monitor as om
from ood_monitor.calibration import ConformalPValue


def scores(p_values: NDArray[np.float64]) -> om.Scores:
    p = torch.as_tensor(p_values)
    return om.Scores(p, p, p, {}, {}, ~p.isnan())


def stream(
    n_calibration: int, odd: NDArray[np.bool_], seed: int, shift: float = 8.0
) -> NDArray[np.float64]:
    """Conformal p-values, of samples of which some are anomalous."""
    generator = np.random.default_rng(seed)
    calibration = ConformalPValue.fit(generator.normal(size=n_calibration))
    return calibration.p_value(generator.normal(size=len(odd)) + shift * odd)


def named(p_values: NDArray[np.float64], found: om.Discoveries) -> NDArray[np.bool_]:
    """Of whole windows."""
    is_named = np.zeros(len(p_values), dtype=bool)
    is_named[found.update(scores(p_values))] = True
    return is_named


@pytest.mark.parametrize("quiet", [0, 10, 50, 200])
@pytest.mark.parametrize("n_calibration", [999, 5000])
def test_an_outbreak_is_named_however_long_it_was_quiet_before(
    n_calibration: int, quiet: int
) -> None:
    for seed in range(10):
        outbreak = np.random.default_rng(seed).random(500) < 0.5
        odd = np.concatenate([np.zeros(100 * quiet, dtype=bool), outbreak])
        p_values = stream(n_calibration, odd, seed)
        is_named = named(p_values, om.Discoveries(n_calibration, fdr=0.1, window=100))
        # At 8 standard deviations all are beyond all calibration scores.
        assert is_named[odd].all()


@pytest.mark.parametrize("n_calibration", [999, 5000])
def test_a_lone_anomaly_of_a_window_is_named(n_calibration: int) -> None:
    odd = np.arange(100) == 30
    found = [
        named(stream(n_calibration, odd, seed), om.Discoveries(n_calibration))[30]
        for seed in range(20)
    ]
    assert all(found)


@pytest.mark.slow
@pytest.mark.parametrize("n_calibration", [999, 5000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("fdr", [0.1, 0.3])
def test_few_of_those_named_in_a_window_are_normal(
    fdr: float, share: float, n_calibration: int
) -> None:
    """Mean shares of 300 calibration sets, each with ten windows.

    The mean of a calibration set is in [0, 1]; were its expectation the rate promised, their mean
    would exceed it by four standard errors with probability 3e-5 in each of the twelve cases. It is
    promised (1 - share) of that.
    """
    means = []
    for seed in range(300):
        odd = np.random.default_rng(1000 + seed).random(1000) < share
        p_values = stream(n_calibration, odd, seed, shift=3.0)
        is_named = named(p_values, om.Discoveries(n_calibration, fdr=fdr)).reshape(-1, 100)
        false = (is_named & ~odd.reshape(-1, 100)).sum(1)
        means.append((false / is_named.sum(1).clip(1)).mean())
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert np.mean(means) <= fdr * (1 - share) + 4 * error


def test_far_more_are_false_at_a_false_positive_rate() -> None:
    odd = np.random.default_rng(5).random(5000) < 0.02
    p_values = stream(10_000, odd, seed=0, shift=4.0)
    flagged, is_named = p_values <= 0.01, named(p_values, om.Discoveries(10_000))
    assert (flagged & ~odd).sum() / flagged.sum() > 0.25
    assert is_named.sum() > 50
    assert (is_named & ~odd).sum() / is_named.sum() < 0.25


def by_hand(p_values: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """Named are all up to the largest p-value that is among so many as small."""
    count = len(p_values)
    kept = [p for p in p_values if p <= fdr * (p_values <= p).sum() / count + 1e-12]
    return p_values <= max(kept, default=-1.0)


def test_several_of_a_window_are_evidence_together() -> None:
    p_values = mixed(3, 2000, shift=3.0)
    expected = np.concatenate([by_hand(window, 0.1) for window in np.split(p_values, 20)])
    assert (named(p_values, om.Discoveries(2000)) == expected).all()
    alone = p_values <= 0.1 / 100
    assert expected.sum() > 1.5 * alone.sum()


def mixed(seed: int, n: int, shift: float = 8.0) -> NDArray[np.float64]:
    return stream(2000, np.random.default_rng(seed).random(n) < 0.2, seed, shift)


@pytest.mark.parametrize("size", [1, 37, 2000])
def test_batches_change_nothing(size: int) -> None:
    p_values = mixed(1, 2000)
    found, whole = om.Discoveries(2000, window=150), om.Discoveries(2000, window=150)
    batches = np.split(p_values, range(size, 2000, size))
    parts = [found.update(scores(batch)) for batch in batches] + [found.flush()]
    together = whole.update(scores(p_values)) + whole.flush()
    assert [at for part in parts for at in part] == together
    assert together[-1] >= 1950  # of the window that was not full
    assert found.flush() == []


def test_what_was_not_scored_counts_and_is_in_no_window() -> None:
    p_values = mixed(2, 300)
    expected = om.Discoveries(2000).update(scores(p_values))
    spread = np.insert(p_values, [0, 10, 200], np.nan)
    found = om.Discoveries(2000).update(scores(spread))
    assert expected
    assert found == np.flatnonzero(~np.isnan(spread))[expected].tolist()


@pytest.mark.parametrize(("fdr", "window"), [(0.1, 100), (0.3, 6), (0.15, 12), (0.99, 1)])
def test_with_as_many_scores_as_are_asked_for_the_smallest_p_value_is_named_alone(
    fdr: float, window: int
) -> None:
    with pytest.raises(ValueError, match="Expected at least") as error:
        om.Discoveries(0, fdr=fdr, window=window)
    needed = int(str(error.value).split()[3])
    p_values = np.array([1 / (needed + 1), *[1.0] * (window - 1)])
    assert om.Discoveries(needed, fdr=fdr, window=window).update(scores(p_values)) == [0]
    assert needed == 1 or fdr / window < 1 / needed
    text = f"Expected at least {needed} calibration scores, .* of {window} at .* got {needed - 1}:"
    with pytest.raises(ValueError, match=text):
        om.Discoveries(needed - 1, fdr=fdr, window=window)


def test_the_window_that_a_refusal_offers_will_do() -> None:
    with pytest.raises(ValueError, match="a window of at most 50") as error:
        om.Discoveries(500)
    assert "at least 999 calibration scores" in str(error.value)
    om.Discoveries(500, window=50)


def detector(**options: object) -> om.Detector:
    flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
    images = torch.rand(600, 1, 4, 4).split(100)
    return om.Detector(om.LogLikelihood(flow), **options).fit(images, progress=False)  # type: ignore[arg-type]


def test_a_detector_says_how_many_scores_it_has() -> None:
    made = detector()
    n = len(made.fitted.calibration.scores)
    with pytest.raises(ValueError, match=f"got {n}:"):
        om.Discoveries(made, window=100)
    om.Discoveries(made, window=(n + 1) // 10)


def test_of_groups_the_largest_counts_and_others_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def dark(batch: torch.Tensor) -> list[str]:
        return ["dark" if x.mean() < 0.4 else "light" for x in batch]

    made = detector(groups=dark, minimum_group=50)
    assert made.fitted.grouped is not None
    most = made.fitted.grouped.most
    assert 50 < most < len(made.fitted.calibration.scores)
    om.Discoveries(made, fdr=0.1, window=most // 10)
    assert "Too few calibration samples" in caplog.text
    assert "'others' has " in caplog.text
    with pytest.raises(ValueError, match=f"in a group if there are any.* got {most}:"):
        om.Discoveries(made, fdr=0.1, window=most // 10 + 1)


def test_a_detector_that_is_not_fitted_is_refused() -> None:
    flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
    with pytest.raises(RuntimeError, match="fit"):
        om.Discoveries(om.Detector(om.LogLikelihood(flow)))
