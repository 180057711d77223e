"""The user's images as the denoiser sees them, by the pipeline's own processor and encoder."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ood_monitor import latent_mean
from ood_monitor.adapters.base import describe

__all__ = ["copied", "count_of", "encoded", "image_argument"]

#: Arguments of pipelines that hold the user's image, the first that a pipeline has.
_IMAGES = ("image", "control_image")


def image_argument(parameters: Any) -> str:
    """The name of the argument with the user's image among those of a pipeline's call.

    Raises:
        ValueError: None of them is.
    """
    for name in _IMAGES:
        if name in parameters:
            return name
    raise ValueError(
        f"Expected a pipeline that is given an image ({', '.join(_IMAGES)}) to score inputs, got "
        f"one that takes {[name for name in parameters if name != 'self']}."
    )


def count_of(images: Any) -> int:
    """The number of images, as pipelines take them: one, a list, or an array with a batch."""
    if isinstance(images, list | tuple):
        return sum(count_of(image) for image in images)
    shape: tuple[int, ...] = getattr(images, "shape", ())
    return int(shape[0]) if len(shape) == 4 else 1


def copied(images: Any) -> Any:
    """Images that nothing the user does to theirs changes."""
    if isinstance(images, list | tuple):
        return [copied(image) for image in images]
    return images.detach().clone() if isinstance(images, Tensor) else images.copy()


def encoded(pipe: Any, images: Any, like: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Images in the layout of what a pipeline denoises, encoded by the posterior's mean.

    Args:
        pipe: The pipeline.
        images: As the pipeline takes them: tensors (B, C, H, W) or arrays (B, H, W, C) in [0, 1],
            PIL images, or a list of either; or latents.
        like: A sample that the pipeline denoises, (1, ...), for its layout, size and type.
        size: Height and width in pixels, for denoisers of tokens, which do not show them.

    Returns:
        (B, ...), of the shape of ``like`` but for B.

    Raises:
        ValueError: It comes out in another shape.
    """
    autoencoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    factor = _factor(pipe, autoencoder)
    if like.ndim == 4:
        size = like.shape[2] * factor, like.shape[3] * factor
    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor(vae_scale_factor=factor)
    pixels = processor.preprocess(images, *(size or (None, None)))
    found: Tensor = pixels.to(like.device, torch.promote_types(like.dtype, torch.float32))
    # Pipelines take latents for images too, told by their channels.
    if autoencoder is not None and found.shape[1] == autoencoder.config.in_channels:
        found = latent_mean(autoencoder)(found)
    if like.ndim == 3 and found.ndim == 4:
        found = pipe._pack_latents(found, *found.shape)
    if found.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"Expected images that are encoded to shape {tuple(like.shape[1:])} a sample, got "
            f"{describe(found)}."
        )
    return found


def _factor(pipe: Any, autoencoder: Any) -> int:
    """Pixels a side of a latent's."""
    if autoencoder is None:
        return 1
    known = getattr(pipe, "vae_scale_factor", None)
    return int(known or 2 ** (len(autoencoder.config.block_out_channels) - 1))
