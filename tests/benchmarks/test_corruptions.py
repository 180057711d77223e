"""Corruptions are reproducible, image by image, and stronger the higher the severity."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.detection.corruptions import CORRUPTIONS, corrupted


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Digits of 8x8, at 28x28 with a black rim of 2."""
    digits = torch.from_numpy(load_digits().images[:24]).float()[:, None] / 16
    large = F.interpolate(digits, size=(28, 28), mode="bilinear")
    return F.pad((255 * large).byte(), (2, 2, 2, 2))


def change(images: Tensor, name: str, severity: int) -> float:
    """Mean absolute difference, in grey levels."""
    return (corrupted(images, name, severity, 0).float() - images.float()).abs().mean().item()


def test_there_are_fifteen() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_the_images_more(name: str, images: Tensor) -> None:
    changes = [change(images, name, severity) for severity in range(1, 6)]
    assert changes[0] > 0
    assert changes == sorted(changes)
    assert changes[4] > 2 * changes[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images_and_the_clean_ones_as_they_were(name: str, images: Tensor) -> None:
    before = images.clone()
    after = corrupted(images, name, 5, 0)
    assert after.dtype == torch.uint8
    assert after.shape == images.shape
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_seed_gives_the_same_whatever_the_other_images(name: str, images: Tensor) -> None:
    others = 255 - images[:6]
    others[4] = images[4]
    assert torch.equal(corrupted(others, name, 3, 7)[4], corrupted(images, name, 3, 7)[4])


def test_image_and_seed_decide_what_is_random(images: Tensor) -> None:
    alike = images[:1].expand(2, -1, -1, -1)
    first, second = corrupted(alike, "gaussian noise", 3, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, corrupted(alike, "gaussian noise", 3, 1)[0])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_global_random_states_neither_matter_nor_move(name: str, images: Tensor) -> None:
    found = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states()
        found.append(corrupted(images[:3], name, 3, 0))
        assert states() == before
    assert torch.equal(*found)


def states() -> tuple[str, str, bytes]:
    return (
        str(random.getstate()),
        str(np.random.get_state()),
        torch.get_rng_state().numpy().tobytes(),
    )


def test_translation_keeps_every_grey_value_of_what_is_not_pushed_out() -> None:
    image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    image[..., 12:20, 12:20] = torch.arange(64).reshape(8, 8)
    moved = corrupted(image, "translate", 5, 0)
    assert not torch.equal(moved, image)
    assert torch.equal(moved.flatten().sort().values, image.flatten().sort().values)


@pytest.mark.parametrize("name", ["gaussian noise", "shot noise", "elastic"])
def test_strength_is_in_the_unit_that_the_effect_says(name: str) -> None:
    """On an image of which the unit can be read back: grey 0.5, or a ramp of one row a level."""
    effect, grey = CORRUPTIONS[name].effect, np.full((200, 200), 0.5)
    ramp = np.tile(np.arange(200.0), (200, 1))
    cases = {
        "gaussian noise": (grey, 0.1, 0.1),
        "shot noise": (grey, 50, np.sqrt(0.5 / 50)),
        "elastic": (ramp, 2, 2),
    }
    image, strength, expected = cases[name]
    difference = effect(image, strength, np.random.default_rng(0)) - image
    assert np.sqrt(np.mean(difference**2)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("name", "share"), [("impulse noise", 0.1), ("spatter", 0.2)])
def test_share_of_pixels_is_that_asked_for(name: str, share: float) -> None:
    grey = np.full((200, 200), 0.5)
    changed = CORRUPTIONS[name].effect(grey, share, np.random.default_rng(0)) != grey
    assert changed.mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", ["defocus blur", "motion blur", "glass blur"])
def test_blur_leaves_an_even_image_even(name: str) -> None:
    even = torch.full((1, 1, 32, 32), 100, dtype=torch.uint8)
    assert torch.equal(corrupted(even, name, 5, 0), even)


@pytest.mark.parametrize("severity", [0, 6])
def test_severity_out_of_range_is_refused(severity: int, images: Tensor) -> None:
    with pytest.raises(ValueError, match=f"Expected a severity from 1 to 5, got {severity}"):
        corrupted(images, "fog", severity, 0)


def test_unknown_corruption_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected a corruption of \['gaussian.*got 'snow'"):
        corrupted(images, "snow", 1, 0)


@pytest.mark.parametrize(
    "wrong", [torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected uint8 images \(N, 1, H, W\), got a tensor of"):
        corrupted(wrong, "fog", 1, 0)
