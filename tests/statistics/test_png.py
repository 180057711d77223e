"""Bits are those of the file that Pillow writes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ood_monitor.statistics.png import in_range, png_bits


def written(array: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> int:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return 8 * len(file.getvalue())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bits_are_those_of_the_file(channels: int, dtype: torch.dtype) -> None:
    levels = torch.randint(256, (4, channels, 9, 7), dtype=torch.uint8)
    levels[1] = 7
    arrays = levels.permute(0, 2, 3, 1).numpy()
    expected = [written(a[..., 0] if channels == 1 else a) for a in arrays]
    found = png_bits((levels.double() / 255).to(dtype))
    assert found.dtype == torch.float64
    assert found.tolist() == expected
    assert expected[1] < expected[0]


@pytest.mark.parametrize(("value", "level"), [(0.5 / 255, 0), (1.5 / 255, 2), (-3, 0), (7, 255)])
def test_values_are_rounded_half_to_even_and_clipped(value: float, level: int) -> None:
    images = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    images[0, 0, 0] = torch.tensor(value, dtype=torch.float64)
    levels = (images * 255).round().clamp(0, 255).byte()
    assert (levels[0, 0, 0] == level).all()
    assert png_bits(images).tolist() == [written(levels[0, 0].numpy())]


def test_an_image_that_is_not_finite_has_no_bits() -> None:
    images = torch.rand(3, 1, 8, 8)
    images[1, 0, 2, 3] = torch.inf
    assert png_bits(images).isnan().tolist() == [False, True, False]


def test_images_outside_the_range_are_told() -> None:
    images = torch.rand(4, 3, 8, 8)
    images[1, 0, 0, 0], images[2, 0, 0, 0], images[3, 0, 0, 0] = 1.001, -0.1, torch.nan
    assert in_range(images).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 2, 8, 8),
        torch.rand(2, 8, 8),
        torch.rand(2, 1, 0, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected images in \[0, 1\]"):
        png_bits(images)
