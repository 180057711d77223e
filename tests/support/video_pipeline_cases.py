"""Pipelines of videos: samples of five dimensions, or tokens of all frames."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from support.pipeline_cases import SD_SCHEDULE, Arguments, PipelineCase, randn, vae

__all__ = ["VIDEOS"]

#: Of the embedding of a prompt of 7 tokens.
WIDTH = 8


def prompts(mask: str = "", scale: float = 4.0, **more: Any) -> Arguments:
    """Of two prompts; of latents, since most of these pipelines have no autoencoder here."""
    kept = {"": torch.tensor([6, 4]), "negative_": torch.tensor([3, 5])}
    masks = {p + mask: (torch.arange(7) < n[:, None]).float() for p, n in kept.items() if mask}
    return {
        "prompt_embeds": randn(2, 7, WIDTH),
        "negative_prompt_embeds": randn(2, 7, WIDTH, seed=2),
        "guidance_scale": scale,
        "num_inference_steps": 3,
        "output_type": "latent",
        **masks,
        **more,
    }


def sized(frames: int, side: int) -> Arguments:
    return {"num_frames": frames, "height": side, "width": side}


def without_text(pipeline: Any, **components: Any) -> Any:
    return pipeline(text_encoder=None, tokenizer=None, **components)


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def unipc(**options: Any) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **options
    )


def wan_network(**options: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 8,
        "ffn_dim": 8,
        "num_layers": 1,
        "rope_max_seq_len": 16,
    }
    return diffusers.WanTransformer3DModel(**(settings | options))


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    )


def wan(**options: Any) -> Any:
    return without_text(
        diffusers.WanPipeline,
        transformer=wan_network(),
        vae=wan_vae(),
        scheduler=unipc(),
        **options,
    )


def predict_expanded(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Wan 2.2 of 5 B: a time for each token, all of them the same."""
    tokens = x[:, 0, :, ::2, ::2].flatten(1)
    return predict_wan(pipe, x, t[:, None].expand_as(tokens), a)


def wan22(**options: Any) -> Any:
    """Two transformers: of much noise and, below nine tenths of the times, of little."""
    first, second = wan_network(), wan_network()
    components = {"transformer": first, "transformer_2": second, "boundary_ratio": 0.9} | options
    return without_text(diffusers.WanPipeline, vae=wan_vae(), scheduler=unipc(), **components)


def predict_wan22(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    network = pipe.transformer if float(t[0]) >= 900 else pipe.transformer_2
    return network(  # type: ignore[no-any-return]
        hidden_states=x, timestep=t, encoder_hidden_states=a["prompt_embeds"]
    ).sample


def wan22_of_images() -> Any:
    """Beside the latents stand which frames are given, four of the video each, and theirs."""
    return without_text(
        diffusers.WanImageToVideoPipeline,
        vae=wan_vae(),
        scheduler=unipc(),
        transformer=wan_network(in_channels=12),
        transformer_2=wan_network(in_channels=12),
        boundary_ratio=0.9,
        image_encoder=None,
        image_processor=None,
    )


def image_arguments() -> Arguments:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return wan_arguments() | {"guidance_scale_2": 3.0, "image": image}


def predict_of_images(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    first = 2 * a["image"][:, :, None] - 1
    video = torch.cat([first, first.new_zeros(1, 3, 4, 32, 32)], 2)
    config = pipe.vae.config
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1)
        for each in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        latents = (pipe.vae.encode(video).latent_dist.mode() - mean) / std
    is_given = torch.zeros_like(latents)
    is_given[:, :, 0] = 1
    beside = torch.cat([is_given, latents], 1).expand(len(x), -1, -1, -1, -1)
    return predict_wan22(pipe, torch.cat([x, beside], 1), t, a)


def wan_arguments() -> Arguments:
    return prompts(**sized(5, 32)) | {"output_type": "pt"}


def predict_wan(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition."""
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x, timestep=t, encoder_hidden_states=a["prompt_embeds"]
    ).sample


def ltx() -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(4, 4),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=4,
    )
    scheduler = flow(use_dynamic_shifting=True)
    return without_text(
        diffusers.LTXPipeline, transformer=network, vae=autoencoder, scheduler=scheduler
    )


def predict_ltx(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Samples are the tokens of 2 frames of 2 x 2; the condition is the second half of the rows."""
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        encoder_hidden_states=a["prompt_embeds"],
        timestep=t,
        encoder_attention_mask=a["prompt_attention_mask"],
        num_frames=2,
        height=2,
        width=2,
        rope_interpolation_scale=(4 / 25, 16, 16),
    ).sample


def cogvideox(scheduler: Any) -> Any:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=7,
    )
    return without_text(
        diffusers.CogVideoXPipeline, transformer=network, vae=None, scheduler=scheduler
    )


