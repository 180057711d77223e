"""Further pipelines of videos: Kandinsky 5, whose images are videos of one frame, and others."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from support.pipeline_cases import Arguments, PipelineCase, randn, vae
from support.video_pipeline_cases import WIDTH, flow, prompts, sized, without_text

__all__ = ["FURTHER_VIDEOS"]


def kandinsky5(pipeline: Any, **options: Any) -> Any:
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=6,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        **options,
    )
    pipe = without_text(
        pipeline,
        transformer=network,
        vae=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=flow(shift=5.0),
    )
    pipe.resolutions = [(64, 64)]  # of images, which are a thousand pixels a side otherwise
    return pipe


def kandinsky5_arguments(**more: Any) -> Arguments:
    lengths = {"prompt_cu_seqlens": torch.tensor([0, 7, 14])}
    return {
        "prompt_embeds_qwen": randn(2, 7, WIDTH),
        "prompt_embeds_clip": randn(2, 6),
        "negative_prompt_embeds_qwen": randn(2, 7, WIDTH, seed=2),
        "negative_prompt_embeds_clip": randn(2, 6, seed=2),
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "output_type": "latent",
        **lengths,
        **{f"negative_{name}": each for name, each in lengths.items()},
        **more,
    }


def one_kandinsky5(**more: Any) -> Arguments:
    a = kandinsky5_arguments(**more)
    return {
        k: v[: 2 if "cu_seqlens" in k else 1] if torch.is_tensor(v) else v for k, v in a.items()
    }


def predict_kandinsky5(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Channels are last; where frames are given as conditions, none is here."""
    config, (_, frames, height, width, channels) = pipe.transformer.config, x.shape
    more = channels + 1 if config.visual_cond else 0
    video = "num_frames" in a
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=torch.cat([x, x.new_zeros(*x.shape[:-1], more)], -1),
        encoder_hidden_states=a["prompt_embeds_qwen"],
        pooled_projections=a["prompt_embeds_clip"],
        timestep=t,
        visual_rope_pos=[torch.arange(n) for n in (frames, height // 2, width // 2)],
        text_rope_pos=torch.arange(7),
        scale_factor=(1.0, 3.16, 3.16) if video else (1.0, 1.0, 1.0),
    ).sample


def mochi() -> Any:
    network = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=7,
    )
    scheduler = flow(invert_sigmas=True)
    return without_text(diffusers.MochiPipeline, transformer=network, vae=None, scheduler=scheduler)


def predict_mochi(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        encoder_hidden_states=a["prompt_embeds"],
        timestep=t,
        encoder_attention_mask=a["prompt_attention_mask"],
    ).sample


def latte() -> Any:
    network = diffusers.LatteTransformer3DModel(
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,  # the variance is learned
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return without_text(
        diffusers.LattePipeline,
        transformer=network,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def latte_arguments() -> Arguments:
    size = {"video_length": 2, "height": 8, "width": 8, "clean_caption": False}
    return prompts(**size, negative_prompt=None, mask_feature=False) | {"output_type": "pt"}


def predict_latte(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x, encoder_hidden_states=a["prompt_embeds"], timestep=t
    ).sample[:, :4]


def allegro() -> Any:
    network = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=4,
        caption_channels=WIDTH,
    )
    with torch.no_grad():
        for parameter in network.transformer_blocks.parameters():
            parameter.mul_(3)  # else little is left of a prompt
    return without_text(
        diffusers.AllegroPipeline,
        transformer=network,
        vae=None,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


def predict_allegro(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    rotary = pipe._prepare_rotary_positional_embeddings(
        len(x), 8 * x.shape[3], 8 * x.shape[4], x.shape[2], "cpu"
    )
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_attention_mask=a["prompt_attention_mask"],
        timestep=t,
        image_rotary_emb=rotary,
    ).sample


FURTHER_VIDEOS: tuple[PipelineCase, ...] = (
    PipelineCase(
        "kandinsky5-video",
        lambda: kandinsky5(diffusers.Kandinsky5T2VPipeline, visual_cond=True),
        lambda: kandinsky5_arguments(**sized(5, 32)),
        predict_kandinsky5,
        one=lambda: one_kandinsky5(**sized(5, 32)),
        latents=(2, 4, 4, 4),
    ),
    PipelineCase(
        "kandinsky5-image",
        lambda: kandinsky5(diffusers.Kandinsky5T2IPipeline),
        lambda: kandinsky5_arguments(height=64, width=64),
        predict_kandinsky5,
        one=lambda: one_kandinsky5(height=64, width=64),
        latents=(1, 8, 8, 4),
    ),
    PipelineCase(
        "mochi",
        mochi,
        lambda: prompts("prompt_attention_mask", **sized(7, 32)),
        predict_mochi,
        latents=(4, 2, 4, 4),
    ),
    PipelineCase("latte", latte, latte_arguments, predict_latte, latents=(4, 2, 4, 4)),
    PipelineCase(
        "allegro",
        allegro,
        lambda: prompts("prompt_attention_mask", **sized(8, 32), negative_prompt=None),
        predict_allegro,
        latents=(4, 2, 4, 4),
    ),
)
