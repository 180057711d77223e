"""The stream of a model that is still changing: what it flags, and what it gets used to."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.small_cases import SMALL, randn
from torch import Tensor

from ood_monitor.drift import TrainingStream

BRANCHES = SMALL["branches"]


def stream(**options: Any) -> TrainingStream:
    return TrainingStream(BRANCHES(), **{"warm_up": 20, "half_life": 30.0, **options})


def usual(n: int, seed: int = 0) -> list[Tensor]:
    return list(randn(8 * n, 6, seed=seed).split(8))


def feed(watch: TrainingStream, batches: list[Tensor]) -> list[float]:
    return [watch.update(batch).score for batch in batches]


def test_usual_batches_score_about_one_and_are_not_flagged() -> None:
    watch = stream()
    scores = [watch.update(batch) for batch in usual(300)]
    assert all(math.isnan(score.score) for score in scores[:20])
    rest = np.array([score.score for score in scores[20:]])
    assert np.sqrt(np.mean(rest**2)) == pytest.approx(1.1, abs=0.3)
    assert sum(score.flagged for score in scores) <= 2
    assert [score.batches for score in scores] == list(range(1, 301))


def test_an_unusual_batch_is_flagged_and_says_which_layers_moved() -> None:
    watch = stream()
    feed(watch, usual(60))
    odd = usual(1, seed=9)[0]
    odd[:, 3:] *= 20
    found = watch.update(odd)
    assert found.flagged
    moved = sorted(found.z, key=lambda name: -abs(found.z[name]))[:2]
    assert set(moved) == {"log_likelihood/right.weight", "log_likelihood/right.bias"}


def test_an_outlier_hardly_moves_the_baseline() -> None:
    with_outlier, without = stream(), stream()
    for watch in (with_outlier, without):
        feed(watch, usual(60))
    with_outlier.update(1e6 * usual(1)[0])
    after = usual(20, seed=3)
    np.testing.assert_allclose(feed(with_outlier, after), feed(without, after), atol=0.6)


def test_a_change_that_lasts_becomes_usual() -> None:
    watch = stream()
    feed(watch, usual(60))
    changed = [4 * batch for batch in usual(300, seed=4)]
    scores = feed(watch, changed)
    assert scores[0] > 4
    assert np.mean(scores[-50:]) < 2


def test_a_model_that_learns_is_not_flagged_for_it() -> None:
    module = BRANCHES.model()
    watch = TrainingStream(BRANCHES.adapter(module), warm_up=20, half_life=10.0)
    flagged = 0
    for batch in usual(300):
        flagged += watch.update(batch).flagged
        with torch.no_grad():  # gradients shrink slowly, as in a training
            for parameter in module.parameters():
                parameter.mul_(0.998)
    assert flagged <= 3


def test_state_resumes_to_the_bit() -> None:
    for cut in (10, 50):
        first, second = stream(), stream()
        feed(first, usual(80))
        feed(second, usual(80)[:cut])
        resumed = stream()
        resumed.load_state_dict(json.loads(json.dumps(second.state_dict())))
        feed(resumed, usual(80)[cut:])
        assert resumed.state_dict() == first.state_dict()


def test_a_refused_batch_changes_nothing() -> None:
    watch = stream()
    feed(watch, usual(30))
    before = watch.state_dict()
    with pytest.raises(ValueError, match="finite"):
        watch.update(torch.full((8, 6), math.nan, dtype=torch.float64))
    assert watch.state_dict() == before


def test_the_model_stays_as_it_was() -> None:
    module = BRANCHES.model().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    feed(TrainingStream(BRANCHES.adapter(module)), usual(3))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_only_chosen_layers_are_compared() -> None:
    watch = stream(layers=["left.*"])
    feed(watch, usual(20))
    assert watch.update(usual(1)[0]).z.keys() == {
        "log_likelihood/left.weight",
        "log_likelihood/left.bias",
    }


def test_a_state_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="state of format 1, got None"):
        stream().load_state_dict({})


def test_norms_that_an_optimiser_has_at_hand_are_scored() -> None:
    watch = TrainingStream(warm_up=20)
    rng = np.random.default_rng(0)
    norms = [{"a": float(x), "b": float(y)} for x, y in rng.chisquare(20, (100, 2))]
    assert sum(watch.observe(norm).flagged for norm in norms) <= 2
    found = watch.observe({"a": 20.0, "b": 2e4})
    assert found.flagged
    assert found.z["b"] > 10 > abs(found.z["a"])


def test_norms_that_will_not_do_leave_a_stream_as_it_was() -> None:
    watch = TrainingStream(warm_up=2)
    watch.observe({"a": 1.0, "b": 2.0})
    before = watch.state_dict()
    for norms, message in (
        ({"a": math.inf, "b": 1.0}, "finite norms, got 1 not"),
        ({"a": 1.0}, "the 2 layers of the batches before, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            watch.observe(norms)
    with pytest.raises(ValueError, match="Expected an adapter"):
        watch.update(torch.ones(1))
    assert watch.state_dict() == before
