"""Pipelines of every diffusers family, tiny, random and offline, each with its training loss.

A loss is written as the family's training script writes it, from the arguments that the test gives
the pipeline: nothing of it is captured.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, replayed_bound
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ood_monitor import Detector
from ood_monitor.densities.parts import Method
from support import diffusers_cases
from support.diffusers_cases import unet
from support.model_case import perturbed

__all__ = [
    "FEW",
    "PIPELINES",
    "PipelineCase",
    "case_of",
    "control_unet",
    "known",
    "of_the_first",
    "seeded_call",
    "text_unet",
]

Arguments = dict[str, Any]

#: Samples to explain others by, where no test asks for an explanation: one pass's.
FEW = 8


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline.

    Attributes:
        name: Its name.
        make: Gives it, each time the same.
        arguments: Of a call, without its generator; the same each time.
        predict: What the denoiser says of (pipe, x_t, t, arguments), as a training script asks it.
        size: Channels, height and width of an image; channels and length of a sound.
        one: Arguments of a call for one sample, if they are not those of the first.
        inputs: Whether the user gives an image.
        latents: Shape of a sample as the denoiser takes it, where images are not encoded.
        levels: Noise levels to fit at.
        residuals: How many levels without noise there are.
    """

    name: str
    make: Callable[[], Any]
    arguments: Callable[[], Arguments]
    predict: Callable[[Any, Tensor, Tensor, Arguments], Tensor]
    size: tuple[int, ...] = (3, 16, 16)
    one: Callable[[], Arguments] | None = None
    inputs: bool = False
    latents: tuple[int, ...] | None = None
    levels: tuple[int, ...] = (500,)
    residuals: int = 2

    def __call__(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = self.make()
            for module in pipe.components.values():
                if isinstance(module, torch.nn.Module):
                    perturbed(module.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def images(self, n: int, seed: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.latents is not None:
            return torch.randn(n, *self.latents, generator=generator)
        return torch.rand(n, *self.size, generator=generator)

    def call_of_one(self) -> Arguments:
        return self.one() if self.one else of_the_first(self.arguments())

    def loss(
        self,
        pipe: Any,
        x: Tensor,
        level: int,
        arguments: Arguments,
        seed: int = 0,
        amount: float = 1.0,
    ) -> Tensor:
        """-1/2 of the summed squared error of each sample (B, ...) at a noise level, (B,)."""
        generator = torch.Generator().manual_seed(1000 * seed + level)
        noise = amount * torch.randn(x.shape[1:], generator=generator).expand_as(x)
        config, shift = pipe.scheduler.config, flow_shift(pipe.scheduler)
        if hasattr(pipe.scheduler, "precondition_inputs"):
            x_t, t, target = preconditioned(pipe.scheduler, x, noise, level)
        elif isinstance(pipe.scheduler, diffusers.IPNDMScheduler):
            t = torch.tensor((level + 0.5) / 1000)
            cosine, sine = (0.5 * torch.pi * t).cos(), (0.5 * torch.pi * t).sin()
            x_t, target = cosine * x + sine * noise, cosine * noise - sine * x
        elif shift is not None:
            sigma = (level + 1) / 1000
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            x_t, t, target = (1 - sigma) * x + sigma * noise, torch.tensor(1000 * sigma), noise - x
        else:
            is_shifted = "snr_shift_scale" in config  # CogVideoX
            kind = type(pipe.scheduler) if is_shifted else diffusers.DDPMScheduler
            scheduler = kind.from_config(config)
            t = torch.tensor(level)
            x_t = scheduler.add_noise(x, noise, t)
            velocity = scheduler.get_velocity(x, noise, t)
            target = {"epsilon": noise, "v_prediction": velocity}[config.prediction_type]
            if config.get("timestep_type") == "continuous":
                product = scheduler.alphas_cumprod[level]
                t = 0.25 * ((1 - product) / product).sqrt().log()
        with torch.no_grad():
            error = self.predict(pipe, x_t, t.expand(len(x)), arguments) - target
        return -0.5 * error.square().flatten(1).sum(1)


def preconditioned(
    scheduler: Any, x: Tensor, noise: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's: what a network is given and told, and what it makes x of through c_out and c_skip."""
    config = scheduler.config
    ends = (each ** (1 / 7) for each in (config.sigma_min, config.sigma_max))
    sigma = torch.linspace(*ends, 1000, dtype=torch.float64)[level] ** 7
    noisy = x.double() + sigma * noise.double()
    zero, one = torch.zeros_like(noisy), torch.ones_like(noisy)
    c_skip = scheduler.precondition_outputs(one, zero, sigma)
    c_out = scheduler.precondition_outputs(zero, one, sigma)
    given, told = scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma)
    return given.to(x), told.to(x), ((x - c_skip * noisy) / c_out).to(x)


def flow_shift(scheduler: Any) -> float | None:
    """The shift of a scheduler of flow matching; None of any other."""
    config = scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return float(config.shift)
    return float(config.flow_shift) if config.get("use_flow_sigmas") else None


def known(
    pipe: Any,
    case: PipelineCase,
    *,
    count: int = 44,
    levels: tuple[int, ...] = (500,),
    layers: tuple[str, ...] | None = None,
    method: Method | None = None,
) -> Detector:
    """A detector for a pipeline with a case's weights, fitted once for all tests that ask."""
    state = _fitted(case.name, count, levels, layers, method)
    call = case.call_of_one()
    adapter = replayed_bound(pipe, call=call, levels=levels)
    return Detector.from_state_dict(state, adapter)


@functools.cache
def _fitted(
    name: str,
    count: int,
    levels: tuple[int, ...],
    layers: tuple[str, ...] | None,
    method: Method | None,
) -> dict[str, Any]:
    case = case_of(name)
    detector = fit_pipeline(
        case(),
        [case.images(count)],
        call=case.call_of_one(),
        levels=levels,
        layers=layers and list(layers),
        method=method,
        explain=FEW,
        progress=False,
        watches="both",
    )
    return detector.state_dict()


def case_of(name: str) -> PipelineCase:
    return next(case for case in PIPELINES if case.name == name)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        **options,
    )


def shifted_vae(channels: int, blocks: int = 2) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def text_unet(**options: Any) -> Any:
    return diffusers_cases.text_unet(text=8, **options)


def control_unet() -> Any:
    return diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        in_channels=4,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(2, 4),
    )


#: What checkpoints of Stable Diffusion say, on which its pipelines insist.
SD_SCHEDULE: Arguments = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def stable_diffusion(
    pipeline: Any, scheduler: Any, *, network: Any = text_unet, **components: Any
) -> Any:
    return pipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=network(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **SD_SCHEDULE, **options)


def text(count: int = 2, *, guided: bool = True, **more: Any) -> Arguments:
    negative = {"negative_prompt_embeds": torch.zeros(count, 7, 8)} if guided else {}
    return {
        "prompt_embeds": randn(count, 7, 8),
        "num_inference_steps": 3,
        "guidance_scale": 6.0 if guided else 1.0,
        "output_type": "pt",
        **negative,
        **more,
    }


def sized(**more: Any) -> Arguments:
    return text(height=16, width=16, **more)


def predict_text(pipe: Any, x: Tensor, t: Tensor, a: Arguments, **more: Any) -> Tensor:
    return pipe.unet(x, t, a["prompt_embeds"], **more).sample  # type: ignore[no-any-return]


def leading_euler() -> Any:
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_SCHEDULE)


