"""Bits of an image's PNG file: how complex it is, whatever the model."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_monitor.adapters.base import describe

__all__ = ["PNG_BITS", "in_range", "png_bits"]

#: The name of their column.
PNG_BITS = "png_bits"

#: Half a step of eight bits, which rounding takes away.
_SLACK = 0.5 / 255


def png_bits(images: Tensor) -> Tensor:
    """Size in bits of each image's PNG file, as Pillow writes it with default settings.

    Args:
        images: (B, C, H, W) in [0, 1], floating, grey (C = 1) or RGB (C = 3). They are rounded to
            eight bits, halves to even; values outside are clipped, see :func:`in_range`.

    Returns:
        (B,), float64; NaN of an image that is not finite.

    Raises:
        ValueError: Other shapes, or whole numbers.
    """
    _check(images)
    finite = images.isfinite().flatten(1).all(1).tolist()
    levels = images.detach().float().clamp(0, 1).mul(255).round().nan_to_num().byte()
    arrays = levels.movedim(1, -1).cpu().numpy()
    bits = [8.0 * _size(a) if ok else np.nan for a, ok in zip(arrays, finite, strict=True)]
    return torch.tensor(bits, dtype=torch.float64, device="cpu")


def in_range(images: Tensor) -> Tensor:
    """Which images have all values in [0, 1], up to half a step of eight bits: (B,), bool.

    Raises:
        ValueError: As :func:`png_bits`.
    """
    _check(images)
    return ((images >= -_SLACK) & (images <= 1 + _SLACK)).flatten(1).all(1)


def _check(images: Tensor) -> None:
    shape_holds = images.ndim == 4 and images.shape[1] in (1, 3) and images[:1].numel() > 0
    if not shape_holds or not images.is_floating_point():
        raise ValueError(
            "Expected images in [0, 1], of shape (B, 1, H, W) or (B, 3, H, W), floating-point, got "
            f"{describe(images)}."
        )


def _size(array: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> int:
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "png")
    return file.tell()
