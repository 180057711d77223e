"""The user's images as the denoiser sees them, by the pipeline's own processor and encoder."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ood_monitor import latent_mean
from ood_monitor.adapters.base import checked_floating, checked_range, describe
from ood_monitor_integrations.diffusers.denoisers import denoiser_of

__all__ = ["check_images", "copied", "count_of", "encoded", "image_argument"]

#: Arguments of pipelines that hold the user's image, the first that a pipeline has.
_IMAGES = ("image", "control_image")

#: Dimensions of latents of videos.
_OF_FRAMES = 5

#: Names in configurations of autoencoders that take frames, of which an image is one.
_OF_VIDEOS = ("temporal", "temperal")

#: PIL's modes of 8 bits a channel that are brightnesses; those of fewer, more or real numbers.
_BRIGHTNESS, _OF_OTHER_BITS = ("L", "LA", "RGB", "RGBA"), ("F", "I")


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


def check_images(pipe: Any, images: Any) -> None:
    """Refuse images that the pipeline's processor would take for others, without a word.

    Args:
        pipe: The pipeline.
        images: As :func:`encoded` takes them. Latents have no range.

    Raises:
        ValueError: Arrays of whole numbers, as bytes are, or outside [0, 1]; PIL images whose
            numbers are no brightnesses of 8 bits.
    """
    processor, autoencoder = _processor(pipe), _autoencoder(pipe)
    for image in _each(images):
        if isinstance(image, Image.Image):
            _check_mode(image, processor)
        elif isinstance(image, np.ndarray):
            _check_values(torch.from_numpy(np.ascontiguousarray(image)))
        elif isinstance(image, Tensor) and not _is_latent(image, autoencoder):
            _check_values(image)


def _each(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _each(image)
    else:
        yield images


def _check_values(pixels: Tensor) -> None:
    remedy = "Divide bytes by 255; map values in [-1, 1] by `(x + 1) / 2`."
    checked_range(checked_floating(pixels), 0, 1, "a pipeline's images", slack=1e-3, remedy=remedy)


def _check_mode(image: Image.Image, processor: Any) -> None:
    config = getattr(processor, "config", {})
    converts = config.get("do_convert_rgb") or config.get("do_convert_grayscale")
    odd = image.mode.startswith(_OF_OTHER_BITS)
    if odd or not (converts or image.mode in _BRIGHTNESS):
        raise ValueError(
            f"Expected PIL images of mode {', '.join(_BRIGHTNESS)}, got mode {image.mode!r}, whose "
            "numbers the pipeline takes for brightnesses: convert it first, as "
            "`image.convert('RGB')` does for 8 bits."
        )


def _is_latent(image: Tensor, autoencoder: Any) -> bool:
    """Pipelines take latents for images too, told by their channels; of videos nothing else."""
    if image.ndim == _OF_FRAMES:
        return True
    if autoencoder is None or image.ndim < 3:
        return False
    config = autoencoder.config
    channels = config.get("in_channels") or config.get("input_channels")  # Qwen-Image's
    return channels is not None and bool(image.shape[-3] != channels)


def _autoencoder(pipe: Any) -> Any:
    found = (getattr(pipe, name, None) for name in ("vae", "vqvae", "movq"))
    return next((each for each in found if each is not None), None)


def _processor(pipe: Any) -> Any:
    known = getattr(pipe, "image_processor", None)
    if isinstance(known, VaeImageProcessor):  # others prepare a condition, not a sample
        return known
    autoencoder = _autoencoder(pipe)
    # Without an autoencoder there are no latents, which images of four channels would count as.
    channels = {} if autoencoder is not None else {"vae_latent_channels": 0}
    return VaeImageProcessor(vae_scale_factor=_factor(pipe, autoencoder), **channels)


def encoded(pipe: Any, images: Any, like: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Images in the layout of what a pipeline denoises, encoded by the posterior's mean.

    Args:
        pipe: The pipeline.
        images: As the pipeline takes them: tensors (B, C, H, W) or arrays (B, H, W, C) in [0, 1],
            PIL images, or a list of either; or latents, also in the denoiser's own layout.
        like: A sample that the pipeline denoises, (1, ...), for its layout, size and type.
        size: Height and width in pixels, for denoisers of tokens, which do not show them.

    Returns:
        (B, ...), of the shape of ``like`` but for B.

    Raises:
        ValueError: As :func:`check_images`, or it comes out in another shape.
    """
    if isinstance(images, Tensor) and like.ndim != 4 and images.shape[1:] == like.shape[1:]:
        return images.to(like.device, torch.promote_types(like.dtype, torch.float32))
    if like.ndim == _OF_FRAMES:
        raise ValueError(
            f"Expected latents of videos in the denoiser's own layout, {tuple(like.shape[1:])} a "
            f"sample, got {describe(images)}: videos and images are not encoded here; fit on "
            "latents, or on the pipeline's own samples, without images."
        )
    check_images(pipe, images)
    autoencoder = _autoencoder(pipe)
    factor = _factor(pipe, autoencoder)
    if like.ndim == 4:
        size = like.shape[2] * factor, like.shape[3] * factor
    pixels = _processor(pipe).preprocess(images, *(size or (None, None)))
    found: Tensor = pixels.to(like.device, torch.promote_types(like.dtype, torch.float32))
    if autoencoder is not None and not _is_latent(found, autoencoder):
        found = _latents(autoencoder, found)
    if like.ndim == 3 and found.ndim == 4:
        found = _packed(pipe, found)
    if found.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"Expected images that are encoded to shape {tuple(like.shape[1:])} a sample, got "
            f"{describe(found)}."
        )
    return found


