"""Schedules against diffusers' own numbers, and what is no schedule."""

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ood_monitor as om
from ood_monitor import NoiseSchedule

flow = partial(NoiseSchedule.flow, convention="noise_minus_data")

FLOW: dict[str, Any] = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "of another length": diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=200),
    "heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
}
PRESERVING: dict[str, Any] = {
    "ddpm": diffusers.DDPMScheduler(),
    "cosine": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero terminal": diffusers.DDIMScheduler(rescale_betas_zero_snr=True),
    "euler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    "short": diffusers.PNDMScheduler(num_train_timesteps=100),
}


@pytest.mark.parametrize("scheduler", FLOW.values(), ids=FLOW)
def test_flow_is_what_the_scheduler_has_before_any_call(scheduler: Any) -> None:
    fresh = type(scheduler).from_config(scheduler.config)
    schedule = NoiseSchedule.of(scheduler)
    sigmas = fresh.sigmas[: len(schedule)].flip(0).double()
    torch.testing.assert_close(schedule.sigma, sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        schedule.t, scheduler.config.num_train_timesteps * sigmas, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones_like(sigmas))
    assert schedule.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    "make", [diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler]
)
def test_a_solver_on_flow_sigmas_is_flow(make: Any) -> None:
    scheduler = make(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    found, expected = NoiseSchedule.of(scheduler), flow(shift=3.0)
    assert torch.equal(found.sigma, expected.sigma)


@pytest.mark.parametrize("scheduler", PRESERVING.values(), ids=PRESERVING)
def test_variance_is_preserved(scheduler: Any) -> None:
    schedule = NoiseSchedule.of(scheduler)
    products = type(scheduler).from_config(scheduler.config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha.square(), products)
    torch.testing.assert_close(schedule.sigma.square(), 1 - products)
    assert schedule.t.tolist() == list(range(len(products)))


def test_signal_to_noise_ratio_falls() -> None:
    snr = flow(10).snr
    assert (snr.diff() < 0).all()
    assert snr[-1] == 0
    assert snr[4] == 1


def test_a_schedule_of_ones_own_is_copied() -> None:
    alpha = torch.linspace(0.9, 0.1, 10)
    schedule = NoiseSchedule(alpha, 1 - alpha, torch.arange(10))
    alpha.zero_()
    assert schedule.alpha[0] == pytest.approx(0.9)
    assert om.NoiseSchedule.of(schedule) is schedule


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [
        (torch.linspace(0.1, 0.9, 10), torch.linspace(0.9, 0.1, 10)),
        (torch.linspace(0.9, 0.1, 10), torch.linspace(0.9, 0.1, 10)),
        (torch.linspace(0.9, 0.1, 10), torch.linspace(-0.1, 0.9, 10)),
    ],
    ids=["from noise to data", "sigma falls", "sigma below zero"],
)
def test_levels_out_of_order_are_refused(alpha: Tensor, sigma: Tensor) -> None:
    with pytest.raises(ValueError, match=r"in order of their noise.*got alpha from 0\.[19]"):
        NoiseSchedule(alpha, sigma, torch.arange(10))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \(T,\), got \[\(3,\), \(3,\), \(4,\)\]"):
        NoiseSchedule(torch.ones(3), torch.ones(3), torch.arange(4))
