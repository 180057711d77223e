"""A detector elsewhere and later: verified by remembered samples, calibrated on others."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_cases import SMALL
from torch import Tensor

import ood_monitor as om
from ood_monitor.calibration.conformal import ConformalPValue
from ood_monitor.saving.probe import Probe

BRANCHES = SMALL["branches"]


def data(n: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * BRANCHES.data(n, seed=seed)


def fitted(adapter: om.Adapter | None = None, **options: Any) -> om.Detector:
    made = om.Detector(adapter or BRANCHES(), method="forward", **options)
    return made.fit(data(400, 3).split(50), progress=False)


# Copies


def test_copies_among_held_out_samples_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.cat([(x := data(300, 3)), x[:40], x[:1]])
    om.Detector(BRANCHES(), method="forward").fit(x.split(64), progress=False)
    assert "41 of 341 held-out samples are copies of others" in caplog.text


def test_samples_that_are_all_different_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    fitted()
    assert "copies" not in caplog.text


def test_a_sample_is_told_apart_by_every_tensor_of_its_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, labels = torch.cat([data(100, 3)] * 2), torch.arange(200)
    om.Detector(BRANCHES(), method="forward").fit([(x, labels)], progress=False)
    assert "copies" not in caplog.text


# Verification


def test_a_detector_is_verified_where_it_was_fitted(tmp_path: Path) -> None:
    detector = fitted()
    found = detector.verify(data(400, 3).split(30))
    assert (found.found, found.remembered, found.steps, found.difference) == (16, 16, 0, 0.0)
    detector.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, BRANCHES())
    assert loaded.verify([data(400, 3)]).steps == 0


def test_remembered_samples_are_those_of_the_calibration_from_least_to_most() -> None:
    probe = fitted().fitted.probe
    assert probe is not None
    calibration = fitted().fitted.calibration
    assert set(probe.scores) <= set(calibration.scores)
    assert (min(probe.scores), max(probe.scores)) == (calibration.scores[0], calibration.scores[-1])


def test_no_sample_is_remembered_itself(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path, card=False)
    probe = json.loads((tmp_path / "config.json").read_text())["probe"]
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in probe["samples"])
    assert probe.keys() == {"samples", "scores", "groups"}


class Elsewhere(om.Adapter):
    """The same model, whose sums come out a little otherwise, as on another device."""

    def __init__(self, by: float) -> None:
        self.inner, self.by = BRANCHES(), by
        self.module = self.inner.module

    def log_likelihood(self, batch: Any) -> Any:
        for term, values in self.inner.log_likelihood(batch):
            yield term, values * (1 + self.by)


@pytest.mark.parametrize(("by", "steps"), [(0.0, 0), (0.02, None)])
def test_a_small_difference_is_told_in_steps(by: float, steps: int | None) -> None:
    detector = om.Detector(Elsewhere(0.0), method="gradient_norms")
    detector.fit(data(400, 3).split(50), progress=False)
    other = copy.copy(detector)
    other.adapter = Elsewhere(by)
    found = other.verify([data(400, 3)], fpr=0.9)
    assert found.steps == round(found.difference * 200)
    assert found.steps == steps if steps is not None else found.steps > 0


def test_more_than_half_of_fpr_is_refused_with_what_may_be_at_fault() -> None:
    detector = fitted()
    probe = detector.fitted.probe
    assert probe is not None
    moved = Probe(probe.samples, probe.scores[::-1], probe.groups)
    object.__setattr__(detector.fitted, "probe", moved)
    with pytest.raises(ValueError, match=r"more than half of fpr 0\.01") as caught:
        detector.verify([data(400, 3)])
    for part in ("torch.float64", "on cpu", f"torch {torch.__version__.split('+')[0]}"):
        assert part in str(caught.value)


def test_other_data_verify_nothing() -> None:
    with pytest.raises(ValueError, match=r"hold some of the 16 calibration samples.*got none"):
        fitted().verify([data(400, 4)])
    with pytest.raises(ValueError, match="Expected fpr in"):
        fitted().verify([data(400, 3)], fpr=2)


@pytest.mark.parametrize(
    "probe",
    [
        {"samples": ["a"], "scores": [], "groups": [0]},
        {"samples": ["a", "a"], "scores": [1.0, 1.0], "groups": [0, 0]},
        {"samples": ["a"], "scores": ["1"], "groups": [0]},
        {"samples": ["a"], "scores": [1.0], "groups": ["a"]},
        {"samples": ["a"]},
        [],
    ],
    ids=str,
)
def test_forged_memories_are_refused(probe: Any) -> None:
    from ood_monitor.saving.format import check_settings

    settings = json.loads(fitted().state_dict()["config"])
    check_settings(settings)
    with pytest.raises(ValueError, match=r"probe|remembered"):
        check_settings(settings | {"probe": probe})


def test_samples_in_other_groups_verify_nothing() -> None:
    labels = torch.arange(400) % 2
    made = om.Detector(BRANCHES(), method="forward", groups=lambda b: b[1], minimum_group=40)
    made.fit([(data(400, 3), labels)], progress=False)
    assert made.verify([(data(400, 3), labels)]).steps == 0
    for other in (lambda b: 1 - b[1], lambda b: [f"class {label}" for label in b[1].tolist()]):
        made.groups = other
        with pytest.raises(ValueError, match="Expected each sample in the group that it was in"):
            made.verify([(data(400, 3), labels)])


@pytest.mark.parametrize("call", ["fit", "recalibrate", "verify"])
def test_a_batch_in_place_of_batches_is_refused(call: str) -> None:
    for batch in (data(400, 3), {"x": data(400, 3)}):
        with pytest.raises(
            ValueError, match=r"Expected an iterable of batches, .* pass `\[batch\]`"
        ):
            getattr(fitted(), call)(batch)


# Recalibration


def test_recalibration_keeps_the_densities_and_takes_new_scores() -> None:
    detector, new = fitted(), data(300, 8, scale=1.5)
    before = detector.fitted
    scores = detector.score(new)
    assert (scores.p_value <= 0.05).double().mean() > 0.15
    assert detector.recalibrate(new.split(70), progress=False) is detector
    assert np.array_equal(detector.fitted.calibration.scores, np.sort(scores.score.numpy()))
    assert detector.fitted.joined is before.joined
    again = detector.score(data(2000, 9, scale=1.5))
    # Within .001 of Beta-binomial's interval: 300 scores, 2 000 samples.
    assert 0.01 < (again.p_value <= 0.05).double().mean() < 0.11
    assert detector.verify([new]).steps == 0


def test_recalibration_is_saved(tmp_path: Path) -> None:
    detector = fitted().recalibrate([data(300, 8, scale=1.5)], progress=False)
    detector.save_pretrained(tmp_path)
    loaded = om.Detector.from_pretrained(tmp_path, BRANCHES())
    assert torch.equal(loaded.score(data(10)).p_value, detector.score(data(10)).p_value)


def test_recalibration_is_within_groups() -> None:
    def groups(batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[1]

    labels = torch.arange(400) % 2
    made = om.Detector(BRANCHES(), method="forward", groups=groups, minimum_group=40)
    made.fit([(data(400, 3), labels)], progress=False)
    new = data(400, 8) * (1 + labels[:, None])
    made.recalibrate([(new, labels)], progress=False)
    assert made.fitted.grouped is not None
    scores = made.score((new, labels))
    own = ConformalPValue.fit(scores.score[labels == 1].numpy())
    assert np.array_equal(
        scores.p_value[labels == 1].numpy(), own.p_value(scores.score[labels == 1].numpy())
    )


def test_a_monitor_goes_on_with_the_new_calibration_when_it_is_accepted() -> None:
    detector = fitted()
    monitor = om.Monitor(detector, ert=1e6, fpr=0.02)
    assert "drift" in [a.kind for a in monitor.update(data(200, 9, scale=1.6))]
    detector.recalibrate([data(300, 8, scale=1.6)], progress=False)
    assert monitor.detector.fitted is not detector.fitted
    [alert] = monitor.accept("new sensors", detector)
    assert alert.detector == detector.fitted.fingerprint
    assert "drift" not in [a.kind for a in monitor.update(data(300, 10, scale=1.6))]
    assert monitor.status != "ALERT"


def test_what_cannot_be_recalibrated_leaves_the_detector_as_it_was() -> None:
    detector = fitted()
    before = detector.fitted
    with pytest.raises(ValueError, match="at least 20 scores, got 10"):
        detector.recalibrate([data(10)], progress=False)
    with pytest.raises(ValueError, match="empty loader"):
        detector.recalibrate([], progress=False)
    with pytest.raises(RuntimeError, match="fitted"):
        om.Detector(BRANCHES()).recalibrate([data(50)])
    with torch.no_grad():
        next(detector.adapter.module.parameters()).add_(0.1)
    with pytest.raises(ValueError, match=r"with the weights .* fit a detector of them"):
        detector.recalibrate([data(100)], progress=False)
    assert detector.fitted is before


def test_a_sample_that_cannot_be_scored_calibrates_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def walled(module: Any, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 50, -math.inf, module.log_prob(x))

    detector = om.Detector(om.LogLikelihood(BRANCHES.model(), walled), method="forward")
    detector.fit([data(300, 3)], progress=False)
    x = data(100, 8)
    x[5, 0] = 60.0
    detector.recalibrate([x], progress=False)
    assert len(detector.fitted.calibration.scores) in (99, 100)
    assert np.isfinite(detector.fitted.calibration.scores).all()