def _latents(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Of images, also by an autoencoder of videos."""
    is_of_videos = any(name.startswith(_OF_VIDEOS) for name in autoencoder.config)
    found = latent_mean(autoencoder)(pixels.unsqueeze(2) if is_of_videos else pixels)
    return found.squeeze(2) if is_of_videos else found


def _packed(pipe: Any, latents: Tensor) -> Tensor:
    """As tokens, by the pipeline's own packing.

    Raises:
        ValueError: It packs what it makes of latents before.
    """
    pack, patchify = (getattr(pipe, name, None) for name in ("_pack_latents", "_patchify_latents"))
    names = [] if pack is None else list(inspect.signature(pack).parameters)
    patch = (
        {"patch_size": _config(denoiser_of(pipe))["patch_size"]} if "patch_size" in names else {}
    )
    if pack is not None and patchify is not None and len(names) == 1:  # Flux2's
        normalized: Tensor = pack(_normalized(_autoencoder(pipe), patchify(latents)))
        return normalized
    if pack is None or len(names) != 1 + latents.ndim + len(patch):
        raise ValueError(
            f"Expected a pipeline that packs latents as Flux does, got {type(pipe).__name__}: "
            "give latents in the denoiser's own layout in place of images, or fit on the "
            "pipeline's own samples, without images."
        )
    packed: Tensor = pack(latents, *latents.shape, **patch)
    return packed


def _normalized(autoencoder: Any, patches: Tensor) -> Tensor:
    """Patches (B, C, H, W) by the statistics that the autoencoder has of them.

    Raises:
        ValueError: It has none.
    """
    known = getattr(autoencoder, "bn", None)
    mean, variance = (getattr(known, name, None) for name in ("running_mean", "running_var"))
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        raise ValueError(
            "Expected an autoencoder with a batch norm's statistics of its patches (`vae.bn`), as "
            f"Flux2's, got a {type(autoencoder).__name__}: give latents in the denoiser's own "
            "layout in place of images, or fit on the pipeline's own samples, without images."
        )
    std = (variance + autoencoder.config.batch_norm_eps).sqrt()
    mean, std = (each.to(patches).view(1, -1, 1, 1) for each in (mean, std))
    return (patches - mean) / std


def _config(module: Any) -> Any:
    return module.config


def _factor(pipe: Any, autoencoder: Any) -> int:
    """Pixels a side of a latent's."""
    if autoencoder is None:
        return 1
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    known = next((found for name in names if (found := getattr(pipe, name, None))), None)
    return int(known or 2 ** (len(autoencoder.config.block_out_channels) - 1))
