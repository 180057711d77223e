r"""Diffusion models: the denoising bound, one term a noise level.

With :math:`\bar\alpha_t` the schedule's cumulative product, noise eps ~ N(0, I) and

.. math:: x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon,

the term at level t is :math:`-\tfrac12 \lVert \hat y(x_t, t) - y \rVert^2`, where y is what the
network predicts: eps, x, or :math:`v = \sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x`.
Up to the level's weight and a constant it is the bound's term on the log-likelihood, in nats.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, describe, first_tensor

__all__ = ["DenoisingBound"]

_TARGETS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda x, noise, alpha, sigma: noise,
    "sample": lambda x, noise, alpha, sigma: x,
    "v_prediction": lambda x, noise, alpha, sigma: alpha * noise - sigma * x,
}


class DenoisingBound(Adapter):
    r"""Negative denoising losses at chosen noise levels, with noise that never changes.

    Args:
        network: ``network(x_t, t)`` with x_t of shape (B, C, ...) and integer t of shape (B,),
            giving a tensor, a tuple that begins with one, or an object with ``.sample``
            (diffusers). Of twice as many channels as x (learned variance) the first half is used.
        schedule: The cumulative products :math:`\bar\alpha`, shape (T,), or an object that has
            them as ``alphas_cumprod`` (a variance-preserving diffusers scheduler). They are copied,
            so a live scheduler is neither used nor changed.
        levels: Noise levels, in [0, T). The default suits T = 1 000: little noise and much.
        prediction_type: What the network predicts, ``"epsilon"``, ``"sample"`` or
            ``"v_prediction"``; by default what the schedule's ``config`` says, else epsilon.
        inputs: Takes x, shape (B, C, ...), from a batch as the loader yields it.
        seed: Seed of the noise, one draw a level shared by all samples.

    Raises:
        ValueError: An unknown schedule or prediction type, no level or one outside [0, T).

    References:
        Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020),
        https://arxiv.org/abs/2006.11239
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Any,
        *,
        levels: Sequence[int] = (50, 500),
        prediction_type: str | None = None,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        seed: int = 0,
    ) -> None:
        self.module = network
        self._alphas_cumprod = _alphas_cumprod(schedule)
        self._levels = _checked_levels(levels, len(self._alphas_cumprod))
        self._target = _TARGETS[_checked_prediction(schedule, prediction_type)]
        self._inputs, self._seed = inputs, seed

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield the terms ``t=<level>``, each of a forward pass of its own."""
        x = self._inputs(batch)
        if not x.is_floating_point() or x.ndim < 2:
            raise ValueError(f"Expected floating-point samples (B, C, ...), got {describe(x)}.")
        for level in self._levels:
            yield f"t={level}", self._bound(x, level)

    def _bound(self, x: Tensor, level: int) -> Tensor:
        alpha_cumprod = float(self._alphas_cumprod[level])
        alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
        generator = torch.Generator().manual_seed(self._seed + level)
        noise = torch.randn(x.shape[1:], generator=generator).to(x)
        t = torch.full_like(x.flatten(1)[:, 0], level, dtype=torch.long)
        predicted = _prediction(self.module(alpha * x + sigma * noise, t), x)
        return -0.5 * (predicted - self._target(x, noise, alpha, sigma)).square().flatten(1).sum(1)


def _alphas_cumprod(schedule: Any) -> Tensor:
    values = schedule if isinstance(schedule, Tensor) else getattr(schedule, "alphas_cumprod", None)
    if not isinstance(values, Tensor) or values.ndim != 1:
        raise ValueError(
            "Expected a schedule as a tensor (T,) or an object with `alphas_cumprod` (a "
            f"variance-preserving diffusers scheduler), got {describe(schedule)}."
        )
    values = values.detach().to("cpu", torch.float64, copy=True)
    if not (values.diff() <= 0).all() or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            "Expected cumulative products in [0, 1] that do not increase, got values from "
            f"{values[0]:.4g} to {values[-1]:.4g}."
        )
    return values


def _checked_levels(levels: Sequence[int], length: int) -> tuple[int, ...]:
    chosen = tuple(int(level) for level in levels)
    in_range = all(0 <= level < length for level in chosen)
    if not chosen or not in_range or chosen != tuple(levels) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"Expected distinct whole noise levels in [0, {length}), got {list(levels)}."
        )
    return chosen


def _checked_prediction(schedule: Any, prediction_type: str | None) -> str:
    config = getattr(schedule, "config", {})
    name = prediction_type or dict(config).get("prediction_type", "epsilon")
    if name not in _TARGETS:
        raise ValueError(f"Expected a prediction type of {sorted(_TARGETS)}, got {name!r}.")
    return str(name)


def _prediction(output: Any, x: Tensor) -> Tensor:
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if output.shape[1] == 2 * x.shape[1]:
        output = output.chunk(2, 1)[0]
    if output.shape != x.shape:
        raise ValueError(
            f"Expected the network's prediction to have the shape {tuple(x.shape)} of its input, "
            f"got {tuple(output.shape)}."
        )
    return output  # type: ignore[no-any-return]
