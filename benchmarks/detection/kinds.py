"""Denoisers of other kinds than the evidence's UNets, trained here on Fashion-MNIST.

Three UNets and a transformer on the latents of an autoencoder, which predict noise, v or a flow's
velocity, and a UNet of pixels with a flow's. All know an image's label, or are told none. A sample
is what its denoiser takes, with the label as one more channel, so that it is one tensor.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, trained, zoo
from benchmarks.detection.train import train
from benchmarks.detection.trained import Watched

ON = "Fashion-MNIST"

#: Labels, of which the last is none, and how often a training image has none.
LABELS, NONE, UNLABELLED = 11, 10, 0.1

FLOW = om.NoiseSchedule.flow(convention="noise_minus_data")
SCHEDULES: dict[str, Any] = {
    "epsilon": trained.SCHEDULE,
    "v_prediction": cast(Any, DDPMScheduler)(prediction_type="v_prediction"),
    "flow_prediction": FLOW,
}
AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class Kind:
    """A denoiser.

    Attributes:
        make: A fresh one.
        predicts: A prediction type.
        latent: Whether of latents, else of pixels.
        steps: Of training.
        logit_normal: Whether times of training lie in the middle, else evenly.
    """

    make: Callable[[], nn.Module]
    predicts: str
    steps: int
    latent: bool = True
    logit_normal: bool = False


def kinds() -> dict[str, Kind]:
    latent = functools.partial(unet, 8, 4, (32, 64))
    transformer = functools.partial(dit, size=8, channels=4, layers=4, heads=4)
    pixels = functools.partial(unet, 16, 1, (24, 48))
    return {
        "latent, epsilon": Kind(latent, "epsilon", 3_000),
        "latent, v": Kind(latent, "v_prediction", 3_000),
        "latent, flow": Kind(latent, "flow_prediction", 3_000),
        "latent, DiT": Kind(transformer, "flow_prediction", 5_000, logit_normal=True),
        "pixels, flow": Kind(pixels, "flow_prediction", 1_500, latent=False),
    }


def unet(size: int, channels: int, widths: tuple[int, int]) -> nn.Module:
    """Attention at the lower of two resolutions."""
    network: nn.Module = cast(Any, UNet2DModel)(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=widths[-1] // 2,
        num_class_embeds=LABELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return network


def dit(size: int, channels: int, layers: int, heads: int) -> nn.Module:
    """Patches of 2x2, heads of 24 channels."""
    network: nn.Module = cast(Any, DiTTransformer2DModel)(
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=LABELS - 1,
        norm_num_groups=8,
    )
    return network


def autoencoder() -> nn.Module:
    """From 32x32 to four channels of 8x8."""
    network: nn.Module = cast(Any, AutoencoderKL)(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    return network


def reconstruction(vae: Any, x: Tensor) -> Tensor:
    """Squared error of an image, and a little of the posterior's divergence."""
    posterior = vae.encode(x).latent_dist
    error = (vae.decode(posterior.sample()).sample - x).square().flatten(1).sum(1)
    return cast(Tensor, (error + 1e-2 * posterior.kl()).mean())


def denoising(kind: Kind, network: Any, labelled: Tensor) -> Tensor:
    """The mean squared error of a prediction at a noise level drawn for each sample."""
    schedule = om.NoiseSchedule.of(SCHEDULES[kind.predicts])
    x, labels = parted(labelled)
    labels = torch.where(torch.rand(len(x)) < UNLABELLED, NONE, labels)
    share = torch.randn(len(x)).sigmoid() if kind.logit_normal else torch.rand(len(x))
    level = (share * len(schedule)).long()
    alpha, sigma = (of[level].float().view(-1, 1, 1, 1) for of in (schedule.alpha, schedule.sigma))
    noise = torch.randn_like(x)
    targets = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x,
        "flow_prediction": noise - x,
    }
    told = network(alpha * x + sigma * noise, schedule.t[level].float(), class_labels=labels)
    return F.mse_loss(told.sample, targets[kind.predicts])


def parted(labelled: Tensor) -> tuple[Tensor, Tensor]:
    """What a denoiser takes, and the labels (N,)."""
    return labelled[:, :-1], labelled[:, -1, 0, 0].long()


