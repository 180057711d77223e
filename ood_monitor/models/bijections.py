"""Invertible maps between images, each with its log-determinant: what Glow is made of.

Every bijection returns its output and its log-determinant, (B, C, H, W) and (B,) for a batch of B.
Parameters are applied by plain, out-of-place operations, so that per-sample gradients can be taken
by hooks and by ``torch.func`` alike.
"""

import abc
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_monitor.checks import whole

__all__ = [
    "LOG_SCALE_BOUND",
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "Chain",
    "InvertibleConv1x1",
    "Squeeze",
    "bounded",
    "zero_conv",
]

LOG_SCALE_BOUND = 3.0
"""Default bound on each log-scale that a network computes, so that no exponential overflows."""

SMALLEST_SD = 1e-6
"""A channel whose standard deviation is below it counts as constant."""


class Bijection(nn.Module, abc.ABC):
    """An invertible map between images."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to z, and give the log-determinant.

        Args:
            x: Images, with shape (B, C, H, W).

        Returns:
            z, with as many elements per sample as x, and log |det dz/dx| in nats, with shape (B,).
        """

    @abc.abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """Map z, with the shape of forward's output, back to x, with shape (B, C, H, W)."""


class Chain(Bijection):
    """The composition of bijections, applied in the order given and named by their keywords."""

    def __init__(self, **blocks: Bijection) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply every block; the log-determinants add up."""
        log_det = _zeros_per_sample(x)
        for block in self._blocks():
            x, block_log_det = block(x)
            log_det = log_det + block_log_det
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Apply every block's inverse, last block first."""
        for block in reversed(self._blocks()):
            z = block.inverse(z)
        return z

    def _blocks(self) -> list[Bijection]:
        return cast(list[Bijection], list(self.children()))


class Squeeze(Bijection):
    """Space to depth: each 2x2 square of pixels becomes 4 channels of one pixel."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to (B, 4C, H/2, W/2); a permutation, so the log-determinant is 0."""
        return F.pixel_unshuffle(x, 2), _zeros_per_sample(x)

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, 4C, H/2, W/2) to (B, C, H, W)."""
        return F.pixel_shuffle(z, 2)


class ActNorm(Bijection):
    r"""Activation normalisation, :math:`z = x \odot \exp(\text{log\_scale}) + \text{bias}`.

    The first batch seen in training mode sets the parameters, so that each channel of its output
    has mean 0 and variance 1; from then on they are learned like any others. In evaluation mode
    they are never set: until the first training batch they are those of the identity. The buffer
    `initialised` says which, and travels in the state dict.

    Args:
        channels: Number of channels C; `log_scale` and `bias` have shape (C, 1, 1).
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift each channel; see `Bijection.forward`."""
        if self.training and not self.initialised:
            self._initialise(x)
        log_det = _pixels(x) * self.log_scale.sum() + _zeros_per_sample(x)
        return x * torch.exp(self.log_scale) + self.bias, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Undo the shift and the scale; see `Bijection.inverse`."""
        return (z - self.bias) * torch.exp(-self.log_scale)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        sd = variance.sqrt()
        # A constant channel has no scale to remove; dividing by its rounding noise would explode.
        sd = torch.where(sd < SMALLEST_SD, 1.0, sd)
        self.log_scale.copy_(-torch.log(sd[0]))
        self.bias.copy_(-(mean / sd)[0])
        self.initialised.fill_(True)


