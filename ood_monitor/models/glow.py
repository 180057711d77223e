r"""Glow: a normalizing flow whose likelihood is exact and comes in terms, one per latent level.

An image :math:`x \in \mathbb{R}^{C \times H \times W}` is mapped by a bijection :math:`f` to
latents :math:`z_1, \ldots, z_L`, one per level :math:`l`, and by the change of variables

.. math:: \log p(x) = \sum_{l=1}^{L} \log p(z_l \mid h_l)
    + \log \left| \det \frac{\partial f(x)}{\partial x} \right| ,

in nats, summed over the dimensions. Level :math:`l` squeezes 2x2 pixels into channels, applies
:math:`K` steps (activation normalisation, invertible 1x1 convolution, affine coupling), and halves
the channels: :math:`z_l` leaves, :math:`h_l` goes on to level :math:`l + 1`. A diagonal Gaussian
whose mean and standard deviation are computed from :math:`h_l` is the density of :math:`z_l`; at
the top, where nothing is left to condition on, :math:`z_L` is standard Gaussian.

Nothing here touches the global random state but :meth:`Glow.sample` without a generator.

References:
    | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
    | https://arxiv.org/abs/1807.03039
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.laws import gaussian, places
from ood_monitor.checks import items, number, seed_of, whole
from ood_monitor.models.bijections import (
    LOG_SCALE_BOUND,
    ActNorm,
    AffineCoupling,
    Bijection,
    Chain,
    InvertibleConv1x1,
    Squeeze,
    bounded,
    zero_conv,
)


class ConditionalGaussian(nn.Module):
    r"""The density of a latent given what goes on, :math:`\mathcal{N}(z; \mu(h), \sigma(h)^2)`.

    One convolution gives :math:`\mu` and :math:`\log \sigma`, the latter bounded as in
    `AffineCoupling`, by `LOG_SCALE_BOUND`; it starts at zero, hence the density as the standard
    Gaussian.

    Args:
        channels: Number of channels C of the latent z, and of h.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = zero_conv(channels, 2 * channels)

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        """Log-density of z given h, in nats, with shape (B,); z and h have shape (B, C, H, W)."""
        return self.elements(z, h).total()

    def elements(self, z: Tensor, h: Tensor) -> Elements:
        """Log-density of each element of z given h, and what it expects, all in nats."""
        return gaussian(z, *self._moments(h))

    def sample(self, noise: Tensor, h: Tensor) -> Tensor:
        """Turn standard Gaussian noise into a sample given h, all with shape (B, C, H, W)."""
        mean, log_sd = self._moments(h)
        return mean + noise * torch.exp(log_sd)

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.conv(h).chunk(2, dim=1)
        return mean, bounded(raw, LOG_SCALE_BOUND)


