"""Latent diffusion: from images to what the denoiser learned, without noise."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Batch, checked_floating, checked_range, describe, first_tensor
from ood_monitor.checks import function, range_of
from ood_monitor.modules import device_of, dtype_of, scoring_view

__all__ = ["latent_mean"]

#: For rounding in sixteen bits, and what to do beyond it.
_RANGE: dict[str, Any] = {
    "slack": 1e-3,
    "remedy": "Map bytes by `x / 127.5 - 1`; pass `value_range=` for an autoencoder of another.",
}


def latent_mean(
    vae: nn.Module,
    *,
    inputs: Callable[[Batch], Tensor] = first_tensor,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Callable[[Batch], Tensor]:
    """Encode images as a diffusers pipeline does, by the posterior's mean instead of a draw.

    To pass as ``inputs=`` of :class:`DenoisingBound`. The mean is shifted and scaled as the
    autoencoder's ``config`` says, ``(mean - shift_factor) * scaling_factor``, and per channel with
    ``latents_mean`` and ``latents_std``. The autoencoder is left as it was and not differentiated.

    Args:
        vae: A diffusers autoencoder, whose ``encode(x)`` gives an object with ``latent_dist``
            (``AutoencoderKL``), or with ``latents`` or ``latent`` (deterministic ones).
        inputs: Takes the images, shape (B, C, H, W), from a batch as the loader yields it.
        value_range: The smallest and the largest value of images, (low, high): diffusers'
            autoencoders were trained on [-1, 1].

    Returns:
        A function from a batch to latents, shape (B, C', H', W').

    Raises:
        ValueError: The encoder's output is none of these; images of whole numbers, as bytes are,
            or outside the range; or a range that is none.
        TypeError: ``inputs`` is no function.
    """
    function("inputs", inputs)
    low, high = range_of("value_range", value_range)

    def encode(batch: Batch) -> Tensor:
        images = checked_floating(inputs(batch))
        checked_range(images, low, high, "an autoencoder's images", **_RANGE)
        given = images.to(device_of(vae), dtype_of(vae, images.dtype))
        with scoring_view(vae) as view, torch.no_grad():
            latents = _deterministic(view.encode(given))  # type: ignore[operator]
        return _scaled(latents, getattr(vae, "config", {})).to(images)

    return encode


def _deterministic(encoded: Any) -> Tensor:
    distribution = getattr(encoded, "latent_dist", None)
    if distribution is not None:
        return distribution.mean  # type: ignore[no-any-return]
    for name in ("latents", "latent"):
        if isinstance(getattr(encoded, name, None), Tensor):
            return getattr(encoded, name)  # type: ignore[no-any-return]
    raise ValueError(
        "Expected `encode` to give an object with `latent_dist`, `latents` or `latent`, got "
        f"{describe(encoded)}."
    )


def _scaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """With what a configuration leaves out as it is."""

    def constant(name: str, default: float) -> Tensor:
        value = config.get(name)
        found = latents.new_tensor(default if value is None else value)
        return found.view(-1, *[1] * (latents.ndim - 2)) if found.ndim else found

    shift = constant("shift_factor", 0.0) + constant("latents_mean", 0.0)
    return (latents - shift) * constant("scaling_factor", 1.0) / constant("latents_std", 1.0)
