"""The models whose cost is measured, with random weights: the cost does not depend on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn

import ood_monitor as om

Case: TypeAlias = tuple[om.Adapter, Tensor]


class SquaredError(om.Adapter):
    """Of a network's output against its input: the cost of one term, and nothing beside it."""

    def __init__(self, module: nn.Module, level: int | None = None) -> None:
        self.module, self._level = module, level

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        times = [] if self._level is None else [torch.full_like(batch[:, 0, 0, 0], self._level)]
        output = self.module(batch, *times)
        output = output if isinstance(output, Tensor) else output.sample
        yield "log_likelihood", -(output - batch).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Benchmark:
    """A model and a batch.

    Attributes:
        make: Gives both.
        target: Time of gradient norms in units of a plain forward and backward pass, to reach.
        suffixes: Parts of the network to score alone: name patterns, and their target.
    """

    make: Callable[[], Case]
    target: float
    suffixes: dict[str, tuple[list[str], float]] = field(default_factory=dict)


def ddpm_unet() -> nn.Module:
    """The configuration of google/ddpm-cifar10-32."""
    network: nn.Module = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return network


def ddpm_cifar10() -> Case:
    return SquaredError(ddpm_unet(), 50), torch.randn(8, 3, 32, 32)


def small_unet(batch: int = 32, size: int = 32, depth: int = 1) -> Case:
    """That of shared/models/ddpm-fashion-mnist."""
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=depth,
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return SquaredError(unet, 50), torch.randn(batch, 1, size, size)


def autoencoder() -> Case:
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    return SquaredError(vae), torch.randn(8, 3, 32, 32)


def glow() -> Case:
    """The paper's: K = 32, L = 3, 512 hidden channels; one term."""
    flow = om.models.Glow(channels=3, size=32, levels=3, steps=32, hidden=512)
    return om.LogLikelihood(flow, lambda flow, x: flow.log_prob(x)), 0.1 * torch.randn(8, 3, 32, 32)


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_embd=384,
        n_layer=6,
        n_head=6,
        bos_token_id=0,
        eos_token_id=0,
    )
    net = transformers.GPT2LMHeadModel(config)
    return om.SequenceLikelihood(net), torch.randint(256, (8, 128))


def convolutions(batch: int = 32, size: int = 32) -> Case:
    """Layers that BackPACK knows, and no other."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 64), (64, 3)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return SquaredError(nn.Sequential(*layers[:-1])), torch.randn(batch, 3, size, size)


OUTPUT = ["conv_norm_out.*", "conv_out.*"]
UP = {"up blocks and output": (["up_blocks.*", *OUTPUT], 0.75)}

MODELS: dict[str, Benchmark] = {
    "DDPM-CIFAR-10 UNet, B = 8": Benchmark(
        ddpm_cifar10, 1.05, UP | {"last up block and output": (["up_blocks.3.*", *OUTPUT], 0.45)}
    ),
    "small UNet, B = 32": Benchmark(
        small_unet, 1.25, UP | {"last up block and output": (["up_blocks.2.*", *OUTPUT], 0.45)}
    ),
    "AutoencoderKL, B = 8": Benchmark(autoencoder, 1.2),
    "Glow, B = 8": Benchmark(glow, 1.6),
    "GPT-2, B = 8": Benchmark(gpt2, 1.2),
    "convolutions, B = 32": Benchmark(convolutions, 1.2),
}

#: That a quick run measures: they say nothing of the cost, and that all of it runs.
QUICK: dict[str, Benchmark] = {
    "small UNet, B = 2": Benchmark(partial(small_unet, batch=2, size=16), 1.25, UP),
    "convolutions, B = 2": Benchmark(partial(convolutions, batch=2, size=16), 1.2),
}


def made(make: Callable[[], Case], device: str = "cpu") -> Case:
    """A case in eval mode, seeded, and off the zeros that some layers start with."""
    torch.manual_seed(0)
    adapter, batch = make()
    with torch.no_grad():
        for parameter in adapter.module.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    adapter.module.eval().to(device)
    return adapter, batch.to(device)
