"""Pipelines that are given more than words: upscaling, ControlNets, context, two-call guidance."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from support import diffusers_cases
from support.pipeline_cases import (
    Arguments,
    PipelineCase,
    certain,
    ddim,
    flux,
    flux_arguments,
    flux_conditions,
    flux_ids,
    predict_flux,
    predict_sd3,
    randn,
    sd3,
    sd3_arguments,
    sd3_network,
    text,
    text_unet,
    user_image,
    vae,
)

__all__ = ["GIVEN"]


def latents_of(pipe: Any, images: Tensor, *, shift: float = 0.0609) -> Tensor:
    """Of images as the encoder takes them, packed into tokens where the pipeline does."""
    mean = pipe.vae.encode(images).latent_dist.mean
    latents = (mean - shift) * pipe.vae.config.scaling_factor
    packed = hasattr(pipe, "_pack_latents")
    return pipe._pack_latents(latents, *latents.shape) if packed else latents  # type: ignore[no-any-return]


def upscaling() -> Any:
    network = text_unet(in_channels=7, num_class_embeds=30)
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae(scaling_factor=0.08333),
        text_encoder=None,
        tokenizer=None,
        unet=network,
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim(),
    )


def upscale_arguments() -> Arguments:
    return text(image=user_image(2, size=8), noise_level=20)


def predict_upscaled(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The noisy image of low resolution is further channels; its noise is the call's first."""
    image, level = 2 * a["image"] - 1, torch.tensor([a["noise_level"]])
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    given = torch.cat([x, pipe.low_res_scheduler.add_noise(image, noise, level)], 1)
    labels = level.expand(len(x))
    return pipe.unet(given, t, a["prompt_embeds"], class_labels=labels).sample  # type: ignore[no-any-return]


def controlled_sd3() -> Any:
    controlnet = sd3_network(diffusers.SD3ControlNetModel)
    return certain(sd3(diffusers.StableDiffusion3ControlNetPipeline, controlnet=controlnet))


def controlled_sd3_arguments() -> Arguments:
    return sd3_arguments(control_image=user_image(2), controlnet_conditioning_scale=0.7)


def predict_controlled_sd3(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    [blocks] = pipe.controlnet(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=a["prompt_embeds"],
        pooled_projections=torch.zeros(2, 6),
        # This pipeline takes tensors as they are, and leaves out the shift.
        controlnet_cond=latents_of(pipe, a["control_image"], shift=0),
        conditioning_scale=0.7,
        return_dict=False,
    )
    return predict_sd3(pipe, x, t, a, block_controlnet_hidden_states=blocks)


def controlled_flux() -> Any:
    controlnet = diffusers_cases.flux(text=8, pooled=6, kind=diffusers.FluxControlNetModel)
    return certain(flux(diffusers.FluxControlNetPipeline, controlnet=controlnet))


def controlled_flux_arguments() -> Arguments:
    return flux_arguments(control_image=user_image(2), controlnet_conditioning_scale=0.7)


def predict_controlled_flux(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    blocks, single = pipe.controlnet(
        hidden_states=x,
        img_ids=flux_ids(),
        controlnet_cond=latents_of(pipe, a["control_image"]),
        conditioning_scale=0.7,
        return_dict=False,
        **flux_conditions(t, a),
    )
    samples = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}
    return predict_flux(pipe, x, t, a, **samples)


def kontext_arguments() -> Arguments:
    return flux_arguments(image=user_image(2), max_area=256, _auto_resize=False)


def predict_in_context(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The image's tokens follow the sample's, told apart by the first of their ids."""
    context, ids = latents_of(pipe, 2 * a["image"] - 1), flux_ids()
    ids[:, 0] = 1
    tokens = {"hidden_states": torch.cat([x, context], 1), "img_ids": torch.cat([flux_ids(), ids])}
    return predict_flux(pipe, x, t, a, **tokens)[:, : x.shape[1]]


def filling() -> Any:
    network = diffusers_cases.flux(text=8, pooled=6, channels=24, out_channels=4)
    return certain(flux(diffusers.FluxFillPipeline, transformer=network))


def fill_arguments() -> Arguments:
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12, 2:10] = 1
    return flux_arguments(image=user_image(2), mask_image=mask, strength=1.0)


def predict_filled(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """What the mask leaves of the image, and the mask, are further channels of the tokens."""
    kept = latents_of(pipe, (2 * a["image"] - 1) * (1 - a["mask_image"]))
    # Each latent's 2 x 2 pixels of the mask as channels, then packed as the latents are.
    mask = torch.nn.functional.pixel_unshuffle(a["mask_image"], 2)
    given = torch.cat([x, kept, pipe._pack_latents(mask, *mask.shape)], 2)
    return predict_flux(pipe, x, t, a, hidden_states=given)


def channel_controlled() -> Any:
    network = diffusers_cases.flux(text=8, pooled=6, channels=8, out_channels=4)
    return certain(flux(diffusers.FluxControlPipeline, transformer=network))


def predict_channel_controlled(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    control = latents_of(pipe, a["control_image"])
    return predict_flux(pipe, x, t, a, hidden_states=torch.cat([x, control], 2))


def guided_in_two_calls() -> Arguments:
    negative = {"negative_prompt_embeds": randn(2, 7, 8, seed=2)}
    negative["negative_pooled_prompt_embeds"] = randn(2, 6, seed=2)
    return flux_arguments(true_cfg_scale=3.0, **negative)


GIVEN: tuple[PipelineCase, ...] = (
    PipelineCase("upscale", upscaling, upscale_arguments, predict_upscaled, inputs=True),
    PipelineCase(
        "sd3-controlnet", controlled_sd3, controlled_sd3_arguments, predict_controlled_sd3
    ),
    PipelineCase(
        "flux-controlnet", controlled_flux, controlled_flux_arguments, predict_controlled_flux
    ),
    PipelineCase(
        "flux-kontext",
        lambda: flux(diffusers.FluxKontextPipeline),
        kontext_arguments,
        predict_in_context,
        inputs=True,
    ),
    PipelineCase("flux-fill", filling, fill_arguments, predict_filled, inputs=True),
    PipelineCase(
        "flux-control",
        channel_controlled,
        lambda: flux_arguments(control_image=user_image(2)),
        predict_channel_controlled,
    ),
    PipelineCase(
        "flux-guided-in-two-calls",
        lambda: flux(diffusers.FluxPipeline),
        guided_in_two_calls,
        predict_flux,
    ),
)
