"""Detectors and monitors whose p-values are within groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_cases import SMALL, randn
from torch import Tensor

import ood_monitor as om
from ood_monitor.calibration import ConformalPValue

BRANCHES = SMALL["branches"]
N = 1200


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of two classes; the second, a fifth, has gradients three times as large."""
    labels = (torch.arange(n) % 5 == 0).long()
    scale = (1 + 2 * labels.double())[:, None]
    return randn(n, 6, seed=seed) * scale, labels


def detector(**options: Any) -> om.Detector:
    made = om.Detector(
        BRANCHES(), density=om.DiagonalGaussian(), groups=lambda batch: batch[1], **options
    )
    return made.fit([batch(N)], progress=False)


def test_p_values_are_against_scores_of_the_own_group() -> None:
    found, new = detector(), batch(40, seed=1)
    scores = found.score(new)
    grouped = found.fitted.grouped
    assert grouped is not None
    groups = np.array(grouped.groups)
    for label in (0, 1):
        own = ConformalPValue.fit(grouped.scores[groups == str(label)])
        members = (new[1] == label).numpy()
        expected = own.p_value(scores.score.numpy()[members])
        assert np.array_equal(scores.p_value.numpy()[members], expected)


def test_each_group_is_flagged_as_often_as_promised() -> None:
    with_groups, new = detector(), batch(2000, seed=1)
    without = om.Detector(BRANCHES(), density=om.DiagonalGaussian())
    without.fit([batch(N)], progress=False)
    rates = {
        name: [(d.score(new).p_value[new[1] == label] <= 0.1).double().mean() for label in (0, 1)]
        for name, d in (("with", with_groups), ("without", without))
    }
    assert all(0.05 < rate < 0.16 for rate in rates["with"])
    assert max(rates["without"]) > 2 * min(rates["without"])


def test_scores_do_not_depend_on_groups() -> None:
    new = batch(20, seed=1)
    plain = om.Detector(BRANCHES(), density=om.DiagonalGaussian()).fit([batch(N)], progress=False)
    assert torch.equal(detector().score(new).score, plain.score(new).score)


def test_a_saved_detector_keeps_its_groups(tmp_path: Path) -> None:
    found, new = detector(minimum_group=50), batch(20, seed=1)
    found.save_pretrained(tmp_path)
    loaded = om.Detector.from_pretrained(tmp_path, BRANCHES(), groups=lambda batch: batch[1])
    assert torch.equal(loaded.score(new).p_value, found.score(new).p_value)
    assert loaded.minimum_group == 50
    state = om.Detector.from_state_dict(
        found.state_dict(), BRANCHES(), groups=lambda batch: batch[1]
    )
    assert torch.equal(state.score(new).p_value, found.score(new).p_value)


def test_groups_are_asked_for_where_there_were_groups(tmp_path: Path) -> None:
    detector().save_pretrained(tmp_path / "with")
    om.Detector(BRANCHES()).fit([batch(N)], progress=False).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="as the detector was fitted, with groups, got it without"):
        om.Detector.from_pretrained(tmp_path / "with", BRANCHES())
    with pytest.raises(ValueError, match="was fitted, without groups, got it with"):
        om.Detector.from_pretrained(tmp_path / "without", BRANCHES(), groups=lambda batch: batch[1])


def test_a_monitor_flags_within_groups() -> None:
    found = detector()
    monitor = om.Monitor(found, fpr=0.02)
    usual = batch(200, seed=1)
    monitor.update(usual)
    assert monitor.last is not None
    assert torch.equal(monitor.last.p_value, found.score(usual).p_value)


def test_a_monitor_scores_the_finite_samples_within_their_groups() -> None:
    monitor = om.Monitor(detector(), fpr=0.02)
    x, labels = batch(10, seed=1)
    x[3] = torch.nan
    monitor.update((x, labels))
    assert monitor.last is not None
    assert monitor.last.valid.tolist() == [i != 3 for i in range(10)]


def test_a_rate_that_the_smallest_group_cannot_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 199 calibration samples, got 1"):
        om.Monitor(detector(), fpr=0.005)


@pytest.mark.parametrize(
    "groups", [lambda batch: [1, 2], lambda batch: "a" * N, lambda batch: torch.tensor(1)]
)
def test_one_group_a_sample_is_asked_for(groups: Any) -> None:
    with pytest.raises(ValueError, match=f"one group for each of {N} samples, got"):
        om.Detector(BRANCHES(), groups=groups).fit([batch(N)], progress=False)
