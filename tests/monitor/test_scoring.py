"""A sample that cannot be scored costs the others nothing, wherever it stands."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.calibration import Scores
from ood_monitor.monitor.scoring import scored

D = torch.distributions


class Box(nn.Module):
    """A Gaussian that is impossible outside a box, and raises, counts or fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.calls = 0
        self.fails: Callable[[Tensor], None] = lambda x: None

    def log_prob(self, x: Tensor) -> Tensor:
        self.fails(x)
        inside = (x.abs() < 20).all(1)
        return torch.where(inside, -self.layer(x).square().sum(1), -math.inf)


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


METHODS = ["forward", "gradient_norms"]


def made(method: Any = "forward") -> om.Detector:
    torch.manual_seed(0)
    detector = om.Detector(om.LogLikelihood(Box()), method=method, explain=0)
    return detector.fit([draw(300, 5)], progress=False)


def restarted(folder: Any, method: Any) -> om.Detector:
    """As after a restart: nothing of the model is known yet."""
    torch.manual_seed(0)
    made(method).save_pretrained(folder, card=False)
    torch.manual_seed(0)
    return om.Detector.from_pretrained(folder, om.LogLikelihood(Box()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("places", [[0], [1], [5], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7], range(9)])
def test_an_impossible_sample_may_stand_anywhere(places: Any, method: Any, tmp_path: Any) -> None:
    x = draw(10)
    expected = scored(made(method), x)
    x[list(places)] = 100.0
    found = scored(restarted(tmp_path, method), x)
    others = [i for i in range(10) if i not in places]
    assert torch.allclose(found.score[others], expected.score[others], rtol=1e-9)
    odd = found.score[list(places)]
    assert (odd.isnan() | (odd > expected.score.max())).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_impossible_samples_alone_spoils_no_later_one(
    method: Any, tmp_path: Any
) -> None:
    detector = restarted(tmp_path, method)
    scored(detector, torch.full((4, 3), 100.0, dtype=torch.float64))
    assert torch.allclose(scored(detector, draw(10)).score, scored(made(method), draw(10)).score)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 5])
