"""How a residual's energy lies: by spatial frequency, and between neighbouring pixels.

What a denoiser leaves of known images is nearly white; of others it leaves structure.
"""

import functools
import math

import torch
from torch import Tensor

__all__ = ["band_energies", "is_image", "lag_cosines"]

#: Edges of the bands as shares of an image's side, of images and of small ones.
_EDGES = tuple(edge / 32 for edge in (0, 2, 4, 7, 11, 16, 23, 46))
_FEW_EDGES = tuple(edge / 8 for edge in (0, 0.5, 1.5, 2.5, 4, 6, 12))
_SMALL = 16

#: Shifts by rows and columns.
_LAGS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 2))

#: An image of fewer pixels a side has no neighbours at all shifts.
_LEAST_SIDE = 3


def is_image(values: Tensor) -> bool:
    """Whether there are bands and cosines of it: (B, C, H, W), of at least 3 by 3 pixels."""
    return values.ndim == 4 and min(values.shape[2:]) >= _LEAST_SIDE


def band_energies(residual: Tensor, *, any_size: bool = False) -> Tensor:
    """Energies of the orthonormal discrete cosine transform, in radial bands.

    Args:
        residual: Shape (B, C, H, W).
        any_size: Whether they are to be compared between sizes: 6 bands at any, and means over the
            frequencies of each in place of sums.

    Returns:
        (B, bands): 7, or 6 of images with a side of fewer than 16 pixels; summed over channels.
        They add up to the residual's squared norm, unless they are means.

    Raises:
        ValueError: ``any_size``, and an image so small that a band has no frequency.

    Example:
        >>> flat = torch.ones(1, 1, 8, 8)
        >>> band_energies(flat).round()
        tensor([[64.,  0.,  0.,  0.,  0.,  0.]])
    """
    height, width = residual.shape[2:]
    of_rows, of_columns = (_cosines(n).to(residual) for n in (height, width))
    energies = (of_rows @ residual @ of_columns.mT).square().sum(1)
    bands = _bands(height, width, any_size or min(height, width) < _SMALL).to(residual)
    return energies.flatten(1) @ (_means(bands, height, width) if any_size else bands)


def _means(bands: Tensor, height: int, width: int) -> Tensor:
    """What takes the mean over each band."""
    counts = bands.sum(0)
    if not counts.all():
        raise ValueError(
            "Expected samples with frequencies in all bands for any_size=True, as of 6 by 6 and "
            f"larger, got {height} by {width}: fit a detector for each size."
        )
    return bands / counts


def lag_cosines(residual: Tensor) -> Tensor:
    """The cosine of a residual with itself, shifted by (0, 1), (1, 0), (1, 1) and twice these.

    Args:
        residual: Shape (B, C, H, W), of at least 3 by 3 pixels.

    Returns:
        (B, 6), in [-1, 1]; 0 where there is nothing.
    """
    height, width = residual.shape[2:]
    found = []
    for rows, columns in _LAGS:
        one = residual[..., rows:, columns:].flatten(1)
        other = residual[..., : height - rows, : width - columns].flatten(1)
        found.append(torch.cosine_similarity(one, other, dim=1))
    return torch.stack(found, 1)


@functools.lru_cache(maxsize=16)
def _cosines(n: int) -> Tensor:
    """The orthonormal transform, (n, n), a frequency each row."""
    k = torch.arange(n, dtype=torch.float64, device="cpu")[:, None]
    x = k.T + 0.5
    rows = (math.pi * k * x / n).cos() * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


@functools.lru_cache(maxsize=16)
def _bands(height: int, width: int, few: bool) -> Tensor:
    """Which band each frequency is in, (H W, bands), one or zero."""
    edges = _FEW_EDGES if few else _EDGES
    y, x = (torch.arange(n, dtype=torch.float64, device="cpu") / n for n in (height, width))
    radius = torch.hypot(y[:, None], x).flatten()
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device="cpu")
    band = torch.bucketize(radius, inner, right=True)
    return (band[:, None] == torch.arange(len(edges) - 1, device="cpu")).double()
