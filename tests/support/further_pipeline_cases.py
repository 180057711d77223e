"""Pipelines whose guidance, layout, time or scheduler is unlike that of the rest.

In a guided call the unconditional rows stand first and the condition's last, unless a comment says
otherwise.
"""

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

from support import diffusers_cases
from support.pipeline_cases import (
    SD_SCHEDULE,
    Arguments,
    PipelineCase,
    certain,
    control_unet,
    ddim,
    inpaint_arguments,
    masked,
    predict_pixart,
    predict_sd3,
    predict_sdxl,
    predict_text,
    randn,
    sd3,
    sd3_arguments,
    sized,
    stable_diffusion,
    text,
    text_unet,
    user_image,
    vae,
)

__all__ = ["FURTHER"]


def image_latents(pipe: Any, a: Arguments) -> Tensor:
    """Of the user's image, as the encoder gives them, without a scale."""
    return pipe.vae.encode(2 * a["image"] - 1).latent_dist.mean  # type: ignore[no-any-return]


def editing() -> Any:
    return stable_diffusion(
        diffusers.StableDiffusionInstructPix2PixPipeline,
        ddim(),
        network=lambda: text_unet(in_channels=8),
    )


def edit_arguments() -> Arguments:
    return text(image=user_image(2), image_guidance_scale=1.5)