def test_an_impossible_held_out_sample_is_left_out_and_named(
    place: int, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x = draw(301, 5)
    x[place] = 100.0
    detector = om.Detector(om.LogLikelihood(Box()), method=method, explain=0)
    detector.fit([x], progress=False)
    assert f"something of them is not finite: 1 of 301, at [{place}]" in caplog.text
    assert len(detector.fitted.calibration.scores) == 150


# Models that raise


def refuses(x: Tensor) -> None:
    """As `torch.distributions` does of a value outside a support."""
    if (x > 50).any():
        raise ValueError("Expected value to be within the support")


class Calls(om.Detector):
    """Counts how often it is asked for scores."""

    asked = 0

    def score(self, batch: Any) -> Scores:
        self.asked += 1
        return super().score(batch)


def failing(fails: Callable[[Tensor], None]) -> Calls:
    torch.manual_seed(0)
    box = Box()
    detector = Calls(om.LogLikelihood(box), explain=0).fit([draw(300, 5)], progress=False)
    box.fails = fails
    return detector


@pytest.mark.parametrize("size", [2, 3, 10, 64])
@pytest.mark.parametrize("place", [0, -1])
def test_the_odd_sample_alone_is_invalid(
    place: int, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    detector, x = failing(refuses), draw(size)
    expected = detector.score(x)
    detector.asked = 0
    x[place] = 60.0
    found = scored(detector, x)
    assert found.valid.tolist() == [i != place % size for i in range(size)]
    assert torch.allclose(found.score[found.valid], expected.score[found.valid], rtol=1e-9)
    assert detector.asked <= 2 * math.ceil(math.log2(size)) + 2
    assert f"the first at index {place % size}: ValueError: Expected value" in caplog.text


@pytest.mark.parametrize("bad", [[3, 40], [0, 1], [5, 17, 40, 63], list(range(0, 64, 3))], ids=len)
def test_of_several_odd_samples_each_alone_is_invalid(bad: list[int]) -> None:
    detector, x = failing(refuses), draw(64)
    x[bad] = 60.0
    found = scored(detector, x)
    assert (~found.valid).nonzero().flatten().tolist() == bad
    assert detector.asked <= 2 * 64


def test_odd_samples_alone_in_a_batch_are_invalid_where_a_sound_one_is_known() -> None:
    monitor = om.Monitor(failing(refuses), fpr=0.05)
    odd = torch.full((1, 3), 60.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="within the support"):
        monitor.update(odd)  # it may be the model
    monitor.update(draw(3))
    for batch in (odd, odd.repeat(5, 1)):
        monitor.update(batch)
    assert (monitor.samples_seen, monitor.invalid) == (9, 6)


def test_a_model_that_breaks_later_raises() -> None:
    detector = failing(lambda x: None)
    monitor = om.Monitor(detector, fpr=0.05)
    monitor.update(draw(8))

    def broken(x: Tensor) -> None:
        raise KeyError("no such layer")

    detector.adapter.module.fails = broken
    for size in (1, 8):
        with pytest.raises(KeyError, match="no such layer"):
            monitor.update(draw(size))
    assert (monitor.samples_seen, monitor.invalid) == (8, 0)


@pytest.mark.parametrize("limit", [2, 4, 8])
def test_too_little_memory_and_an_odd_sample_together(limit: int) -> None:
    def both(x: Tensor) -> None:
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        refuses(x)

    x = draw(32)
    x[5] = 60.0
    assert (~scored(failing(both), x).valid).nonzero().flatten().tolist() == [5]


def test_a_model_that_raises_for_all_raises() -> None:
    def broken(x: Tensor) -> None:
        raise KeyError("no such layer")

    detector = failing(broken)
    monitor = om.Monitor(detector, fpr=0.05)
    before = monitor.state_dict()
    with pytest.raises(KeyError, match="no such layer"):
        monitor.update(draw(8))
    assert monitor.state_dict() == before
    assert detector.asked <= 4 * 3 + 4


def test_what_only_two_samples_raise_together_is_raised() -> None:
    def alone(x: Tensor) -> None:
        if len(x) > 1:
            raise ValueError("the model mixes samples")

    with pytest.raises(ValueError, match="mixes"):
        scored(failing(alone), draw(8))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["accelerator", "Python", "CPU"],
)
def test_too_little_memory_halves_the_batch_and_blames_no_sample(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def full(x: Tensor) -> None:
        if len(x) > 3:
            raise error

    expected = failing(lambda x: None).score(draw(11))
    found = scored(failing(full), draw(11))
    assert torch.allclose(found.score, expected.score, rtol=1e-9)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_too_little_memory_for_a_single_sample_is_raised() -> None:
    def full(x: Tensor) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        scored(failing(full), draw(4))


def test_an_error_of_the_device_ends_the_attempt() -> None:
    def lost(x: Tensor) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    detector = failing(lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        scored(detector, draw(8))
    assert detector.asked == 1


def test_an_alert_names_the_sample_that_could_not_be_scored() -> None:
    x = draw(10)
    x[7] = 60.0
    monitor = om.Monitor(failing(refuses), fpr=0.01)
    alerts = monitor.update(x, ids=[f"request {i}" for i in range(10)])
    [alert] = [alert for alert in alerts if alert.kind == "invalid_input"]
    assert [(s.position, s.p_value, s.id) for s in alert.samples] == [(8, None, "request 7")]


# Held-out samples of which a gradient is infinite


class Two(nn.Module):
    """A layer whose gradient is infinite at zero, and a sound one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12, bias=False), nn.Linear(6, 12)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.a(x[:, :6]).square().sum(1).sqrt() - 0.5 * self.b(x[:, 6:]).square().sum(1)


@pytest.mark.parametrize(("bad", "is_kept"), [([137], True), (range(0, 400, 4), False)])
def test_a_layer_is_left_out_for_many_samples_and_a_sample_for_itself(
    bad: Any, is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    held_out = torch.randn(400, 12)
    held_out[list(bad), :6] = 0
    detector = om.Detector(om.LogLikelihood(Two()), method="gradient_norms")
    detector.fit(held_out.split(50), progress=False)
    assert ("log_likelihood/a.weight" in detector.fitted.layers) == is_kept
    told = "1 of 400, at [137]" if is_kept else "one held-out sample of twenty: log_likelihood/a.w"
    assert told in caplog.text
    odd = torch.randn(200, 12)
    odd[:, :6] *= 4
    if is_kept:
        assert (detector.score(odd).p_value <= 0.05).double().mean() > 0.5