def predict_cogvideox(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Frames come before channels; the condition is the second half of the rows."""
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x, encoder_hidden_states=a["prompt_embeds"], timestep=t
    ).sample


#: Of its checkpoints.
COGVIDEOX_SCHEDULE: Arguments = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}


def hunyuan_video() -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 4, 4),
    )
    return without_text(
        diffusers.HunyuanVideoPipeline,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=network,
        vae=None,
        scheduler=flow(shift=7.0),
    )


def hunyuan_video_arguments() -> Arguments:
    """Guidance is an argument, and of negative prompts a second call."""
    pooled = {"pooled_prompt_embeds": randn(2, 6)}
    pooled["negative_pooled_prompt_embeds"] = randn(2, 6, seed=2)
    return prompts("prompt_attention_mask", **sized(5, 32), **pooled, true_cfg_scale=3.0)


def predict_hunyuan_video(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_attention_mask=a["prompt_attention_mask"],
        pooled_projections=a["pooled_prompt_embeds"],
        guidance=torch.full((len(x),), 1000 * a["guidance_scale"]),
    ).sample


def animatediff() -> Any:
    network = diffusers.UNetMotionModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
    )
    return without_text(
        diffusers.AnimateDiffPipeline,
        vae=vae(),
        unet=network,
        motion_adapter=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **SD_SCHEDULE),
    )


def animatediff_arguments(**more: Any) -> Arguments:
    return prompts(**sized(3, 8), **more) | {"output_type": "pt"}


def predict_animatediff(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The unet has a row for each frame, and the same prompt for each of a sample's."""
    prompts_of_frames = a["prompt_embeds"].repeat_interleave(x.shape[2], 0)
    return pipe.unet(x, t, encoder_hidden_states=prompts_of_frames).sample  # type: ignore[no-any-return]


VIDEOS: tuple[PipelineCase, ...] = (
    PipelineCase("wan", wan, wan_arguments, predict_wan, latents=(4, 2, 4, 4)),
    PipelineCase(
        "wan22",
        wan22,
        lambda: wan_arguments() | {"guidance_scale_2": 3.0},
        predict_wan22,
        latents=(4, 2, 4, 4),
        levels=(500, 800),
        residuals=3,
    ),
    PipelineCase(
        "wan22-of-images",
        wan22_of_images,
        image_arguments,
        predict_of_images,
        latents=(4, 2, 4, 4),
        levels=(500, 800),
        residuals=3,
    ),
    PipelineCase(
        "wan22-expanded",
        lambda: wan(expand_timesteps=True),
        wan_arguments,
        predict_expanded,
        latents=(4, 2, 4, 4),
    ),
    PipelineCase(
        "ltx",
        ltx,
        lambda: prompts("prompt_attention_mask", **sized(5, 32)) | {"output_type": "pt"},
        predict_ltx,
        latents=(8, 4),
    ),
    PipelineCase(
        "cogvideox",
        lambda: cogvideox(diffusers.CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULE)),
        lambda: prompts(**sized(5, 32)),
        predict_cogvideox,
        latents=(2, 4, 4, 4),
    ),
    PipelineCase(
        "cogvideox-dpm",
        lambda: cogvideox(diffusers.CogVideoXDPMScheduler(**COGVIDEOX_SCHEDULE)),
        lambda: prompts(**sized(5, 32), use_dynamic_cfg=True),
        predict_cogvideox,
        latents=(2, 4, 4, 4),
    ),
    PipelineCase(
        "hunyuan-video",
        hunyuan_video,
        hunyuan_video_arguments,
        predict_hunyuan_video,
        latents=(4, 2, 4, 4),
    ),
    PipelineCase(
        "animatediff",
        animatediff,
        animatediff_arguments,
        predict_animatediff,
        latents=(4, 3, 4, 4),
    ),
    PipelineCase(
        "animatediff-unguided",
        animatediff,
        lambda: animatediff_arguments(scale=1.0),
        predict_animatediff,
        latents=(4, 3, 4, 4),
    ),
)