class Glow(nn.Module):
    """Glow: multi-scale flow of activation normalisations, 1x1 convolutions and couplings.

    It takes real-valued images as they are: scaling and dequantisation are the caller's. A fresh
    model is an orthogonal map, hence a standard Gaussian, until its first batch in training mode
    initialises the activation normalisations (see `ActNorm`). Score in evaluation mode.

    Args:
        channels: Number of channels C of the images.
        size: Their height and width (H, W), or one number for both; each divisible by 2**levels.
        levels: Number L of latent levels.
        steps: Number K of steps per level.
        hidden: Number of channels of the couplings' hidden layers.
        log_scale_bound: Of each coupling. What K steps make of an unusual pixel may grow as its
            exponential to the power K and overflow, so a deep flow takes a smaller one.
        seed: Seed of the initial weights; two models of the same seed are identical.

    Raises:
        ValueError: A number is below 1, or the size is not divisible by 2**levels.
        TypeError: An option of another type.

    Example:
        >>> flow = Glow(channels=1, size=8).eval()
        >>> images = torch.zeros(1, 1, 8, 8)
        >>> for name, term in flow.log_prob_terms(images).items():
        ...     print(name, f"{term.item():.2f}")
        latent_1 -29.41
        latent_2 -29.41
        log_det 0.00
        >>> print(f"{flow.log_prob(images).item():.2f}")
        -58.81
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        *,
        levels: int = 2,
        steps: int = 4,
        hidden: int = 64,
        log_scale_bound: float = LOG_SCALE_BOUND,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels, levels = whole("channels", channels, 1), whole("levels", levels, 1)
        steps, hidden = whole("steps", steps, 1), whole("hidden", hidden, 1)
        bound = number("log_scale_bound", log_scale_bound, 0, ends="()")
        self.shape = (channels, *_checked_size(size, 2**levels))
        generator = torch.Generator("cpu").manual_seed(seed_of("seed", seed))
        # Each squeeze quadruples the channels and each split halves them.
        widths = [channels * 2 ** (level + 1) for level in range(1, levels + 1)]
        step = functools.partial(_step, hidden=hidden, bound=bound, generator=generator)
        self.levels = nn.ModuleList(_level(steps, functools.partial(step, w)) for w in widths)
        self.priors = nn.ModuleList(ConditionalGaussian(width // 2) for width in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Give `log_prob` of x, so that the module can be called as a function of its input."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each image.

        Args:
            x: Images, with shape (B, C, H, W).

        Returns:
            log p(x) in nats, summed over dimensions, with shape (B,).

        Raises:
            ValueError: x has another shape, or is not floating-point.
        """
        return functools.reduce(torch.add, self.log_prob_terms(x).values())

    def log_prob_terms(self, x: Tensor) -> dict[str, Tensor]:
        """Log-density of each image, term by term; the terms sum to `log_prob`.

        Args:
            x: Images, with shape (B, C, H, W).

        Returns:
            Under "latent_1", ..., "latent_L" each level's log-density, the top last, and under
            "log_det" the whole log-determinant; each in nats, with shape (B,).

        Raises:
            ValueError: x has another shape, or is not floating-point.
        """
        return {name: term.total() for name, term in self.log_prob_elements(x).items()}

    def log_prob_elements(self, x: Tensor) -> dict[str, Elements]:
        """The terms of `log_prob_terms` element by element.

        Args:
            x: Images, with shape (B, C, H, W).

        Returns:
            Under the names of `log_prob_terms`, elements in nats: of each level's latent, with the
            shape documented in `encode`, and of the log-determinant that of each level apart, with
            shape (B, L). What is expected of the top level is the same for every image: None.

        Raises:
            ValueError: x has another shape, or is not floating-point.
        """
        return self._encode(x)[1]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Map images to latents.

        Args:
            x: Images, with shape (B, C, H, W).

        Returns:
            z_1, ..., z_L; z_l has shape (B, 2**l C, H/2**l, W/2**l), and the top, z_L, twice the
            channels.

        Raises:
            ValueError: x has another shape, or is not floating-point.
        """
        return self._encode(x)[0]

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Map latents, as `encode` gives them, back to images.

        Args:
            latents: z_1, ..., z_L, with the shapes documented in `encode`.

        Returns:
            Images, with shape (B, C, H, W).

        Raises:
            ValueError: The latents are too many, too few, or have other shapes.
        """
        expected = self._latent_shapes()
        got = [tuple(z.shape[1:]) for z in latents]
        if got != expected:
            raise ValueError(f"Expected latents of shapes (B, ...) with {expected}, got {got}.")
        return self._assemble(latents[-1], lambda level, _: latents[level])

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw images.

        Args:
            n: Number of images.
            generator: Source of the noise; by default the global one.
            temperature: Factor on the standard deviations of the latents.

        Returns:
            Images, with shape (n, C, H, W).

        Raises:
            ValueError: n or the temperature is below 0.
            TypeError: n is no whole number, or the temperature no number.
        """
        n, temperature = whole("n", n), number("temperature", temperature, 0, ends="[)")
        noise = [temperature * z for z in self._noise(n, generator)]
        priors = self._priors()
        return self._assemble(noise[-1], lambda level, h: priors[level].sample(noise[level], h))

    def _encode(self, x: Tensor) -> tuple[list[Tensor], dict[str, Elements]]:
        _check_images(x, self.shape)
        *lower, top = self._levels()
        latents, terms, log_dets = [], {}, []
        for place, (level, prior) in enumerate(zip(lower, self._priors(), strict=True), start=1):
            x, level_log_det = level(x)
            x, z = x.chunk(2, dim=1)
            latents.append(z)
            terms[f"latent_{place}"] = prior.elements(z, x)
            log_dets.append(level_log_det)
        z, level_log_det = top(x)
        terms[f"latent_{len(lower) + 1}"] = Elements(_standard_log_prob(z), axes=places(z))
        terms["log_det"] = Elements(torch.stack([*log_dets, level_log_det], 1), apart=True)
        return [*latents, z], terms

    def _assemble(self, top: Tensor, latent: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Go down from the top; `latent(level, h)` gives what leaves at a level, counted from 0."""
        *lower, last = self._levels()
        x = last.inverse(top)
        for index, level in reversed(list(enumerate(lower))):
            x = level.inverse(torch.cat([x, latent(index, x)], dim=1))
        return x

    def _noise(self, n: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        like = next(self.parameters())
        device = like.device if generator is None else generator.device
        for shape in self._latent_shapes():
            noise = torch.randn(n, *shape, generator=generator, device=device, dtype=like.dtype)
            yield noise.to(like.device)

    def _latent_shapes(self) -> list[tuple[int, int, int]]:
        channels, height, width = self.shape
        scales = [2**level for level in range(1, len(self.levels) + 1)]
        shapes = [(channels * scale, height // scale, width // scale) for scale in scales]
        top_channels, *top_size = shapes[-1]
        return [*shapes[:-1], (2 * top_channels, top_size[0], top_size[1])]

    def _levels(self) -> list[Bijection]:
        return cast(list[Bijection], list(self.levels))

    def _priors(self) -> list[ConditionalGaussian]:
        return cast(list[ConditionalGaussian], list(self.priors))


def _level(steps: int, step: Callable[[], Bijection]) -> Chain:
    return Chain(squeeze=Squeeze(), **{f"step_{k}": step() for k in range(steps)})


def _step(channels: int, *, hidden: int, bound: float, generator: torch.Generator) -> Chain:
    return Chain(
        actnorm=ActNorm(channels),
        conv1x1=InvertibleConv1x1(channels, generator=generator),
        coupling=AffineCoupling(channels, hidden, bound=bound, generator=generator),
    )


def _standard_log_prob(z: Tensor) -> Tensor:
    """Of each element."""
    return -0.5 * (z * z + math.log(2 * math.pi))


def _checked_size(size: int | tuple[int, int], divisor: int) -> tuple[int, int]:
    """Height and width."""
    given = items("size", size) if isinstance(size, Iterable) else [size, size]
    if len(given) != 2:
        raise ValueError(f"Expected size as a number or (H, W), got {size!r}.")
    height, width = (whole("size", side, 1) for side in given)
    if min(height, width) < divisor or height % divisor or width % divisor:
        raise ValueError(
            f"Expected a size divisible by 2**levels = {divisor}, got {height}x{width}."
        )
    return height, width


def _check_images(x: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(x.shape[1:]) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"Expected images of shape (B, {expected}), got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"Expected images of a floating-point dtype, got {x.dtype}.")
