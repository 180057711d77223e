"""Denoisers of every diffusers family, tiny and random, each with its training script's loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import ood_monitor as om

__all__ = ["FAMILIES", "Family", "unet"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: Its name.
        network: Makes the denoiser.
        scheduler: What its pipelines have.
        shapes: Of one sample's tensors, by name; the sample itself is ``x``.
        condition: The denoiser's keywords from a batch, as a user of the adapter gives them.
        call: The denoiser's output, as a training script spells it out.
        labels: The number of classes, if the batch has labels.
        time: What the adapter is told of the denoiser's time.
    """

    name: str
    network: Callable[[], nn.Module]
    scheduler: Any
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Any, Tensor, Tensor, Tensors], Tensor]
    condition: Callable[[Tensors], dict[str, Any]] = lambda batch: {}
    labels: int = 0
    time: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def batch(self, n: int = 4) -> Tensors:
        tensors = {name: torch.randn(n, *shape) for name, shape in self.shapes.items()}
        return tensors | ({"label": torch.randint(self.labels, (n,))} if self.labels else {})

    def adapter(self, network: nn.Module, **options: Any) -> om.DenoisingBound:
        return om.DenoisingBound(
            network,
            self.scheduler,
            inputs=lambda batch: batch["x"],
            condition=self.condition,
            **self.time,
            **options,
        )


def unet(**options: Any) -> diffusers.UNet2DModel:
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(settings | options))


def text_unet(text: int = 6, **options: Any) -> nn.Module:
    """A UNet for embeddings of such a width."""
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": text,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**(settings | options))


def sdxl_unet() -> nn.Module:
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=5 + 6 * 2,
    )


def dit(labels: int = 10) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # the variance is learned
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_embeds_ada_norm=labels,
    )


def pixart(text: int = 6) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=text,
        use_additional_conditions=False,
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
    )


def flux(
    text: int = 6, pooled: int = 5, *, channels: int = 4, kind: Any = None, **options: Any
) -> nn.Module:
    """A transformer, or a network of another kind, for embeddings of such widths."""
    return (kind or diffusers.FluxTransformer2DModel)(  # type: ignore[no-any-return]
        patch_size=1,
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
        **options,
    )


def positions(x: Tensor) -> Tensors:
    """Flux's ids of 3 x 3 image tokens and 5 text tokens, the same for all samples."""
    image_ids, axis = x.new_zeros(9, 3), torch.arange(3, device=x.device)
    image_ids[:, 1:] = torch.cartesian_prod(axis, axis).to(x)
    return {"img_ids": image_ids, "txt_ids": x.new_zeros(5, 3)}


FAMILIES: tuple[Family, ...] = (
    Family(
        "ddpm",
        unet,
        diffusers.DDPMScheduler(),
        {"x": (3, 8, 8)},
        lambda network, x, t, batch: network(x, t).sample,
    ),
    Family(
        "ddpm-of-labels",
        lambda: unet(num_class_embeds=10),
        diffusers.DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
        {"x": (3, 8, 8)},
        lambda network, x, t, batch: network(x, t, class_labels=batch["label"]).sample,
        condition=lambda batch: {"class_labels": batch["label"]},
        labels=10,
    ),
    Family(
        "stable-diffusion",
        text_unet,
        diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        {"x": (4, 8, 8), "text": (5, 6)},
        lambda network, x, t, batch: network(x, t, batch["text"], return_dict=False)[0],
        condition=lambda batch: {"encoder_hidden_states": batch["text"]},
    ),
    Family(
        "sdxl",
        sdxl_unet,
        diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        {"x": (4, 8, 8), "text": (5, 6), "pooled": (5,), "sizes": (6,)},
        lambda network, x, t, batch: (
            network(
                x,
                t,
                batch["text"],
                added_cond_kwargs={"text_embeds": batch["pooled"], "time_ids": batch["sizes"]},
            ).sample
        ),
        condition=lambda batch: {
            "encoder_hidden_states": batch["text"],
            "added_cond_kwargs": {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]},
        },
    ),
    Family(
        "dit",
        dit,
        diffusers.DDIMScheduler(),
        {"x": (4, 8, 8)},
        lambda network, x, t, batch: network(x, t, batch["label"]).sample[:, :4],
        condition=lambda batch: {"class_labels": batch["label"]},
        labels=10,
    ),
    Family(
        "pixart",
        pixart,
        diffusers.DPMSolverMultistepScheduler(),
        {"x": (4, 8, 8), "text": (5, 6)},
        lambda network, x, t, batch: network(
            x, batch["text"], t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ).sample[:, :4],
        condition=lambda batch: {
            "encoder_hidden_states": batch["text"],
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    Family(
        "sd3",
        sd3,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"x": (4, 8, 8), "text": (5, 6), "pooled": (5,)},
        lambda network, x, t, batch: (
            network(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=batch["text"],
                pooled_projections=batch["pooled"],
            ).sample
        ),
        condition=lambda batch: {
            "encoder_hidden_states": batch["text"],
            "pooled_projections": batch["pooled"],
        },
    ),
    Family(
        "flux",
        flux,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        {"x": (9, 4), "text": (5, 6), "pooled": (5,)},
        lambda network, x, t, batch: (
            network(
                x,
                batch["text"],
                batch["pooled"],
                t / 1000,
                guidance=torch.full_like(t, 3.5),
                **positions(x),
            ).sample
        ),
        condition=lambda batch: {
            "encoder_hidden_states": batch["text"],
            "pooled_projections": batch["pooled"],
            "guidance": torch.full_like(batch["x"][:, 0, 0], 3.5),
            **positions(batch["x"]),
        },
        time={"time": lambda t: t / 1000},
    ),
)