def predict_edited(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The first of three rows: text and image, image alone, neither (zeros as its latents)."""
    return predict_text(pipe, torch.cat([x, image_latents(pipe, a)], 1), t, a)


def adapter(pipe: Any, a: Arguments) -> Arguments:
    """A list of features, from which the unet takes them away."""
    features = [a["adapter_conditioning_scale"] * feature for feature in pipe.adapter(a["image"])]
    return {"down_intrablock_additional_residuals": features}


def adapted() -> Any:
    network = text_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return stable_diffusion(
        diffusers.StableDiffusionAdapterPipeline,
        ddim(),
        network=lambda: network,
        adapter=diffusers.T2IAdapter(channels=[4, 8], num_res_blocks=1, downscale_factor=2),
    )


def adapted_arguments() -> Arguments:
    # This pipeline decodes by a deprecated method.
    return text(image=user_image(2), adapter_conditioning_scale=0.8)


def predict_adapted(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return predict_text(pipe, x, t, a, **adapter(pipe, a))


def euler(**options: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_SCHEDULE, **options)


def sdxl_unet(ids: int = 6, **options: Any) -> Any:
    """With so many numbers for sizes, and further options."""
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * ids,
        **options,
    )


def sdxl(pipeline: Any, network: Any, **components: Any) -> Any:
    return pipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=euler(),
        **components,
    )


def pooled() -> Arguments:
    negative = {"negative_pooled_prompt_embeds": randn(2, 32, seed=2)}
    return {"pooled_prompt_embeds": randn(2, 32), **negative}


def adapted_sdxl() -> Any:
    network = sdxl_unet(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    features = diffusers.T2IAdapter(
        channels=[4, 8, 8, 8],
        num_res_blocks=1,
        downscale_factor=4,
        adapter_type="full_adapter_xl",
    )
    return sdxl(diffusers.StableDiffusionXLAdapterPipeline, network, adapter=features)


def adapted_sdxl_arguments() -> Arguments:
    return sized(image=user_image(2), adapter_conditioning_scale=0.8, **pooled())


def predict_adapted_sdxl(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return predict_sdxl(pipe, x, t, a, **adapter(pipe, a))


def empty_text() -> Tensor:
    return randn(1, 2, 8)


def depth() -> Any:
    pipe = diffusers.MarigoldDepthPipeline(
        unet=text_unet(in_channels=8),
        vae=vae(),
        scheduler=ddim(prediction_type="v_prediction"),
        text_encoder=None,
        tokenizer=None,
        prediction_type="depth",
    )
    pipe.empty_text_embedding = empty_text()  # as its first call leaves it
    return pipe


def depth_arguments() -> Arguments:
    # By default each sample has a loop of its own, one after another.
    return {
        "image": user_image(2),
        "num_inference_steps": 3,
        "processing_resolution": 0,
        "batch_size": 2,
        "output_type": "pt",
    }


def predict_depth(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The image's latents stand before the sample; there is no guidance."""
    latents = image_latents(pipe, a) * pipe.vae.config.scaling_factor
    given = torch.cat([latents, x], 1)
    return pipe.unet(given, t, empty_text().expand(len(x), -1, -1)).sample  # type: ignore[no-any-return]


def continuous() -> Any:
    """The unet is told a quarter of log sigma, which is the scheduler's own time."""
    scheduler = euler(timestep_type="continuous", prediction_type="v_prediction")
    return stable_diffusion(diffusers.StableDiffusionPipeline, scheduler)


def deep_vae() -> Any:
    """Of latents that are eight times smaller than the image, as some pipelines insist."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )


def hunyuan() -> Any:
    network = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=5,
    )
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, prediction_type="v_prediction", **(SD_SCHEDULE | {"beta_end": 0.03})
    )
    return diffusers.HunyuanDiTPipeline(
        vae=deep_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def masks() -> Arguments:
    return {
        "prompt_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
        "negative_prompt_attention_mask": torch.ones(2, 7),
    }


def hunyuan_arguments() -> Arguments:
    return text(
        height=32,
        width=32,
        prompt_embeds_2=randn(2, 5, 8, seed=3),
        negative_prompt_embeds_2=randn(2, 5, 8, seed=4),
        prompt_attention_mask_2=torch.tensor([[1.0] * 3 + [0.0] * 2, [1.0] * 5]),
        negative_prompt_attention_mask_2=torch.ones(2, 5),
        use_resolution_binning=False,
        **masks(),
    )


def predict_hunyuan(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    sizes = torch.tensor([[1024.0, 1024.0, 32.0, 32.0, 0.0, 0.0]])  # original, target, crop
    return pipe.transformer(  # type: ignore[no-any-return]
        x,
        t.to(x.dtype),
        encoder_hidden_states=a["prompt_embeds"],
        text_embedding_mask=a["prompt_attention_mask"],
        encoder_hidden_states_t5=a["prompt_embeds_2"],
        text_embedding_mask_t5=a["prompt_attention_mask_2"],
        image_meta_size=sizes.repeat(len(x), 1),  # the network views it
        style=torch.zeros(len(x), dtype=torch.long),
        # Of 2 x 2 patches of an image that was trained with 32 x 32; the same for all samples.
        image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (2, 2), output_type="pt"),
    ).sample[:, :4]


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=16,
    )
    blocks = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **blocks
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        transformer=network,
        scheduler=scheduler,
    )


def sana_arguments() -> Arguments:
    options = {"negative_prompt": None, "use_resolution_binning": False}
    return text(height=32, width=32, **options, **masks())


def predict_sana(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Of DPM-Solver with the sigmas of a flow, which rounds its times down to whole numbers."""
    return pipe.transformer(  # type: ignore[no-any-return]
        x,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_attention_mask=a["prompt_attention_mask"],
        timestep=t,
    ).sample


def sdxl_inpainting() -> Any:
    network = sdxl_unet(in_channels=9)
    return certain(sdxl(diffusers.StableDiffusionXLInpaintPipeline, network, add_watermarker=False))


def sdxl_inpaint_arguments() -> Arguments:
    return inpaint_arguments() | pooled()


def predict_sdxl_inpaint(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return predict_sdxl(pipe, torch.cat([x, masked(pipe, a)], 1), t, a)


def refining() -> Any:
    more = {"add_watermarker": False, "requires_aesthetics_score": True}
    return sdxl(diffusers.StableDiffusionXLImg2ImgPipeline, sdxl_unet(ids=5), **more)


def refining_arguments() -> Arguments:
    return text(image=user_image(2), strength=0.7, **(pooled() | {"num_inference_steps": 5}))


def predict_refined(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Sizes, crop and a high aesthetic score; the unconditional rows have a low one."""
    ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 6.0]]).expand(len(x), 5)
    added = {"text_embeds": a["pooled_prompt_embeds"], "time_ids": ids}
    return predict_text(pipe, x, t, a, added_cond_kwargs=added)


def consistent() -> Any:
    return stable_diffusion(
        diffusers.LatentConsistencyModelPipeline,
        diffusers.LCMScheduler(**SD_SCHEDULE),
        network=lambda: text_unet(time_cond_proj_dim=8),
    )


def consistent_arguments() -> Arguments:
    return sized(guided=False, guidance_scale=8.5)


def predict_consistent(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """One row a sample, told the guidance beside the time."""
    frequencies = torch.exp(torch.arange(4) * -(torch.tensor(10_000.0).log() / 3))
    angles = torch.tensor(a["guidance_scale"] - 1) * 1000 * frequencies
    guidance = torch.cat([angles.sin(), angles.cos()]).expand(len(x), 8)
    return predict_text(pipe, x, t, a, timestep_cond=guidance)


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=diffusers_cases.pixart(8),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_sigma_arguments() -> Arguments:
    return sized(negative_prompt=None, use_resolution_binning=False, **masks())


def skipping_arguments() -> Arguments:
    """A further call for the condition, through fewer layers, follows from the second step on."""
    return sd3_arguments(skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)


def prompted_by_images() -> Any:
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, ddim())
    projection = torch.nn.Linear(6, 4 * 8)  # to four tokens
    weights = {"proj.weight": projection.weight, "proj.bias": projection.bias}
    weights |= {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    crossing = [name for name in pipe.unet.attn_processors if "attn2" in name]
    keys = {
        f"{2 * place + 1}.to_{letter}_ip.weight": torch.randn(8, 8) / 8**0.5
        for place in range(len(crossing))
        for letter in "kv"
    }
    pipe.load_ip_adapter(
        {"image_proj": weights, "ip_adapter": keys},
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    return pipe


def image_prompts() -> Arguments:
    """Of each adapter (one here) a null embedding, then the image's, which all samples share."""
    return sized(ip_adapter_image_embeds=[torch.cat([torch.zeros(1, 1, 6), randn(1, 1, 6)])])


def predict_prompted_by_images(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    images = [embeddings[1:].repeat(len(x), 1, 1) for embeddings in a["ip_adapter_image_embeds"]]
    return predict_text(pipe, x, t, a, added_cond_kwargs={"image_embeds": images})


def controlled_inpainting() -> Any:
    return certain(
        stable_diffusion(
            diffusers.StableDiffusionControlNetInpaintPipeline,
            ddim(),
            network=lambda: text_unet(in_channels=9),
            controlnet=control_unet(),
        )
    )


def controlled_inpaint_arguments() -> Arguments:
    control = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    scale = {"controlnet_conditioning_scale": 0.7}
    return inpaint_arguments() | {"control_image": control, **scale}


def predict_controlled_inpaint(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The ControlNet is given the sample alone; the mask and latents are for the unet."""
    down, middle = pipe.controlnet(
        x, t, a["prompt_embeds"], a["control_image"], conditioning_scale=0.7, return_dict=False
    )
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return predict_text(pipe, torch.cat([x, masked(pipe, a)], 1), t, a, **residuals)


def kandinsky() -> Any:
    network = text_unet(
        out_channels=8,  # the variance is learned
        addition_embed_type="image",
        encoder_hid_dim=6,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    autoencoder = diffusers.VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False,
        variance_type="learned_range",
        **(SD_SCHEDULE | {"beta_schedule": "linear", "steps_offset": 0}),
    )
    return diffusers.KandinskyV22Pipeline(unet=network, scheduler=scheduler, movq=autoencoder)


def kandinsky_arguments() -> Arguments:
    return {
        "image_embeds": randn(2, 6),
        "negative_image_embeds": randn(2, 6, seed=2),
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        "output_type": "pt",
    }


def predict_kandinsky(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The scheduler steps by the noise and the variance, of which only the noise is guided."""
    added = {"image_embeds": a["image_embeds"]}
    return pipe.unet(x, t, None, added_cond_kwargs=added).sample[:, :4]  # type: ignore[no-any-return]


def lumina() -> Any:
    network = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        cross_attention_dim=8,
    )
    torch.nn.init.zeros_(network.pad_token)  # uninitialised memory otherwise
    return diffusers.LuminaPipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=deep_vae(),
        text_encoder=None,
        tokenizer=None,
    )


def lumina_arguments() -> Arguments:
    return text(height=64, width=64, negative_prompt=None, **masks())


def predict_lumina(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Data less noise, at a time that is 1 for data; the first half of the rows.

    The image is twice as high as those that were trained with, of 4 tokens.
    """
    return -pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=1 - t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_mask=a["prompt_attention_mask"],
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384, linear_factor=2.0),
        cross_attention_kwargs={"base_sequence_length": 4},
    ).sample[:, :4]


FURTHER: tuple[PipelineCase, ...] = (
    PipelineCase("instruct-pix2pix", editing, edit_arguments, predict_edited, inputs=True),
    PipelineCase("t2i-adapter", adapted, adapted_arguments, predict_adapted),
    PipelineCase("sdxl-t2i-adapter", adapted_sdxl, adapted_sdxl_arguments, predict_adapted_sdxl),
    PipelineCase("marigold-depth", depth, depth_arguments, predict_depth),
    PipelineCase("stable-diffusion-continuous", continuous, sized, predict_text),
    PipelineCase("hunyuan-dit", hunyuan, hunyuan_arguments, predict_hunyuan, size=(3, 32, 32)),
    PipelineCase("sana", sana, sana_arguments, predict_sana, size=(3, 32, 32)),
    PipelineCase(
        "sdxl-inpaint", sdxl_inpainting, sdxl_inpaint_arguments, predict_sdxl_inpaint, inputs=True
    ),
    PipelineCase("sdxl-img2img", refining, refining_arguments, predict_refined, inputs=True),
    PipelineCase(
        "stable-diffusion-pag",
        # A third row is the condition's again, with the attention of the middle block perturbed.
        lambda: stable_diffusion(diffusers.StableDiffusionPAGPipeline, ddim()),
        lambda: sized(pag_scale=3.0),
        predict_text,
    ),
    PipelineCase("latent-consistency", consistent, consistent_arguments, predict_consistent),
    PipelineCase("pixart-sigma", pixart_sigma, pixart_sigma_arguments, predict_pixart),
    PipelineCase(
        "stable-diffusion-rescaled",
        # What the scheduler steps by is not linear in the rows.
        lambda: stable_diffusion(diffusers.StableDiffusionPipeline, ddim()),
        lambda: sized(guidance_rescale=0.7),
        predict_text,
    ),
    PipelineCase("sd3-skip-layers", sd3, skipping_arguments, predict_sd3),
    PipelineCase("ip-adapter", prompted_by_images, image_prompts, predict_prompted_by_images),
    PipelineCase(
        "controlnet-inpaint",
        controlled_inpainting,
        controlled_inpaint_arguments,
        predict_controlled_inpaint,
        inputs=True,
    ),
    PipelineCase("kandinsky22", kandinsky, kandinsky_arguments, predict_kandinsky),
    PipelineCase("lumina", lumina, lumina_arguments, predict_lumina, size=(3, 64, 64)),
)
