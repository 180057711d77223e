"""Each diffusers family's terms against the loss of its training script, sample by sample."""

import copy
import dataclasses
from typing import Any

import diffusers
import pytest
import torch
from support.diffusers_cases import FAMILIES, Family
from support.model_case import perturbed
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors

LEVELS = [10, 500, 999]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def double(batch: Batch) -> Any:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def network_of(family: Family) -> nn.Module:
    """In double precision and off its initial values, of which many are zero."""
    network = family.network().eval()
    perturbed(network)
    return nn.Module.to(network, torch.float64)  # diffusers' own `to` logs a warning


def noisy_and_target(
    family: Family, x: Tensor, noise: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the time and what is to be predicted, by a scheduler that no call has used."""
    config = family.scheduler.config
    if isinstance(family.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        t = scheduler.timesteps[999 - level][None]  # which go from noise to data
        return scheduler.scale_noise(x, t, noise), t.to(x), noise - x
    scheduler = diffusers.DDPMScheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    t = torch.tensor([level])
    target = {
        "epsilon": noise,
        "sample": x,
        "v_prediction": scheduler.get_velocity(x, noise, t),
    }[config.prediction_type]
    return scheduler.add_noise(x, noise, t), t, target


def training_losses(family: Family, network: nn.Module, batch: Any, level: int) -> Tensor:
    """-1/2 of the summed squared error of each sample, with the adapter's noise."""
    shape, losses = family.shapes["x"], []
    generator = torch.Generator().manual_seed(level)
    noise = torch.randn(shape, generator=generator).double()[None]
    for i in range(len(batch["x"])):
        sample = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        x_t, t, target = noisy_and_target(family, sample["x"], noise, level)
        error = family.call(network, x_t, t, sample) - target
        losses.append(-0.5 * error.square().sum().detach())
    return torch.stack(losses)


@every_family
def test_terms_are_the_losses_of_the_training_script(family: Family) -> None:
    network, batch = network_of(family), double(family.batch(3))
    found = dict(family.adapter(network, levels=LEVELS).log_likelihood(batch))
    assert list(found) == [f"t={level}" for level in LEVELS]
    for level in LEVELS:
        expected = training_losses(family, network, batch, level)
        # The schedulers' sigmas are in single precision.
        torch.testing.assert_close(found[f"t={level}"].detach(), expected, rtol=1e-5, atol=0)


@every_family
def test_the_sample_decides_and_so_does_its_condition(family: Family) -> None:
    network, batch = network_of(family), double(family.batch(2))
    adapter = family.adapter(network, levels=[500])
    [(_, first)] = adapter.log_likelihood(batch)
    for name, tensor in batch.items():
        changed = (tensor + 1) % 10 if name == "label" else tensor + 0.1
        [(_, second)] = adapter.log_likelihood(batch | {name: changed})
        assert (first != second).all(), name


@every_family
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_a_call_of_the_pipeline_changes_nothing(family: Family) -> None:
    family = dataclasses.replace(family, scheduler=copy.deepcopy(family.scheduler))
    network, batch = network_of(family), double(family.batch(2))
    [(_, before)] = family.adapter(network, levels=[500]).log_likelihood(batch)
    mu = {"mu": 1.0} if family.scheduler.config.get("use_dynamic_shifting") else {}
    family.scheduler.set_timesteps(7, **mu)
    [(_, after)] = family.adapter(network, levels=[500]).log_likelihood(batch)
    assert torch.equal(before, after)


@every_family
def test_gradient_checkpointing_changes_nothing(family: Family) -> None:
    network, batch = network_of(family), double(family.batch(2))
    adapter = family.adapter(network, levels=[500])
    before = om.gradient_norms(adapter, batch)
    network.enable_gradient_checkpointing()  # type: ignore[operator]
    torch.testing.assert_close(om.gradient_norms(adapter, batch), before)
