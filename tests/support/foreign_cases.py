"""Models as users have them, each under the adapter that fits it."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import normflows
import torch
import transformers
import zuko
from torch import Tensor, nn

import ood_monitor as om
from support.diffusers_cases import FAMILIES, Family, unet
from support.model_case import Case, Function, Model

__all__ = ["FOREIGN", "small_autoencoder"]


# Diffusion and flow matching


def denoiser(family: Family, **options: Any) -> Case:
    return family.adapter(family.network(), levels=[10, 500], **options), family.batch()


def small_autoencoder(**options: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **options,
    )


def latent_diffusion() -> Case:
    vae = small_autoencoder(latent_channels=3)
    inputs = om.latent_mean(nn.Module.double(vae.eval()))  # the same alone and in a batch
    adapter = om.DenoisingBound(unet(sample_size=4), diffusers.DDPMScheduler(), inputs=inputs)
    return adapter, 2 * torch.rand(4, 3, 8, 8) - 1


# Autoencoders


def autoencoder(**options: Any) -> Case:
    return om.ELBO(small_autoencoder(), **options), torch.randn(4, 3, 8, 8)


class Autoencoder(nn.Module):
    """Of linear maps from six numbers to two latents and to one or two numbers for each."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6 * outputs)
        self._outputs = outputs

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).tanh().tensor_split(2, 1)

    def decode(self, z: Tensor) -> Any:
        decoded = self.decoder(z).tanh()
        return decoded if self._outputs == 1 else decoded.tensor_split(self._outputs, 1)


def custom_autoencoder(observation: om.observations.Observation, outputs: int = 1) -> Case:
    return om.ELBO(Autoencoder(outputs), observation=observation), torch.rand(4, 6)


# Flows


def glow() -> Case:
    net = om.models.Glow(channels=1, size=8, levels=2, steps=2, hidden=6)
    return om.LogLikelihood(net, bins=256), torch.rand(4, 1, 8, 8)


def normflows_glow() -> Case:
    """On labelled images: log_prob(x, y), which adds up log-determinants in place."""
    with warnings.catch_warnings():  # its initialisation calls what PyTorch has renamed
        warnings.filterwarnings("ignore", "torch.lu is deprecated", UserWarning)
        flows = [[normflows.flows.GlowBlock(c, 5) for _ in range(2)] for c in (8, 4)]
    priors = [normflows.distributions.ClassCondDiagGaussian(s, 3) for s in ((8, 2, 2), (2, 4, 4))]
    squeezes = [normflows.flows.Squeeze(), normflows.flows.Squeeze()]
    for level, squeeze in zip(flows, squeezes, strict=True):
        level.append(squeeze)
    net = normflows.MultiscaleFlow(priors, flows, [normflows.flows.Merge()], class_cond=True)
    batch = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    net.log_prob(*batch)  # the first batch sets the activation normalisations
    return om.LogLikelihood(net, condition=lambda batch: {"y": batch[1]}), batch


def normflows_real_nvp() -> Case:
    def coupling() -> nn.Module:
        return normflows.flows.AffineCouplingBlock(normflows.nets.MLP([1, 4, 2], init_zeros=False))

    flows = [coupling(), normflows.flows.Permute(2, mode="swap"), coupling()]
    net = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), flows)
    return om.LogLikelihood(net), torch.randn(4, 2)


def zuko_flow(make: Callable[..., nn.Module], **options: Any) -> Case:
    net = make(features=3, context=2, transforms=2, hidden_features=(6,), **options)
    adapter = om.LogLikelihood(
        net, inputs=lambda batch: batch["x"], condition=lambda batch: {"c": batch["context"]}
    )
    return adapter, {"x": torch.randn(4, 3), "context": torch.randn(4, 2)}


def latents_and_log_det() -> Case:
    """A flow that gives (z, log-determinant), of which z is a tuple, as FrEIA's do."""

    def forward(m: Any, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        log_scale = m.scale(x[:, :1]).tanh()
        rest = x[:, 1:] * log_scale.exp() + m.shift(x[:, :1])
        return (x[:, :1] * m.gain.exp(), rest), log_scale.sum(1) + m.gain

    gain = torch.zeros(1)
    net = Function(forward, scale=nn.Linear(1, 2), shift=nn.Linear(1, 2), gain=gain)
    return om.LogLikelihood(net, om.latents_and_log_det), torch.randn(4, 3)


# Sequences


def gpt2_model() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=6,
        n_layer=2,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2() -> Case:
    """Padded on the left, on the right, on both sides and not at all."""
    tokens = torch.randint(1, 11, (4, 7))
    tokens[0, :3], tokens[1, 5:], tokens[2, 0], tokens[2, 6] = 0, 0, 0, 0
    return om.SequenceLikelihood(gpt2_model(), padding=0), tokens


def masked_gpt2() -> Case:
    """As tokenizers give it: a mapping with a mask, each sequence of its own length."""
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [6]])).long()
    adapter = om.SequenceLikelihood(
        gpt2_model(),
        per_token=True,
        inputs=lambda batch: batch["input_ids"],
        condition=lambda batch: {"attention_mask": batch["attention_mask"]},
    )
    return adapter, {"input_ids": torch.randint(11, (4, 7)), "attention_mask": mask}


def pixelcnn() -> Case:
    """Masked convolutions over pixels of three values, (B, 1, H, W) to (B, V, 1, H, W)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first = m.mask * m.first
        hidden = nn.functional.conv2d(x, first, padding=1).tanh()
        return m.out(hidden).unsqueeze(2)

    net = Function(forward, first=torch.randn(4, 1, 3, 3), out=nn.Conv2d(4, 3, 1))
    net.register_buffer("mask", torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]]))
    adapter = om.SequenceLikelihood(
        net, shifted=False, class_dim=1, scale=lambda x: x.to(net.out.weight.dtype) - 1
    )
    return adapter, torch.randint(3, (4, 1, 5, 5))


observations = om.observations

#: The list.
FOREIGN: tuple[Model, ...] = (
    *(Model(family.name, partial(denoiser, family)) for family in FAMILIES),
    Model("ddpm-draws", partial(denoiser, FAMILIES[0], draws=2, antithetic=True)),
    Model("ddpm-l1", partial(denoiser, FAMILIES[0], loss="l1")),
    Model("ddpm-vlb", partial(denoiser, FAMILIES[0], loss="vlb")),
    Model("latent-diffusion", latent_diffusion),
    Model("autoencoder", autoencoder),
    Model("autoencoder-iwae", partial(autoencoder, draws=2, importance_weighted=True)),
    Model("vae-bernoulli", partial(custom_autoencoder, observations.Bernoulli())),
    Model("vae-learned", partial(custom_autoencoder, observations.Gaussian(None), 2)),
    Model(
        "vae-logistic",
        partial(custom_autoencoder, observations.DiscretizedLogistic(bins=16), 2),
    ),
    Model("glow", glow),
    Model("normflows-glow", normflows_glow, ("flows.*.log_S", "flows.*.flows.2.s")),
    Model("normflows-real-nvp", normflows_real_nvp),
    Model("zuko-maf", lambda: zuko_flow(zuko.flows.MAF)),
    Model("zuko-nsf", lambda: zuko_flow(zuko.flows.NSF)),
    Model("latents-and-log-det", latents_and_log_det),
    Model("gpt2", gpt2),
    Model("gpt2-masked", masked_gpt2),
    Model("pixelcnn", pixelcnn),
)