def with_labels(x: Tensor, labels: Tensor) -> Tensor:
    """Samples (N, C + 1, H, W)."""
    channel = labels.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], 1)


def bound(kind: Kind, network: nn.Module, **options: Any) -> om.Adapter:
    """At little noise and much of the kind: `options` may say otherwise."""
    return om.DenoisingBound(
        network,
        SCHEDULES[kind.predicts],
        inputs=lambda labelled: parted(labelled)[0],
        condition=lambda labelled: {"class_labels": parted(labelled)[1]},
        **options,
    )


class Labels:
    """Of images of the set that models are trained on, by what they show; of others, drawn."""

    def __init__(self, data: Path) -> None:
        self._known: dict[int, int] = {}
        for split in ("train", "test"):
            images = datasets.harmonised(datasets.read(data, ON, split))
            labels = datasets.labels(data, ON, split)
            self._known |= dict(zip(map(_key, images), labels.tolist(), strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        drawn = torch.randint(NONE, (len(images),), generator=torch.Generator().manual_seed(0))
        pairs = zip(map(_key, images), drawn.tolist(), strict=True)
        return torch.tensor([self._known.get(key, other) for key, other in pairs])


def _key(image: Tensor) -> int:
    return hash(image.numpy().tobytes())


class Latents:
    """Means of an autoencoder's posteriors, in units of their deviation over training images."""

    def __init__(self, vae: Any, training: Tensor) -> None:
        self._vae = vae
        self._scale = float(self._means(training[:1000]).std())

    def __call__(self, images: Tensor) -> Tensor:
        return self._means(images) / self._scale

    @torch.no_grad()
    def _means(self, images: Tensor) -> Tensor:
        parts = trained.signed(images).split(100)
        return torch.cat([self._vae.encode(part).latent_dist.mean for part in parts])


def halved(images: Tensor) -> Tensor:
    """16x16, in [-1, 1]."""
    return 2 * trained.pooled(images, 2) - 1


def watched(kind: Kind, prepare: Callable[[Tensor], Tensor]) -> Watched:
    loss = functools.partial(denoising, kind)
    adapter = functools.partial(bound, kind)
    return Watched(prepare, kind.make, loss, adapter, kind.steps, batch=64, warmup=100)


def watched_autoencoder() -> Watched:
    return Watched(trained.signed, autoencoder, reconstruction, om.ELBO, 1_000, batch=64)


def every(data: Path, names: list[str] | None = None) -> Mapping[str, Watched]:
    """The trained kinds' models, with labels of images and the committed autoencoder."""
    labels, chosen = Labels(data), kinds()
    vae, _ = zoo.load(watched_autoencoder(), weights_file(AUTOENCODER))
    encoders = {True: Latents(vae, zoo.training_images(data, ON)[0]), False: halved}

    def prepared(kind: Kind, images: Tensor) -> Tensor:
        return with_labels(encoders[kind.latent](images), labels(images))

    return {
        name: watched(chosen[name], functools.partial(prepared, chosen[name]))
        for name in names or chosen
    }


def weights_file(name: str) -> Path:
    return zoo.weights_file(ON, name.replace(", ", "-"))


def trained_models(data: Path, names: list[str], folder: Path) -> None:
    """Trains them, each from where it was interrupted, and writes their weights."""
    images, held_out = zoo.training_images(data, ON)
    if not weights_file(AUTOENCODER).exists():
        train(
            watched_autoencoder(), images, held_out, folder / AUTOENCODER, weights_file(AUTOENCODER)
        )
    for name, model in every(data, names).items():
        where = folder / name.replace(", ", "-")
        of_images, of_held_out = model.prepare(images), model.prepare(held_out[:1000])
        # Encoded once, not at each step.
        plain = replace(model, prepare=lambda labelled: labelled)
        train(plain, of_images, of_held_out, where, weights_file(name))


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    folder: Annotated[
        Path, typer.Option(help="Where checkpoints are kept; delete to start again.")
    ] = Path("runs/kinds"),
) -> None:
    """Train them; an hour and a half on one core."""
    datasets.require(data_dir, [ON])
    trained_models(data_dir, model or list(kinds()), folder)


if __name__ == "__main__":
    typer.run(main)
