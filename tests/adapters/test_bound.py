"""The variational bound against one written out with Normals, and against a known likelihood."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import ood_monitor as om
from ood_monitor import NoiseSchedule

DIMENSIONS = 3
MEAN = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
SD = torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)


def cosine(steps: int) -> NoiseSchedule:
    angle = (torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1)) * math.pi / 2
    return NoiseSchedule(angle.cos(), angle.sin(), torch.arange(steps))


def geometric(steps: int) -> NoiseSchedule:
    """Signal-to-noise ratios with the same quotient everywhere: the bound's gap goes with 1 / T."""
    log_snr = torch.linspace(9, -9, steps, dtype=torch.float64)
    return NoiseSchedule(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), torch.arange(steps))


SCHEDULES = {
    "geometric": geometric,
    "linear": lambda steps: NoiseSchedule.variance_preserving(
        torch.cumprod(1 - torch.linspace(1e-4, 20 / steps, steps, dtype=torch.float64), 0)
    ),
    "cosine": cosine,
    "flow": partial(NoiseSchedule.flow, convention="noise_minus_data"),
    "shifted flow": partial(NoiseSchedule.flow, shift=3.0, convention="noise_minus_data"),
    "flow to data": partial(NoiseSchedule.flow, convention="data_minus_noise"),
}
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction", "velocity"]


class Optimal(nn.Module):
    """The best denoiser of Normal data, E[x | x_t], said in any of the predictions."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__()
        self.mean, self.log_sd = nn.Parameter(MEAN.clone()), nn.Parameter(SD.log())
        self._schedule, self._type = schedule, prediction_type

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        level = int((self._schedule.t == t[0]).nonzero())
        alpha, sigma = self._schedule.alpha[level], self._schedule.sigma[level]
        variance = (2 * self.log_sd).exp()
        gain = variance * alpha / (variance * alpha**2 + sigma**2)
        x = self.mean + gain * (x_t - alpha * self.mean)
        noise = (x_t - alpha * x) / sigma
        return {
            "epsilon": noise,
            "sample": x,
            "v_prediction": alpha * noise - sigma * x,
            "flow_prediction": noise - x,
            "velocity": x - noise,
        }[self._type]


def adapter_of(name: str, steps: int, prediction_type: str, **options: Any) -> om.DenoisingBound:
    schedule = SCHEDULES[name](steps)
    signal = int((schedule.alpha > 0).sum()) if prediction_type == "epsilon" else steps
    return om.DenoisingBound(
        Optimal(schedule, prediction_type),
        schedule,
        levels=range(signal),
        prediction_type=prediction_type,
        loss="vlb",
        **options,
    )


def total(adapter: om.Adapter, x: Tensor) -> Tensor:
    return torch.stack([value for _, value in adapter.log_likelihood(x)]).sum(0).detach()


def data(n: int) -> Tensor:
    return MEAN + SD * torch.randn(n, DIMENSIONS, dtype=torch.float64)


def written_out(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """The bound of Ho et al.: of one sample, by the posteriors q(x_s|x_t, x) of adjacent levels."""
    denoise, steps = Optimal(schedule, "sample"), len(schedule)
    bound = torch.zeros((), dtype=torch.float64)
    for t in range(steps):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        noise = torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(t)).double()
        x_t = alpha * x + sigma * noise
        x_hat = denoise(x_t[None], schedule.t[t][None])[0].detach()
        if t == 0:
            bound = bound + Normal(x_hat, sigma / alpha).log_prob(x).sum()
            continue
        alpha_s, sigma_s = schedule.alpha[t - 1], schedule.sigma[t - 1]
        step = alpha / alpha_s
        variance = sigma**2 - step**2 * sigma_s**2

        def posterior(x: Tensor) -> Normal:
            mean = step * sigma_s**2 / sigma**2 * x_t + alpha_s * variance / sigma**2 * x  # noqa: B023
            return Normal(mean, (variance * sigma_s**2 / sigma**2).sqrt())  # noqa: B023

        bound = bound - kl_divergence(posterior(x), posterior(x_hat)).sum()
    last = Normal(schedule.alpha[-1] * x, schedule.sigma[-1])
    return bound - kl_divergence(last, Normal(torch.zeros(()).double(), 1.0)).sum()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_terms_of_all_levels_add_up_to_the_bound_written_out(
    name: str, prediction_type: str
) -> None:
    if "flow" in name and prediction_type == "epsilon":
        pytest.skip("says nothing at flow matching's last level, which has no signal")
    x, adapter = data(4), adapter_of(name, 40, prediction_type)
    expected = torch.stack([written_out(adapter.schedule, sample) for sample in x])
    torch.testing.assert_close(total(adapter, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bound_of_the_best_denoiser_is_below_the_known_likelihood(name: str) -> None:
    x = data(4)
    known = Normal(MEAN, SD).log_prob(x).sum(1)
    assert (total(adapter_of(name, 100, "v_prediction", draws=200), x) < known).all()


def test_bound_goes_to_the_known_likelihood_with_more_levels() -> None:
    x = data(4)
    known = Normal(MEAN, SD).log_prob(x).sum(1)
    gaps = [
        known - total(adapter_of("geometric", steps, "sample", draws=200, antithetic=True), x)
        for steps in (10, 100, 1000)
    ]
    assert (gaps[0] > 4 * gaps[1]).all()
    assert (gaps[1] > 4 * gaps[2]).all()
    assert (gaps[2].abs() < 0.3).all()


def test_a_worse_denoiser_has_a_lower_bound() -> None:
    x, adapter = data(50), adapter_of("cosine", 100, "epsilon", draws=20)
    best = total(adapter, x).mean()
    with torch.no_grad():
        adapter.module.mean.add_(0.5)  # type: ignore[operator, union-attr]
    assert total(adapter, x).mean() < best - 0.1


def test_gradient_of_the_bound_is_zero_on_average_at_the_true_parameters() -> None:
    x, adapter = data(2000), adapter_of("cosine", 100, "sample", draws=4, antithetic=True)
    values = torch.stack([value for _, value in adapter.log_likelihood(x)]).sum(0)
    gradients = torch.autograd.grad(values.mean(), list(adapter.module.parameters()))
    expected = [SD.pow(-2).sum().sqrt(), torch.tensor(6.0).sqrt()]  # of one exact sample
    for gradient, size in zip(gradients, expected, strict=True):
        assert gradient.norm() < 5 * size / math.sqrt(2000)


@pytest.mark.parametrize(("level", "prediction"), [(9, "epsilon")])
def test_epsilon_without_signal_is_refused(level: int, prediction: str) -> None:
    with pytest.raises(ValueError, match=rf"signal and noise for loss='vlb', got t={level} with"):
        om.DenoisingBound(
            nn.Linear(3, 3),
            SCHEDULES["flow"](10),
            levels=[level],
            prediction_type=prediction,
            loss="vlb",
        )
