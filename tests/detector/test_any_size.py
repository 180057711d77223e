"""One detector for samples of several sizes, in groups that its adapter tells."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.model_case import Function
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.drift.stream import StreamTest
from ood_monitor.saving.card import model_card, told_groups

SIDES = (8, 12)


def denoiser() -> om.DenoisingBound:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1))
    network = Function(lambda m, x, t: m.net(x), net=net)
    return om.DenoisingBound(network, torch.linspace(0.9999, 0.01, 1000))


def images(side: int, count: int = 130, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * side + seed)
    return torch.rand(count, 1, side, side, generator=generator)


@cache
def fitted() -> om.Detector:
    detector = om.Detector(denoiser(), any_size=True, minimum_group=40, explain=0)
    # In turn, as batches of several sizes come: neighbours are alike, and it is no fault.
    batches = [
        own for pair in zip(*(images(s).split(10) for s in SIDES), strict=True) for own in pair
    ]
    return detector.fit(batches, progress=False)


def test_groups_are_those_of_the_shapes_and_come_back_from_files(tmp_path: Path) -> None:
    detector = fitted()
    grouped = detector.fitted.grouped
    assert grouped is not None
    assert grouped.large == ("1x12x12", "1x8x8")
    detector.save_pretrained(tmp_path)
    loaded = om.Detector.from_pretrained(tmp_path, denoiser())
    assert loaded.any_size
    assert loaded.fitted.groups_of_adapter
    for side, group in zip(SIDES, (1, 0), strict=True):
        found, expected = (d.score(images(side, 3, seed=1)) for d in (loaded, detector))
        assert torch.equal(found.p_value, expected.p_value)
        assert found.group is not None
        assert found.group.tolist() == [group] * 3
        own = grouped.scores_of(group)
        p = [(1 + (own >= score).sum()) / (len(own) + 1) for score in expected.score.tolist()]
        assert expected.p_value.tolist() == pytest.approx(p)
    with pytest.raises(ValueError, match="Expected none as `groups`, as when the detector was"):
        om.Detector.from_pretrained(tmp_path, denoiser(), groups=lambda batch: [])


def test_groups_of_the_user_are_taken_in_place_of_the_adapters(tmp_path: Path) -> None:
    widths = {"groups": lambda batch: [batch.shape[-1]] * len(batch)}
    detector = om.Detector(denoiser(), any_size=True, minimum_group=40, **widths)
    detector.fit(map(images, SIDES), progress=False)
    assert told_groups(detector.fitted) == "2"
    detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected a function as `groups`, .*, got none"):
        om.Detector.from_pretrained(tmp_path, denoiser())
    assert om.Detector.from_pretrained(tmp_path, denoiser(), **widths).any_size


def test_one_size_is_a_detector_as_before() -> None:
    detector = om.Detector(denoiser(), explain=0).fit([images(8)], progress=False)
    assert "any_size" not in detector._options()
    assert detector.fitted.grouped is None
    with pytest.raises(ValueError, match=r"fitted on, \(1, 8, 8\).*got \(1, 12, 12\)"):
        detector.score(images(12))


def test_another_size_is_scored_and_never_flagged() -> None:
    scores = fitted().score(images(16, 3))
    assert scores.valid.all()
    assert scores.p_value.tolist() == [1.0] * 3


@pytest.mark.parametrize("other", [images(8)[:, 0], images(8).double()], ids=["dimensions", "type"])
def test_other_dimensions_and_types_are_refused(other: Tensor) -> None:
    detector = om.Detector(denoiser(), any_size=True, minimum_group=40, explain=0)
    detector.fit([images(8)], progress=False)
    with pytest.raises(ValueError, match="Expected samples as the detector was fitted on"):
        detector.check(other)


def test_a_card_says_which_groups_there_are_and_asks_for_no_function() -> None:
    detector = fitted()
    text = model_card(detector.fitted, detector._options())
    assert "2, by size and adapters: 1x12x12, 1x8x8" in text
    assert "groups=groups" not in text


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gradient_norms"},
        {"method": "both"},
        {"parts": ["energies", "values"]},
        {"granularity": "row"},
        {"density": om.TermsAndNorms()},
    ],
    ids=lambda options: " ".join(options),
)
def test_other_methods_and_parts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="any_size=True with method='forward' of a denoiser alone"):
        om.Detector(denoiser(), any_size=True, **options)


def test_other_models_are_refused() -> None:
    flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
    detector = om.Detector(om.LogLikelihood(flow), any_size=True)
    with pytest.raises(ValueError, match=r"a denoiser alone.*'expected_norms', 'values'"):
        detector.fit([images(8)], progress=False)


# A change of the mix in control is no drift.


def run_time(mix: bool, seed: int, *, ert: float = 200, cap: int = 2000) -> int:
    """To an alarm of normal scores, of which soon nine in ten are of the second group."""
    generator = np.random.default_rng([7, seed])
    groups = generator.choice(2, 100, p=[0.5, 0.5])
    scores = generator.normal(size=100) + 20 * groups
    test = StreamTest(scores, ert=ert, seed=seed, groups=groups, group_count=2, mix=mix)
    for n in range(1, cap):
        group = int(generator.random() < (0.5 if n <= 20 else 0.9))
        if test.update(generator.normal() + 20 * group, group).alarm:
            return n
    return cap


def test_a_change_of_the_mix_keeps_the_run_time() -> None:
    # Run times are about exponential, with a mean above 200: the mean of 150 is short by three
    # standard errors in fewer than one of 700 runs of other seeds.
    times = [run_time(False, seed) for seed in range(150)]
    assert np.mean(times) >= 200 - 3 * np.std(times) / math.sqrt(len(times))
    assert np.median([run_time(True, seed) for seed in range(20)]) < 150  # a test of it would tell


def test_a_monitor_of_any_size_does_not_test_the_mix() -> None:
    # Of 200 normal samples a false drift alert comes in fewer than 200 of 10 000 runs.
    watch = om.Monitor(fitted(), ert=10_000, fpr=0.05)
    alerts = watch.update(images(12, 200, seed=2))
    assert "drift" not in {alert.kind for alert in alerts}
    state = watch.state_dict()
    other = om.Monitor(fitted(), ert=10_000, fpr=0.05)
    other.load_state_dict(state)
    assert other.state_dict()["drift"] == state["drift"]
