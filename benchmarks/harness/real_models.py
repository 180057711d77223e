"""Pipelines of denoisers as large as SD 1.5's, SDXL's, SD3's and Flux's, of random weights.

At a scale widths go by its square root, so that parameters go by it, and positions by its square.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


@dataclass(frozen=True)
class Model:
    """A pipeline by its denoiser.

    Attributes:
        make: Gives it at a scale of its parameters.
        arguments: Of a call without guidance, of a pipeline at that scale.
        guided: What a call with guidance has beside these; None of one that has none, as Flux is.
    """

    make: Callable[[float], Any]
    arguments: Callable[[float], dict[str, Any]]
    guided: Callable[[float], dict[str, Any]] | None


def width(full: int, scale: float, multiple: int) -> int:
    """A width at which parameters, which go by its square, are so many times fewer."""
    return max(multiple, round(full * scale**0.5 / multiple) * multiple)


def side(full: int, scale: float) -> int:
    """Of latents, a multiple of 8, of which UNets leave an eighth: no less than two."""
    return max(16, int(full * scale) // 8 * 8)


def words(full: int, scale: float) -> int:
    """Of a prompt."""
    return max(8, round(full * scale**2))


def sd15_unet(scale: float) -> nn.Module:
    return cast(Any, diffusers.UNet2DConditionModel)(  # type: ignore[no-any-return]
        sample_size=side(64, scale),
        cross_attention_dim=width(768, scale, 32),
        attention_head_dim=8,
        block_out_channels=tuple(width(w, scale, 32) for w in (320, 640, 1280, 1280)),
    )


def sdxl_unet(scale: float) -> nn.Module:
    widths = tuple(width(w, scale, 32) for w in (320, 640, 1280))
    return cast(Any, diffusers.UNet2DConditionModel)(  # type: ignore[no-any-return]
        sample_size=side(128, scale),
        cross_attention_dim=width(2048, scale, 32),
        attention_head_dim=tuple(max(1, w // 64) for w in widths),
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256,
    )


def sd3_transformer(scale: float) -> nn.Module:
    heads = width(24, scale, 1)
    return cast(Any, diffusers.SD3Transformer2DModel)(  # type: ignore[no-any-return]
        sample_size=side(128, scale),
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=4096,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


def flux_transformer(scale: float) -> nn.Module:
    return cast(Any, diffusers.FluxTransformer2DModel)(  # type: ignore[no-any-return]
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=width(24, scale, 1),
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )


def vae(channels: int) -> Any:
    """As small as can be, and eight times finer than latents: it decodes nothing here."""
    return cast(Any, diffusers.AutoencoderKL)(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=1,
        shift_factor=0.0,
    )


def encoders(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def euler() -> Any:
    kind = cast(Any, diffusers.EulerDiscreteScheduler)
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def flow() -> Any:
    return cast(Any, diffusers.FlowMatchEulerDiscreteScheduler)(shift=3.0)


def sd15(scale: float) -> Any:
    return cast(Any, diffusers.StableDiffusionPipeline)(
        vae=vae(4),
        unet=sd15_unet(scale),
        scheduler=euler(),
        **encoders("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        requires_safety_checker=False,
    )


def sdxl(scale: float) -> Any:
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_hidden_layers=1,
        vocab_size=10,
        projection_dim=1280,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return cast(Any, diffusers.StableDiffusionXLPipeline)(
        vae=vae(4),
        unet=sdxl_unet(scale),
        scheduler=euler(),
        text_encoder_2=CLIPTextModelWithProjection(config),
        **encoders("text_encoder", "tokenizer", "tokenizer_2"),
    )


def sd3(scale: float) -> Any:
    names = [f"{kind}{of}" for kind in ("text_encoder", "tokenizer") for of in ("", "_2", "_3")]
    return cast(Any, diffusers.StableDiffusion3Pipeline)(
        vae=vae(16), transformer=sd3_transformer(scale), scheduler=flow(), **encoders(*names)
    )


def flux(scale: float) -> Any:
    names = [f"{kind}{of}" for kind in ("text_encoder", "tokenizer") for of in ("", "_2")]
    return cast(Any, diffusers.FluxPipeline)(
        vae=vae(16), transformer=flux_transformer(scale), scheduler=flow(), **encoders(*names)
    )


def prompted(
    latents: int, length: int, text: int, pooled: int, scale: float, prefix: str = ""
) -> dict[str, Any]:
    """Embeddings of a prompt, and the size of an image."""
    found: dict[str, Any] = {f"{prefix}prompt_embeds": torch.randn(1, words(length, scale), text)}
    if pooled:
        found[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, pooled)
    pixels = 8 * side(latents, scale)
    return found | ({} if prefix else {"height": pixels, "width": pixels})


def of_sd15(scale: float, prefix: str = "") -> dict[str, Any]:
    return prompted(64, 77, width(768, scale, 32), 0, scale, prefix)


def of_sdxl(scale: float, prefix: str = "") -> dict[str, Any]:
    return prompted(128, 77, width(2048, scale, 32), 1280, scale, prefix)


def of_sd3(scale: float, prefix: str = "") -> dict[str, Any]:
    return prompted(128, 333, 4096, 2048, scale, prefix)


def of_flux(scale: float) -> dict[str, Any]:
    return prompted(128, 512, 4096, 768, scale)


def guidance(of: Callable[..., dict[str, Any]]) -> Callable[[float], dict[str, Any]]:
    return lambda scale: {**of(scale, "negative_"), "guidance_scale": 6.0}


def unguided(of: Callable[..., dict[str, Any]]) -> Callable[[float], dict[str, Any]]:
    return lambda scale: {**of(scale), "guidance_scale": 1.0}


MODELS: Mapping[str, Model] = {
    "SD 1.5": Model(sd15, unguided(of_sd15), guidance(of_sd15)),
    "SDXL": Model(sdxl, unguided(of_sdxl), guidance(of_sdxl)),
    "SD3": Model(sd3, unguided(of_sd3), guidance(of_sd3)),
    "Flux": Model(flux, of_flux, None),
}


def pipeline(model: Model, scale: float, device: str, dtype: torch.dtype) -> Any:
    """With random weights, made where and as they are used."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe = model.make(scale)
    finally:
        torch.set_default_dtype(before)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
            if dtype != torch.float32:  # what was made in single precision all the same
                module.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
