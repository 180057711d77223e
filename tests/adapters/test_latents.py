"""Latents against what a diffusers pipeline or training script makes of the same images."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from support.foreign_cases import small_autoencoder
from torch import Tensor, nn

import ood_monitor as om


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 8, 8) * 2 - 1


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [({}, 0.0, 0.18215), ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305)],
    ids=["stable diffusion", "sd3"],
)
def test_latents_are_the_mean_shifted_and_scaled(options: Any, shift: float, scale: float) -> None:
    vae, x = small_autoencoder(**options).eval(), images()
    with torch.no_grad():
        expected = (vae.encode(x).latent_dist.mode() - shift) * scale  # type: ignore[operator]
    torch.testing.assert_close(om.latent_mean(vae)(x), expected)


def test_latents_per_channel() -> None:
    mean, sd = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    vae = small_autoencoder(latents_mean=mean, latents_std=sd, scaling_factor=0.5).eval()
    x = images()
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()  # type: ignore[operator]
    expected = (z - torch.tensor(mean).view(-1, 1, 1)) * 0.5 / torch.tensor(sd).view(-1, 1, 1)
    torch.testing.assert_close(om.latent_mean(vae)(x), expected)


def test_a_deterministic_autoencoder_has_latents() -> None:
    vae = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=3).eval()
    x = images()
    with torch.no_grad():
        expected = vae.encode(x).latents * vae.config.scaling_factor
    torch.testing.assert_close(om.latent_mean(vae)(x), expected)


def test_latents_are_the_same_each_time_and_leave_no_trace() -> None:
    vae, x = small_autoencoder().train(), images()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in vae.state_dict().items()}
    encode = om.latent_mean(vae)
    first, second = encode(x), encode([x, "label"])
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert vae.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_half_precision_autoencoder_takes_and_gives_the_images_precision() -> None:
    vae = nn.Module.to(small_autoencoder(), torch.bfloat16)
    assert om.latent_mean(vae)(images()).dtype == torch.float32


def test_images_are_where_inputs_say() -> None:
    vae, x = small_autoencoder(), images()
    encode = om.latent_mean(vae, inputs=lambda batch: batch["pixel_values"])
    assert torch.equal(encode({"pixel_values": x}), om.latent_mean(vae)(x))


def test_an_encoder_without_latents_is_refused() -> None:
    vae = nn.Linear(2, 2)
    vae.encode = lambda x: SimpleNamespace(code=x)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"`latent_dist`, `latents` or `latent`, got SimpleN"):
        om.latent_mean(vae)(images())


#: Images that an autoencoder of [-1, 1] was not trained on, and what is said of them.
OTHER_RANGES: dict[str, tuple[Tensor, str]] = {
    "bytes": (torch.full((2, 3, 8, 8), 7, dtype=torch.uint8), "floating-point.*torch.uint8"),
    "whole numbers": (torch.full((2, 3, 8, 8), 7), "floating-point.*torch.int64"),
    "numbers of bytes": (torch.full((2, 3, 8, 8), 255.0), "values from 255 to 255"),
    "one value beyond": (torch.zeros(2, 3, 8, 8).index_fill(3, torch.tensor(0), 1.1), "0 to 1.1"),
    "one not a number": (
        torch.full((2, 3, 8, 8), 9.0).index_fill(3, torch.tensor(0), torch.nan),
        "from 9 to 9",
    ),
}


@pytest.mark.parametrize(("x", "told"), OTHER_RANGES.values(), ids=OTHER_RANGES)
def test_images_of_another_range_are_refused(x: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        om.latent_mean(small_autoencoder())(x)


def test_an_autoencoder_of_another_range_takes_it() -> None:
    x = torch.full((2, 3, 8, 8), 7.0)
    assert om.latent_mean(small_autoencoder(), value_range=(0, 255))(x).isfinite().all()


def test_an_image_with_a_value_that_is_not_finite_is_for_the_monitor_to_count() -> None:
    x = images()
    x[1, 0, 0, 0] = torch.inf
    latents = om.latent_mean(small_autoencoder().eval())(x)
    assert latents.isfinite().flatten(1).all(1).tolist() == [True, False, True]
