"""PixelCNN: an autoregressive model of images by masked convolutions.

References:
    | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016)
    | https://arxiv.org/abs/1601.06759
"""

from typing import cast

import torch
from torch import Tensor, nn


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees the pixels before its own, in reading order.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        kernel: Odd width.
        sees_itself: Whether the pixel's own input counts: after the first layer.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, sees_itself: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        mask = torch.zeros(kernel, kernel)
        mask.view(-1)[: kernel * kernel // 2 + sees_itself] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class PixelCNN(nn.Module):
    """Logits of each pixel's value, given the values before it.

    Args:
        values: Number V of values of a pixel.
        width: Channels between the layers.
        depth: Residual layers.
    """

    def __init__(self, values: int, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        self.values = values
        self.first = MaskedConv2d(1, width, 7, sees_itself=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                MaskedConv2d(width, width, 5, sees_itself=True),
                nn.SiLU(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(width, values, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, V, H, W) of tokens (B, H, W), integers."""
        h = self.first((2 * tokens / (self.values - 1) - 1)[:, None].to(self.first.weight.dtype))
        for layer in self.layers:
            h = h + layer(h)
        return cast(Tensor, self.last(h))
