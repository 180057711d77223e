"""Attacks stay in their ball, move the likelihood as asked, and leave the model alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection.attacks import Sign, fgsm, input_gradient, pgd
from ood_monitor.adapters.base import checked_terms

EPSILON = 2 / 255

Attack = Callable[[om.Adapter, Tensor, Sign], Tensor]


def one_step(adapter: om.Adapter, batch: Tensor, sign: Sign) -> Tensor:
    return fgsm(adapter, batch, EPSILON, sign=sign)


def ten_steps(adapter: om.Adapter, batch: Tensor, sign: Sign) -> Tensor:
    return pgd(adapter, batch, EPSILON, 10, EPSILON / 4, sign=sign)


ATTACKS = pytest.mark.parametrize("attack", [one_step, ten_steps])
SIGNS = pytest.mark.parametrize("sign", [1, -1])


@pytest.fixture
def adapter() -> om.Adapter:
    """A Glow off the identity that it starts as, with all its terms."""
    torch.manual_seed(0)
    glow = om.models.Glow(channels=1, size=8, levels=2, steps=2, hidden=8)
    glow.log_prob(torch.rand(32, 1, 8, 8))
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return om.LogLikelihood(glow, bins=256)


@pytest.fixture
def batch() -> Tensor:
    """With values at both ends of the range."""
    values = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return (1.2 * values - 0.1).clamp(0, 1)


@torch.no_grad()
def total(adapter: om.Adapter, batch: Tensor) -> Tensor:
    return torch.stack([value for _, value in checked_terms(adapter, batch)]).sum(0)


@ATTACKS
@SIGNS
def test_moved_values_stay_within_epsilon_and_the_range(
    attack: Attack, sign: Sign, adapter: om.Adapter, batch: Tensor
) -> None:
    moved = attack(adapter, batch, sign)
    distance = (moved - batch).abs().max().item()
    assert distance == pytest.approx(EPSILON, rel=1e-4)
    assert 0 <= moved.min() < moved.max() <= 1
    assert not moved.requires_grad


@ATTACKS
@SIGNS
def test_every_sample_becomes_more_or_less_likely(
    attack: Attack, sign: Sign, adapter: om.Adapter, batch: Tensor
) -> None:
    change = total(adapter, attack(adapter, batch, sign)) - total(adapter, batch)
    assert (sign * change > 0).all()


@SIGNS
def test_many_steps_are_at_least_as_strong_as_one(
    sign: Sign, adapter: om.Adapter, batch: Tensor
) -> None:
    one, ten = (total(adapter, attack(adapter, batch, sign)) for attack in (one_step, ten_steps))
    assert sign * ten.mean() >= sign * one.mean()


def test_gradient_is_that_of_finite_differences(adapter: om.Adapter, batch: Tensor) -> None:
    adapter.module.double()
    x, direction = batch.double().clamp(0.01, 0.99), torch.randn(batch.shape).double()
    h = 1e-6
    difference = (total(adapter, x + h * direction) - total(adapter, x - h * direction)) / (2 * h)
    found = (input_gradient(adapter, x.clone()) * direction).flatten(1).sum(1)
    torch.testing.assert_close(found, difference, rtol=1e-4, atol=1e-4)


@ATTACKS
def test_a_sample_is_moved_the_same_alone_and_again(
    attack: Attack, adapter: om.Adapter, batch: Tensor
) -> None:
    together = attack(adapter, batch, 1)
    assert torch.equal(together, attack(adapter, batch, 1))
    alone = torch.cat([attack(adapter, sample, 1) for sample in torch.split(batch, 1)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


class Dropping(om.Adapter):
    """A model in train mode, which draws and counts there."""

    def __init__(self) -> None:
        self.module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "log_likelihood", -self.module(batch).square().sum(1)


@ATTACKS
def test_no_trace_is_left(attack: Attack) -> None:
    adapter, batch = Dropping(), torch.rand(5, 4)
    state = {name: value.clone() for name, value in adapter.module.state_dict().items()}
    before, random = batch.clone(), torch.get_rng_state()
    with torch.no_grad():
        attack(adapter, batch, -1)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch, before)
    assert not batch.requires_grad
    assert all(parameter.grad is None for parameter in adapter.module.parameters())
    assert all(parameter.requires_grad for parameter in adapter.module.parameters())
    assert all(module.training for module in adapter.module.modules())
    assert all(torch.equal(v, state[k]) for k, v in adapter.module.state_dict().items())


def test_a_bound_of_several_passes_is_moved_in_its_own_range() -> None:
    torch.manual_seed(0)
    adapter = om.DenoisingBound(Levelled(), torch.linspace(0.99, 0.01, 1000), levels=(50, 500))
    batch = 2 * torch.rand(4, 1, 8, 8) - 1
    moved = pgd(adapter, batch, 0.1, 3, 0.05, sign=1, value_range=(-1, 1))
    assert moved.min() < 0
    assert (total(adapter, moved) > total(adapter, batch)).all()


class Levelled(nn.Module):
    """Predicts noise, in as plain a way as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.convolution(x))


def test_a_batch_may_have_a_graph_or_none_to_have(adapter: om.Adapter, batch: Tensor) -> None:
    expected = one_step(adapter, batch, 1)
    with torch.inference_mode():
        without = batch.clone()
    for given in (without, batch.clone().requires_grad_()):
        moved = one_step(adapter, given, 1)
        assert torch.equal(moved, expected)
        assert not moved.requires_grad


def test_values_out_of_range_are_refused(adapter: om.Adapter, batch: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected values in \[0, 1\] for an attack"):
        fgsm(adapter, batch - 1, EPSILON, sign=1)
