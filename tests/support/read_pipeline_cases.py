"""Pipelines that step other networks: lists of samples, other times, signs and orders of guidance.

A sign is minus where the network predicts the data less the noise.
"""

from typing import Any

import diffusers
import torch
from torch import Tensor

from support.pipeline_cases import (
    Arguments,
    PipelineCase,
    flux_ids,
    of_the_first,
    randn,
    shifted_vae,
    sized,
    vae,
)

__all__ = ["READ"]


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def kept(*lengths: int) -> Tensor:
    """A mask of prompts of 7 tokens, the first so many of which are their own."""
    return (torch.arange(7) < torch.tensor(lengths)[:, None]).long()


def guided(mask: str = "", scale: str = "guidance_scale", size: int = 16) -> Arguments:
    """Of two prompts, both padded where masks have a name: pipelines leave out a mask of ones."""
    masks = {mask: kept(6, 4), f"negative_{mask}": kept(3, 5)} if mask else {}
    return {
        "prompt_embeds": randn(2, 7, 8),
        "negative_prompt_embeds": randn(2, 7, 8, seed=2),
        scale: 3.0,
        "num_inference_steps": 3,
        "height": size,
        "width": size,
        "output_type": "pt",
        **masks,
    }


def without_text(pipeline: Any, **components: Any) -> Any:
    return pipeline(text_encoder=None, tokenizer=None, **components)


def z_image() -> Any:
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[80, 8, 8],
    )
    return without_text(
        diffusers.ZImagePipeline,
        transformer=network,
        vae=shifted_vae(4),
        scheduler=flow(shift=3.0),
    )


def z_image_arguments() -> Arguments:
    prompts = {"prompt_embeds": [randn(7, 8), randn(4, 8, seed=3)]}
    prompts["negative_prompt_embeds"] = [randn(3, 8, seed=2), randn(5, 8, seed=4)]
    return guided() | prompts


def predict_z_image(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Samples and prompts are lists, a sample is a video of one frame, and time is that of data."""
    frames = list(x.unsqueeze(2))
    return -torch.stack(pipe.transformer(frames, 1 - t / 1000, a["prompt_embeds"]).sample)[:, :, 0]


def lumina2() -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 8, 8),
        cap_feat_dim=8,
    )
    return without_text(
        diffusers.Lumina2Pipeline,
        transformer=network,
        # The pipeline takes for granted that a latent is 8 pixels wide.
        vae=shifted_vae(4, blocks=4),
        scheduler=flow(shift=6.0),
    )


def lumina2_arguments() -> Arguments:
    return guided("prompt_attention_mask", size=32)


def predict_lumina2(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition; time is that of data."""
    return -pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=1 - t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_attention_mask=a["prompt_attention_mask"],
    ).sample


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.3, -0.2],
        latents_std=[1.5, 0.8],
    )


def qwen_scheduler() -> Any:
    return flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)


def qwen() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return without_text(
        diffusers.QwenImagePipeline, transformer=network, vae=qwen_vae(), scheduler=qwen_scheduler()
    )


def qwen_arguments() -> Arguments:
    return guided("prompt_embeds_mask", scale="true_cfg_scale")


def predict_qwen(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition; sizes in tokens are a list a sample."""
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_hidden_states_mask=a["prompt_embeds_mask"],
        img_shapes=[[(1, 4, 4)]] * len(x),
    ).sample


class BeforePrompts:
    """What a pipeline that is given embeddings asks of a processor, a real one being of videos too.

    Those need torchvision, which the environment leaves out.
    """

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        return [[0] * len(messages)]

    def encode(self, token: str) -> list[int]:
        return [1]


def qwen21() -> Any:
    network = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    autoencoder = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    )
    return diffusers.QwenImage21Pipeline(
        transformer=network,
        vae=autoencoder,
        scheduler=qwen_scheduler(),
        text_encoder=None,
        processor=BeforePrompts(),
    )


def qwen21_arguments(**more: Any) -> Arguments:
    return guided("prompt_embeds_mask", scale="true_cfg_scale", size=64) | more


def predict_qwen21(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Text and image are one sequence, of which the pipeline's later steps ask for the image alone.

    Keys and values of the text, which do not depend on time, come from a cache then. In the mask of
    what is image, 4 of its tokens are one.
    """
    is_image = torch.tensor([False] * 7 + [True] * 4).expand(len(x), -1)
    output: Tensor = pipe.transformer(
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_hidden_states_mask=a["prompt_embeds_mask"],
        img_shapes=[[(1, 4, 4)]] * len(x),
        img_mask=is_image,
    ).sample
    return output[:, -x.shape[1] :]


def nucleus() -> Any:
    network = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        dense_moe_strategy="all_moe",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=1.0,
    )
    for name, parameter in network.named_parameters():
        if "experts." in name:  # which are left as memory was
            torch.nn.init.normal_(parameter, std=0.2)
    return diffusers.NucleusMoEImagePipeline(
        transformer=network,
        vae=qwen_vae(),
        scheduler=flow(shift=3.0),
        text_encoder=None,
        processor=None,
    )