class InvertibleConv1x1(Bijection):
    r"""An invertible 1x1 convolution, :math:`z_{ij} = W x_{ij}` at each pixel :math:`(i, j)`.

    .. math:: W = P \, (\text{tril}(\text{lower}) + I) \,
        (\text{triu}(\text{upper}) + \text{diag}(\text{sign} \odot \exp(\text{log\_s})))

    with strict triangles. The permutation P and the signs are fixed, the rest is learned. W starts
    as a random orthogonal matrix, whose log-determinant is 0.

    Args:
        channels: Number of channels C; W has shape (C, C).
        generator: Draws the initial W.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, generator: torch.Generator) -> None:
        super().__init__()
        # Decomposed in double precision, so that rounding to the default dtype is the only error.
        weight = torch.empty(channels, channels, dtype=torch.float64, device="cpu")
        nn.init.orthogonal_(weight, generator=generator)
        permutation, lower, upper = torch.linalg.lu(weight)
        default = _as_default()
        self.register_buffer("permutation", permutation.to(default))
        self.register_buffer("sign", upper.diagonal().sign().to(default))
        self.lower = nn.Parameter(lower.tril(-1).to(default))
        self.log_s = nn.Parameter(upper.diagonal().abs().log().to(default))
        self.upper = nn.Parameter(upper.triu(1).to(default))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply the channels of each pixel by W; see `Bijection.forward`."""
        lower, upper = self._triangles()
        weight = self.permutation @ lower @ upper
        log_det = _pixels(x) * self.log_s.sum() + _zeros_per_sample(x)
        return F.conv2d(x, weight[:, :, None, None]), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Solve for the channels of each pixel; see `Bijection.inverse`."""
        lower, upper = self._triangles()
        y = self.permutation.T @ z.flatten(2)
        y = torch.linalg.solve_triangular(lower, y, upper=False, unitriangular=True)
        x: Tensor = torch.linalg.solve_triangular(upper, y, upper=True)
        return x.reshape(z.shape)

    def _triangles(self) -> tuple[Tensor, Tensor]:
        diagonal = torch.diag(self.sign * torch.exp(self.log_s))
        identity = torch.eye(len(self.log_s), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + identity, self.upper.triu(1) + diagonal


class AffineCoupling(Bijection):
    r"""Affine coupling: one half of the channels scales and shifts the other.

    .. math:: z_a = x_a, \quad z_b = x_b \odot \exp(s) + t, \quad
        (t, r) = \text{network}(x_a), \quad s = m \tanh(r / m)

    The network's last convolution starts at zero, hence the coupling as the identity.

    Args:
        channels: Number of channels C, at least 2; :math:`x_a` has ⌊C/2⌋ of them.
        hidden: Number of channels of the network's two hidden layers.
        bound: The bound m.
        generator: Draws the network's initial weights.

    Raises:
        ValueError: There are fewer than 2 channels.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        bound: float = LOG_SCALE_BOUND,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        whole("channels", channels, 2)
        self.unchanged, self.bound = channels // 2, bound
        self.network = nn.Sequential(
            _conv(self.unchanged, hidden, 3, generator),
            nn.ReLU(),
            _conv(hidden, hidden, 1, generator),
            nn.ReLU(),
            zero_conv(hidden, 2 * (channels - self.unchanged)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift the second half; see `Bijection.forward`."""
        x_a, x_b = x.tensor_split([self.unchanged], dim=1)
        shift, log_scale = self._affine(x_a)
        z_b = x_b * torch.exp(log_scale) + shift
        return torch.cat([x_a, z_b], dim=1), _sum_per_sample(log_scale)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo the shift and the scale, both known from the first half; see `Bijection.inverse`."""
        z_a, z_b = z.tensor_split([self.unchanged], dim=1)
        shift, log_scale = self._affine(z_a)
        return torch.cat([z_a, (z_b - shift) * torch.exp(-log_scale)], dim=1)

    def _affine(self, x_a: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(x_a).chunk(2, dim=1)
        return shift, bounded(raw, self.bound)


def _conv(
    in_channels: int, out_channels: int, kernel: int, generator: torch.Generator
) -> nn.Conv2d:
    conv = zero_conv(in_channels, out_channels, kernel)
    # Drawn in one type and on one device, so that a seed gives the same weights under any default.
    weight = torch.empty(conv.weight.shape, dtype=torch.float32, device="cpu")
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def zero_conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps height and width, all weights zero."""
    # Built without storage, because the constructor would draw from the global random state.
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, device="meta")
    conv = conv.to_empty(device=_as_default().device)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def bounded(raw: Tensor, bound: float) -> Tensor:
    """Numbers between -bound and bound, those near zero as they are."""
    return bound * torch.tanh(raw / bound)


def _sum_per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def _zeros_per_sample(x: Tensor) -> Tensor:
    return x.new_zeros(len(x))


def _as_default() -> Tensor:
    """Nothing, of the default type and where tensors are made by default.

    `torch.get_default_device` of torch 2.6 does not see a `with torch.device(...)`.
    """
    return torch.empty(0)


def _pixels(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]
