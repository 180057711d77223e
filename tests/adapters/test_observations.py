"""Observation models against torch.distributions and against mass that must add up to one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)

from ood_monitor.adapters import observations

SHAPE = (4, 3)


def randn(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SHAPE, dtype=torch.float64)


def test_gaussian_with_a_stated_variance() -> None:
    x, mean = randn(), randn()
    found = observations.Gaussian(0.25).log_prob(x, mean)
    torch.testing.assert_close(found, Normal(mean, 0.5).log_prob(x))


def test_gaussian_with_a_learned_variance() -> None:
    x, mean, log_variance = randn(), randn(), randn()
    found = observations.Gaussian(None).log_prob(x, (mean, log_variance))
    torch.testing.assert_close(found, Normal(mean, (log_variance / 2).exp()).log_prob(x))


def test_bernoulli_of_logits() -> None:
    x, logits = torch.randint(2, SHAPE).double(), randn(3)
    found = observations.Bernoulli().log_prob(x, logits)
    torch.testing.assert_close(found, Bernoulli(logits=logits).log_prob(x))


def test_bernoulli_of_a_grey_value_is_between_those_of_its_ends() -> None:
    logits, bernoulli = randn(3), observations.Bernoulli()
    ends = [bernoulli.log_prob(torch.full(SHAPE, value).double(), logits) for value in (0.0, 1.0)]
    grey = bernoulli.log_prob(torch.full(SHAPE, 0.25).double(), logits)
    torch.testing.assert_close(grey, 0.75 * ends[0] + 0.25 * ends[1])


def grid(bins: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, bins, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-3.0, 0.1, 1.0])
@pytest.mark.parametrize(("bins", "low", "high"), [(256, -1.0, 1.0), (2, 0.0, 1.0), (17, 0.0, 16)])
def test_discretized_logistic_masses_add_up_to_one(
    bins: int, low: float, high: float, mean: float, scale: float
) -> None:
    values = grid(bins, low, high)
    decoded = torch.full_like(values, mean), torch.full_like(values, math.log(scale))
    mass = observations.DiscretizedLogistic(bins, low, high).log_prob(values, decoded).exp()
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-9)


def test_discretized_logistic_is_a_difference_of_the_distribution_function() -> None:
    mean, scale, half = 0.2, 0.3, 1 / 15
    logistic = TransformedDistribution(Uniform(0.0, 1.0), [SigmoidTransform().inv])
    values = grid(16)[1:-1]
    above, below = [logistic.cdf((values + e - mean) / scale) for e in (half, -half)]
    decoded = torch.full_like(values, mean), torch.full_like(values, math.log(scale))
    found = observations.DiscretizedLogistic(16).log_prob(values, decoded)
    torch.testing.assert_close(found.exp(), above - below)


def test_discretized_logistic_is_finite_far_from_the_mean() -> None:
    values = grid(256).float()
    decoded = (torch.full_like(values, 40.0), torch.full_like(values, -7.0))
    mean, log_scale = (tensor.requires_grad_() for tensor in decoded)
    log_prob = observations.DiscretizedLogistic().log_prob(values, (mean, log_scale))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()
    assert log_scale.grad is not None
    assert log_scale.grad.isfinite().all()


@pytest.mark.parametrize(
    ("observation", "told"),
    [
        (observations.Bernoulli(), r"\[0, 1\] for a Bernoulli observation"),
        (observations.DiscretizedLogistic(256, 0.0, 1.0), r"\[0, 1\] for 256 bins"),
    ],
    ids=["bernoulli", "logistic"],
)
def test_values_outside_what_the_model_was_told_are_refused(observation: Any, told: str) -> None:
    x = torch.full(SHAPE, 1.5)
    with pytest.raises(ValueError, match=f"values in {told}, got values from 1.5 to 1.5"):
        observation.log_prob(x, (x, x))


@pytest.mark.parametrize(
    ("observation", "decoded", "message"),
    [
        (observations.Gaussian(None), torch.ones(SHAPE), r"\(mean, log_variance\), got a tensor"),
        (observations.Gaussian(), (torch.ones(SHAPE),) * 2, r"shape \(4, 3\).*got a tuple"),
        (
            observations.Gaussian(),
            torch.ones(4, 2),
            r"shape \(4, 3\).*got a tensor of shape \(4, 2",
        ),
        (observations.DiscretizedLogistic(), torch.ones(SHAPE), r"\(mean, log_scale\), got"),
        (observations.Bernoulli(), torch.ones(4), r"shape \(4, 3\) of its input, got a tensor"),
    ],
    ids=str,
)
def test_a_decoders_output_of_another_kind_is_refused(
    observation: Any, decoded: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        observation.log_prob(torch.ones(SHAPE), decoded)