def nucleus_arguments() -> Arguments:
    return guided("prompt_embeds_mask")


def predict_nucleus(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition; time is that of noise, the sign minus."""
    return -pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_hidden_states_mask=a["prompt_embeds_mask"],
        img_shapes=[(1, 4, 4)] * len(x),
    ).sample


def flow_unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def hidream(scheduler: Any) -> Any:
    network = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 6],
        text_emb_dim=6,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 2],
    )
    numbered = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = without_text(
        diffusers.HiDreamImagePipeline,
        transformer=network,
        vae=shifted_vae(4),
        scheduler=scheduler,
        text_encoder_4=None,
        tokenizer_4=None,
        **dict.fromkeys(numbered),
    )
    pipe.default_sample_size = 8  # latents, to whose area the pipeline brings every size
    return pipe


def hidream_arguments() -> Arguments:
    embeddings = {}
    for prefix, seed in {"": 1, "negative_": 2}.items():
        embeddings[f"{prefix}prompt_embeds_t5"] = randn(2, 7, 8, seed=seed)
        embeddings[f"{prefix}prompt_embeds_llama3"] = randn(3, 2, 5, 6, seed=seed)
        embeddings[f"{prefix}pooled_prompt_embeds"] = randn(2, 6, seed=seed)
    of_one_encoder = ("prompt_embeds", "negative_prompt_embeds")
    return {k: v for k, v in guided().items() if k not in of_one_encoder} | embeddings


def one_hidream() -> Arguments:
    """Layers come first in Llama's embeddings, then samples."""
    llama = {k: v[:, :1] for k, v in hidream_arguments().items() if "llama3" in k}
    return of_the_first(hidream_arguments()) | llama


def predict_hidream(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The condition is the second half of the rows."""
    return -pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timesteps=t,
        encoder_hidden_states_t5=a["prompt_embeds_t5"],
        encoder_hidden_states_llama3=a["prompt_embeds_llama3"],
        pooled_embeds=a["pooled_prompt_embeds"],
    ).sample


def flux2(pipeline: Any, *, distilled: bool) -> Any:
    network = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=distilled,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=1,
    )
    autoencoder.bn.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    autoencoder.bn.running_var.copy_(torch.tensor([1.5, 0.8, 1.0, 1.2]))
    scheduler = flow(use_dynamic_shifting=True)
    return without_text(pipeline, transformer=network, vae=autoencoder, scheduler=scheduler)


def flux2_arguments() -> Arguments:
    return sized(guided=False, guidance_scale=5.0)


def flux2_ids() -> Arguments:
    """Frames, heights and widths of image tokens, and numbers of text tokens."""
    image, words = torch.zeros(16, 4), torch.zeros(7, 4)
    image[:, :3], words[:, 3] = flux_ids(), torch.arange(7)
    return {"img_ids": image, "txt_ids": words}


def predict_flux2(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Without a negative prompt, guidance is an argument."""
    scale = None if "negative_prompt_embeds" in a else torch.full((len(t),), a["guidance_scale"])
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t / 1000,
        guidance=scale,
        encoder_hidden_states=a["prompt_embeds"],
        **flux2_ids(),
    ).sample


def chroma() -> Any:
    network = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    return without_text(
        diffusers.ChromaPipeline,
        transformer=network,
        vae=shifted_vae(1),
        scheduler=flow(use_dynamic_shifting=True),
    )


def chroma_arguments() -> Arguments:
    masks = {k: v.float() for k, v in guided("prompt_attention_mask").items() if "mask" in k}
    return guided() | masks


def predict_chroma(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition; the mask has the image's tokens too."""
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=a["prompt_embeds"],
        attention_mask=torch.cat([a["prompt_attention_mask"], torch.ones(len(x), 16)], 1),
        img_ids=flux_ids(),
        txt_ids=torch.zeros(7, 3),
    ).sample


def cogview4(**options: Any) -> Any:
    network = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return without_text(
        diffusers.CogView4Pipeline, transformer=network, vae=vae(), scheduler=flow(**options)
    )


#: Of its checkpoint.
COGVIEW4_SHIFT: Arguments = {
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_shift": 0.25,
    "max_shift": 0.75,
}


def predict_cogview4(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """Guidance is a second call, without the condition; time is that before the noise's shift.

    The shift, of odds, goes by the number of tokens, here 16.
    """
    config = pipe.scheduler.config
    shift = 1.0
    if config.use_dynamic_shifting:
        shift = config.max_shift * (16 / config.base_image_seq_len) ** 0.5 + config.base_shift
    size = torch.full((len(x), 2), 16.0)
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        encoder_hidden_states=a["prompt_embeds"],
        timestep=1000 / (1 + shift * (1000 / t - 1)),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(len(x), 2),
    ).sample


def aura_flow() -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".attn." in name:  # else its norms leave little of a prompt
                parameter.mul_(3)
    return without_text(
        diffusers.AuraFlowPipeline, transformer=network, vae=vae(), scheduler=flow(shift=1.73)
    )


def aura_flow_arguments() -> Arguments:
    return guided("prompt_attention_mask")


def predict_aura_flow(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    """The condition is the second half of the rows; the network is given no mask."""
    return pipe.transformer(  # type: ignore[no-any-return]
        x, encoder_hidden_states=a["prompt_embeds"], timestep=t / 1000
    ).sample


READ: tuple[PipelineCase, ...] = (
    PipelineCase("z-image", z_image, z_image_arguments, predict_z_image),
    PipelineCase(
        "z-image-unguided",
        z_image,
        lambda: z_image_arguments() | {"guidance_scale": 0.0},
        predict_z_image,
    ),
    PipelineCase("lumina2", lumina2, lumina2_arguments, predict_lumina2, size=(3, 32, 32)),
    PipelineCase("qwen-image", qwen, qwen_arguments, predict_qwen),
    PipelineCase("qwen-image-21", qwen21, qwen21_arguments, predict_qwen21, size=(4, 64, 64)),
    PipelineCase(
        "qwen-image-21-uncached",
        qwen21,
        lambda: qwen21_arguments(use_kv_cache=False),
        predict_qwen21,
        size=(4, 64, 64),
    ),
    PipelineCase("nucleus-moe", nucleus, nucleus_arguments, predict_nucleus),
    PipelineCase(
        "hidream",
        lambda: hidream(flow(shift=3.0)),
        hidream_arguments,
        predict_hidream,
        one=one_hidream,
    ),
    PipelineCase(
        "hidream-unipc",
        lambda: hidream(flow_unipc()),
        hidream_arguments,
        predict_hidream,
        one=one_hidream,
    ),
    PipelineCase(
        "flux2",
        lambda: flux2(diffusers.Flux2Pipeline, distilled=True),
        flux2_arguments,
        predict_flux2,
        latents=(16, 4),
    ),
    PipelineCase(
        "flux2-klein",
        lambda: flux2(diffusers.Flux2KleinPipeline, distilled=False),
        guided,
        predict_flux2,
        latents=(16, 4),
    ),
    PipelineCase("chroma", chroma, chroma_arguments, predict_chroma),
    PipelineCase("cogview4", lambda: cogview4(**COGVIEW4_SHIFT), guided, predict_cogview4),
    PipelineCase("cogview4-unshifted", cogview4, guided, predict_cogview4),
    PipelineCase("aura-flow", aura_flow, aura_flow_arguments, predict_aura_flow),
)