#: As Playground v2.5 is sampled, and CosXL.
PRECONDITIONED: dict[str, Callable[[], Any]] = {
    "sdxl-edm": diffusers.EDMDPMSolverMultistepScheduler,
    "sdxl-edm-v": lambda: diffusers.EDMEulerScheduler(
        sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    ),
}


def sdxl(scheduler: Callable[[], Any] = leading_euler) -> Any:
    network = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=1,
            vocab_size=1000,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text_encoder,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=scheduler(),
    )


def sdxl_arguments() -> Arguments:
    pooled = {"pooled_prompt_embeds": randn(2, 32), "negative_pooled_prompt_embeds": randn(2, 32)}
    return sized(**pooled)


def predict_sdxl(pipe: Any, x: Tensor, t: Tensor, a: Arguments, **more: Any) -> Tensor:
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).expand(len(x), 6)
    added = {"text_embeds": a["pooled_prompt_embeds"], "time_ids": sizes}
    return pipe.unet(x, t, a["prompt_embeds"], added_cond_kwargs=added, **more).sample  # type: ignore[no-any-return]


def sd3_network(kind: Any = diffusers.SD3Transformer2DModel, **options: Any) -> Any:
    return kind(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=16,
        **options,
    )


def sd3(pipeline: Any = diffusers.StableDiffusion3Pipeline, **components: Any) -> Any:
    return pipeline(
        transformer=sd3_network(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        **components,
    )


def sd3_arguments(**more: Any) -> Arguments:
    pooled = {"pooled_prompt_embeds": randn(2, 6), "negative_pooled_prompt_embeds": randn(2, 6)}
    return sized(**pooled, **more)


def predict_sd3(pipe: Any, x: Tensor, t: Tensor, a: Arguments, **more: Any) -> Tensor:
    return pipe.transformer(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=a["prompt_embeds"],
        pooled_projections=a["pooled_prompt_embeds"],
        **more,
    ).sample


def flux(pipeline: Any, *, transformer: Any = None, **components: Any) -> Any:
    return pipeline(
        transformer=transformer or diffusers_cases.flux(text=8, pooled=6),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=shifted_vae(1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        **components,
    )


def flux_arguments(count: int = 2, **more: Any) -> Arguments:
    return {
        "prompt_embeds": randn(count, 7, 8),
        "pooled_prompt_embeds": randn(count, 6),
        "guidance_scale": 5.0,
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        "output_type": "pt",
        **more,
    }


def flux_ids() -> Tensor:
    """Of 8 x 8 latents, in patches of 2 x 2."""
    ids = torch.zeros(16, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return ids


def predict_flux(pipe: Any, x: Tensor, t: Tensor, a: Arguments, **more: Any) -> Tensor:
    given = {"hidden_states": x, "img_ids": flux_ids(), **more}
    return pipe.transformer(**given, **flux_conditions(t, a)).sample  # type: ignore[no-any-return]


def flux_conditions(t: Tensor, a: Arguments) -> Arguments:
    return {
        "timestep": t / 1000,
        "guidance": torch.full((len(t),), a["guidance_scale"]),
        "pooled_projections": a["pooled_prompt_embeds"],
        "encoder_hidden_states": a["prompt_embeds"],
        "txt_ids": torch.zeros(7, 3),
    }


def dit() -> Any:
    network, scheduler = diffusers_cases.dit(1000), diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer=network, vae=vae(), scheduler=scheduler)


def predict_dit(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    labels = torch.tensor(a["class_labels"])
    return pipe.transformer(x, timestep=t, class_labels=labels).sample[:, :4]  # type: ignore[no-any-return]


def pixart() -> Any:
    return diffusers.PixArtAlphaPipeline(
        transformer=diffusers_cases.pixart(8),
        vae=vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def pixart_arguments() -> Arguments:
    masks = {"prompt_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3])}
    masks["negative_prompt_attention_mask"] = torch.ones(2, 7)
    return sized(**masks, negative_prompt=None, use_resolution_binning=False)


def predict_pixart(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return pipe.transformer(  # type: ignore[no-any-return]
        x,
        encoder_hidden_states=a["prompt_embeds"],
        encoder_attention_mask=a["prompt_attention_mask"],
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample[:, :4]


def ldm() -> Any:
    autoencoder = diffusers.VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.LDMPipeline(vqvae=autoencoder, unet=unet(), scheduler=scheduler)


def inpainting() -> Any:
    return certain(
        stable_diffusion(
            diffusers.StableDiffusionInpaintPipeline,
            ddim(),
            network=lambda: text_unet(in_channels=9),
        )
    )


def certain(pipe: Any) -> Any:
    """The pipeline, its encoder so sure that a draw from the posterior is its mean."""
    last = pipe.vae.quant_conv or pipe.vae.encoder.conv_out
    with torch.no_grad():
        last.bias[pipe.vae.config.latent_channels :] = -100
    return pipe


def inpaint_arguments() -> Arguments:
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    return sized(image=user_image(2), mask_image=mask, strength=1.0)


def user_image(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def masked(pipe: Any, a: Arguments) -> Tensor:
    """The mask, and the latents of what it leaves of the image, which are further channels."""
    mask = torch.nn.functional.interpolate(a["mask_image"], size=(8, 8))
    left = (2 * a["image"] - 1) * (a["mask_image"] < 0.5)
    latents = pipe.vae.encode(left).latent_dist.mean * pipe.vae.config.scaling_factor
    return torch.cat([mask, latents], 1)


def predict_inpaint(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return predict_text(pipe, torch.cat([x, masked(pipe, a)], 1), t, a)


def predict_controlled(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    down, middle = pipe.controlnet(
        x, t, a["prompt_embeds"], a["image"], conditioning_scale=0.7, return_dict=False
    )
    return pipe.unet(  # type: ignore[no-any-return]
        x,
        t,
        a["prompt_embeds"],
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample


def unconditional(pipeline: Any, scheduler: Any) -> Callable[[], Any]:
    return lambda: pipeline(unet(), scheduler)


def sound() -> Any:
    network = diffusers.UNet1DModel(
        sample_size=32,
        sample_rate=32,
        extra_in_channels=64,  # for what the projection tells of the time
        time_embedding_type="fourier",
        use_timestep_embedding=False,
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
        mid_block_type="UNetMidBlock1D",
        block_out_channels=(32, 32),
    )
    return diffusers.DanceDiffusionPipeline(network, diffusers.IPNDMScheduler())


def sounds() -> Arguments:
    return {"batch_size": 2, "num_inference_steps": 3}


def pixels() -> Arguments:
    return {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}


def predict_pixels(pipe: Any, x: Tensor, t: Tensor, a: Arguments) -> Tensor:
    return pipe.unet(x, t).sample  # type: ignore[no-any-return]


def seeded_call(arguments: Arguments, seed: int = 0) -> Arguments:
    return arguments | {"generator": torch.Generator().manual_seed(seed)}


def of_the_first(arguments: Arguments) -> Arguments:
    return {
        name: value[:1] if isinstance(value, Tensor | list) else value
        for name, value in arguments.items()
    }


def _text(name: str, scheduler: Callable[[], Any], **options: Any) -> PipelineCase:
    def make() -> Any:
        return stable_diffusion(diffusers.StableDiffusionPipeline, scheduler())

    return PipelineCase(name, make, sized, predict_text, **options)


PIPELINES: tuple[PipelineCase, ...] = (
    PipelineCase(
        "ddpm",
        unconditional(diffusers.DDPMPipeline, diffusers.DDPMScheduler()),
        pixels,
        predict_pixels,
        (3, 8, 8),
    ),
    PipelineCase(
        "ddim",
        unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler()),
        pixels,
        predict_pixels,
        (3, 8, 8),
    ),
    PipelineCase("ldm", ldm, pixels, predict_pixels),
    PipelineCase("dance-diffusion", sound, sounds, predict_pixels, (2, 32)),
    _text("stable-diffusion", ddim),
    _text("stable-diffusion-v", lambda: ddim(prediction_type="v_prediction")),
    _text(
        "stable-diffusion-pndm",
        lambda: diffusers.PNDMScheduler(skip_prk_steps=True, **SD_SCHEDULE),
    ),
    PipelineCase(
        "stable-diffusion-unguided",
        lambda: stable_diffusion(diffusers.StableDiffusionPipeline, ddim()),
        lambda: sized(guided=False),
        predict_text,
    ),
    PipelineCase(
        "img2img",
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, ddim()),
        lambda: text(image=user_image(2), strength=0.7),
        predict_text,
        inputs=True,
    ),
    PipelineCase(
        "inpaint",
        inpainting,
        inpaint_arguments,
        predict_inpaint,
        inputs=True,
    ),
    PipelineCase(
        "controlnet",
        lambda: stable_diffusion(
            diffusers.StableDiffusionControlNetPipeline, ddim(), controlnet=control_unet()
        ),
        lambda: text(image=user_image(2), controlnet_conditioning_scale=0.7),
        predict_controlled,
        inputs=True,
    ),
    PipelineCase("sdxl", sdxl, sdxl_arguments, predict_sdxl),
    *(
        PipelineCase(name, functools.partial(sdxl, scheduler), sdxl_arguments, predict_sdxl)
        for name, scheduler in PRECONDITIONED.items()
    ),
    PipelineCase("sd3", sd3, sd3_arguments, predict_sd3),
    PipelineCase(
        "flux",
        lambda: flux(diffusers.FluxPipeline),
        flux_arguments,
        predict_flux,
    ),
    PipelineCase(
        "flux-img2img",
        lambda: flux(diffusers.FluxImg2ImgPipeline),
        lambda: flux_arguments(image=user_image(2), strength=0.7),
        predict_flux,
        inputs=True,
    ),
    PipelineCase(
        "dit",
        dit,
        lambda: {"class_labels": [3, 1], "num_inference_steps": 3, "output_type": "np"},
        predict_dit,
    ),
    PipelineCase("pixart", pixart, pixart_arguments, predict_pixart),
)
