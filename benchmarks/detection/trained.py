"""The models that densities are compared on: trained here, their features kept in files.

A diffusion UNet, a variational autoencoder and a flow, each on the same images. A pass over the
images costs minutes and a density seconds, so what a pass gives is saved before any is fitted.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets
from ood_monitor.adapters.observations import Bernoulli
from ood_monitor.densities.features import table
from ood_monitor.gradients.norms import terms_and_norms

#: 1 000 steps with linear variances, which the pipeline was trained with too.
SCHEDULE = cast(Any, DDPMScheduler)()

#: What models are trained on, then the sets that they are tested against.
SETS = ("Fashion-MNIST", "MNIST", "EMNIST letters", "GTSRB", "Chars74K")


@dataclass(frozen=True)
class Images:
    """Grey images of one size, uint8, (N, 1, S, S).

    Attributes:
        train: What models are trained on.
        sets: ``fit``, in distribution and not trained on; ``test``, likewise; then each OOD set.
    """

    train: Tensor
    sets: dict[str, Tensor]


def fashion(directory: Path, fit: int = 500, test: int = 300, ood: int = 150) -> Images:
    """Fashion-MNIST and four sets unlike it, at 32x32."""
    own, *others = SETS
    images = square(datasets.read(directory, own, "train"))
    tests = {name: square(datasets.read(directory, name, "test")) for name in SETS}
    sets = {"fit": drawn(images[50_000:], fit), "test": drawn(tests[own], test)}
    return Images(images[:50_000], sets | {name: drawn(tests[name], ood) for name in others})


def square(array: NDArray[np.uint8]) -> Tensor:
    """Grey (N, 1, 32, 32) of (N, 28, 28), with a black rim, or of RGB (N, 32, 32, 3)."""
    if array.ndim == 4:
        return torch.from_numpy((array @ [0.299, 0.587, 0.114]).round().astype(np.uint8))[:, None]
    return F.pad(torch.from_numpy(array), (2, 2, 2, 2))[:, None]


def drawn(images: Tensor, count: int) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def digits(fit: int = 300, test: int = 150, ood: int = 75) -> Images:
    """Handwritten digits at 8x8, from scikit-learn, and three shifts of them."""
    images = drawn((torch.from_numpy(load_digits().images)[:, None] * 255 / 16).byte(), 1797)
    train, held_out, rest, other = images.tensor_split([1000, 1000 + fit, 1000 + fit + test])
    blurred = F.avg_pool2d(other.float(), 3, 1, 1).byte()
    shifts = {"inverted": 255 - other, "blurred": blurred, "half contrast": other // 2}
    sets = {"fit": held_out, "test": rest} | {k: drawn(v, ood) for k, v in shifts.items()}
    return Images(train, sets)


@dataclass(frozen=True)
class Watched:
    """A model whose features are compared.

    Attributes:
        prepare: From uint8 images to the model's input.
        make: A fresh model.
        loss: Of the model and a prepared batch, its mean over images.
        adapter: Of the model.
        steps: Of training, none for a model that comes trained.
        batch: Images a step.
        warmup: Steps in which the learning rate rises from zero.
        rate: The learning rate that it rises to.
    """

    prepare: Callable[[Tensor], Tensor]
    make: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    adapter: Callable[[Any], om.Adapter]
    steps: int
    batch: int = 128
    warmup: int = 0
    rate: float = 1e-3


def unit(images: Tensor) -> Tensor:
    return images / 255


def signed(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def pooled(images: Tensor, factor: int) -> Tensor:
    """In [0, 1], averaged over squares and again one of 256 values, as dequantisation asks."""
    return F.avg_pool2d(images.float(), factor).round() / 255


class VAE(nn.Module):
    """Three strided convolutions to a latent vector, and back to the logits of grey values."""

    def __init__(self, size: int, widths: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        a, b, c = widths
        flat = c * (size // 8) ** 2
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, a, 4, 2, 1), nn.SiLU(), nn.Conv2d(a, b, 4, 2, 1), nn.SiLU()),
            *(nn.Conv2d(b, c, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(flat, 2 * latent)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent, flat), nn.Unflatten(1, (c, size // 8, size // 8)), nn.SiLU()),
            *(nn.ConvTranspose2d(c, b, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(b, a, 4, 2, 1)),
            *(nn.SiLU(), nn.ConvTranspose2d(a, 1, 4, 2, 1)),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).chunk(2, 1)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)  # type: ignore[no-any-return]


def negative_elbo(vae: VAE, x: Tensor) -> Tensor:
    mean, log_variance = vae.encode(x)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    reconstruction = Bernoulli().log_prob(x, vae.decode(z)).flatten(1).sum(1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (kl - reconstruction).mean()


def dequantised_nll(glow: om.models.Glow, x: Tensor) -> Tensor:
    return -glow.log_prob((255 * x + torch.rand_like(x)) / 256).mean()


def denoising(unet: Any, x: Tensor) -> Tensor:
    noise, t = torch.randn_like(x), torch.randint(len(SCHEDULE.betas), (len(x),), device=x.device)
    return F.mse_loss(unet(SCHEDULE.add_noise(x, noise, t), t).sample, noise)


def unet(size: int, widths: tuple[int, ...]) -> nn.Module:
    plain = len(widths) - 1
    network: nn.Module = cast(Any, UNet2DModel)(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=widths[-1] // 2,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )
    return network


def bound(unet: nn.Module) -> om.Adapter:
    return om.DenoisingBound(unet, SCHEDULE, levels=(50, 500))


def full(pipeline: Path | None) -> dict[str, Watched]:
    """Models for 32x32; the UNet is that of a pipeline, or trained, which takes hours."""
    make, steps = functools.partial(unet, 32, (32, 64, 64)), 6_000
    if pipeline is not None:
        make, steps = functools.partial(pretrained, pipeline), 0
    vae = functools.partial(VAE, 32, (16, 32, 64), 16)
    glow = functools.partial(om.models.Glow, channels=1, size=16, levels=2, steps=8, hidden=32)
    return {
        "UNet": Watched(signed, make, denoising, bound, steps, 64),
        "VAE": watched_vae(vae, steps=3_000),
        "Glow": watched_glow(glow, steps=2_500, factor=2),
    }


def tiny() -> dict[str, Watched]:
    """Models for 8x8, to be trained in seconds."""
    vae = functools.partial(VAE, 8, (8, 8, 16), 8)
    glow = functools.partial(om.models.Glow, channels=1, size=8, levels=2, steps=2, hidden=8)
    return {
        "UNet": Watched(signed, lambda: unet(8, (8, 16)), denoising, bound, steps=60),
        "VAE": watched_vae(vae, steps=300),
        "Glow": watched_glow(glow, steps=100, factor=1),
    }


def pretrained(pipeline: Path) -> nn.Module:
    network: nn.Module = cast(Any, DDPMPipeline).from_pretrained(pipeline).unet
    return network


def watched_vae(make: Callable[[], nn.Module], steps: int) -> Watched:
    return Watched(unit, make, negative_elbo, lambda m: om.ELBO(m, observation=Bernoulli()), steps)


def watched_glow(make: Callable[[], nn.Module], steps: int, factor: int) -> Watched:
    prepare = functools.partial(pooled, factor=factor)
    # Without a warm-up a deep flow may leave for good in its first steps: one run did.
    return Watched(
        prepare, make, dequantised_nll, lambda m: om.LogLikelihood(m, bins=256), steps, warmup=100
    )


def trained(watched: Watched, images: Tensor, file: Path) -> tuple[nn.Module, dict[str, str]]:
    """The model in eval mode, from its file if there is one, and what is known of its training."""
    torch.manual_seed(0)
    module, facts = watched.make(), {"steps": "0"}
    if watched.steps and file.exists():
        module.load_state_dict(load_file(file))
        with safe_open(file, framework="pt") as opened:
            facts = dict(opened.metadata())
    elif watched.steps:
        facts = train(module, watched, images)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, file, facts)
    return module.eval(), facts


def train(module: nn.Module, watched: Watched, images: Tensor) -> dict[str, str]:
    """By Adam, with a rate that falls to zero; gives the mean loss of the last tenth."""
    start, losses, steps = time.monotonic(), [], watched.steps
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = watched.prepare(images[torch.randint(len(images), (watched.batch,))])
        optimizer.zero_grad()
        loss = watched.loss(module.train(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 100.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 500 == 499:
            print(f"  step {step + 1}: loss {np.mean(losses[-500:]):.4f}", flush=True)
    loss_at_end = float(np.mean(losses[-(steps // 10) :]))
    seconds = time.monotonic() - start
    return {"loss": f"{loss_at_end:.4f}", "steps": str(steps), "seconds": f"{seconds:.0f}"}


@dataclass(frozen=True)
class Features:
    """What a pass over the images gives.

    Attributes:
        terms: Names of the likelihood's terms, T.
        rows: Names of the gradient's rows, F, "term/parameter[i]" in module order.
        log_likelihood: Of each set, each term's values, (N, T), in nats.
        norms: Of each set, squared norms by row, (N, F).
    """

    terms: tuple[str, ...]
    rows: tuple[str, ...]
    log_likelihood: dict[str, NDArray[np.float64]]
    norms: dict[str, NDArray[np.float64]]


def features(
    adapter: om.Adapter, sets: Mapping[str, Tensor], prepare: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """One pass over every set, as the arrays of a file."""
    arrays: dict[str, Any] = {}
    for name, images in sets.items():
        found = terms_and_norms(adapter, prepare(images), granularity="row", chunk_size=50)
        rows, norms = table(found.norms)
        terms, values = table(found.log_likelihood)
        arrays |= {"rows": np.array(rows), "terms": np.array(terms)}
        arrays[f"log_likelihood/{name}"], arrays[f"norms/{name}"] = values, norms.astype(np.float32)
    return arrays


def loaded(file: Path) -> Features:
    with np.load(file) as arrays:
        parts = {
            kind: {
                key.split("/", 1)[1]: arrays[key].astype(np.float64)
                for key in arrays.files
                if key.startswith(f"{kind}/")
            }
            for kind in ("log_likelihood", "norms")
        }
        return Features(tuple(map(str, arrays["terms"])), tuple(map(str, arrays["rows"])), **parts)


def measured(
    name: str, watched: Watched, images: Images, cache: Path
) -> tuple[Features, dict[str, str]]:
    """A model's features and the facts of its training, from files where there are some."""
    cache.mkdir(parents=True, exist_ok=True)
    file, part = cache / f"{name}-features.npz", cache / f"{name}-part.npz"
    module, facts = trained(watched, images.train, cache / f"{name}.safetensors")
    if not file.exists():
        np.savez(part, **features(watched.adapter(module), images.sets, watched.prepare))
        part.rename(file)  # so that a file is whole
    return loaded(file), facts
