"""Images under models whose law expects the same of every sample: no expectation, no surprise.

An autoencoder whose decoder has one fixed variance, normflows' Glow on a fixed base, and a flow of
its coupling splines, all of Fashion-MNIST. What `forward` has of them are the terms' own values,
bits and expected norms. The protocol is that of `benchmarks.detection.forward`. A full run takes
more than an hour on one core: gradients of normflows' triangular matrices come by the loop.
"""

import functools
import statistics
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import normflows
import torch
import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, trained, zoo
from benchmarks.detection.forward import line, rows_of
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.train import train
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported
from ood_monitor.adapters.flows import density_of
from ood_monitor.adapters.observations import Gaussian

Row = dict[str, Any]

ON = "Fashion-MNIST"

#: What is compared: arguments of detectors, and peers, of `benchmarks.detection.forward`.
COMPARED = ("gradient_norms", "forward", "both", "values", "expected_norms", methods.PAPER)

#: Of the decoder, in squared units of pixels in [0, 1].
VARIANCE = 0.01


def models() -> dict[str, Watched]:
    """The flows see images at 16x16 and at 14x14."""
    vae = functools.partial(trained.VAE, 32, (16, 32, 64), 16)
    return {
        "VAE of one variance": watched_vae(vae, 3_000),
        "normflows Glow": watched_flow(functools.partial(glow, 16, 8, 64), halved, 1_500),
        "normflows spline": watched_flow(functools.partial(spline, 14, 4, 64), cropped, 1_500),
    }


def tiny() -> dict[str, Watched]:
    """For images of 8x8, to be trained in seconds."""
    vae = functools.partial(trained.VAE, 8, (8, 8, 16), 8)
    return {
        "VAE of one variance": watched_vae(vae, 100),
        "normflows Glow": watched_flow(functools.partial(glow, 8, 1, 8), trained.signed, 60),
        "normflows spline": watched_flow(functools.partial(spline, 8, 1, 8), trained.signed, 60),
    }


def watched_vae(make: functools.partial[trained.VAE], steps: int) -> Watched:
    observation = Gaussian(VARIANCE)

    def loss(vae: trained.VAE, x: Tensor) -> Tensor:
        mean, log_variance = vae.encode(x)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        of_pixels = observation.log_prob(x, vae.decode(z)).flatten(1).sum(1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (kl - of_pixels).mean()

    return Watched(trained.unit, make, loss, lambda m: om.ELBO(m, observation=observation), steps)


def watched_flow(make: Any, prepare: Any, steps: int) -> Watched:
    def adapter(flow: nn.Module) -> om.Adapter:
        return om.LogLikelihood(flow, terms, bins=256, value_range=(-1.0, 1.0))

    return Watched(prepare, make, dequantised_nll, adapter, steps, warmup=100, rate=5e-4)


def terms(flow: nn.Module, x: Tensor) -> Any:
    """Of images; the spline takes pixels as a row."""
    is_of_rows = not hasattr(flow, "merges")
    return density_of(flow)(flow, x.flatten(1) if is_of_rows else x)


def dequantised_nll(flow: nn.Module, x: Tensor) -> Tensor:
    noisy = ((x + 1) / 2 * 255 + torch.rand_like(x)) / 256
    found = sum(terms(flow, 2 * noisy - 1).values())
    return -cast(Tensor, found).mean()


def halved(images: Tensor) -> Tensor:
    """16x16, in [-1, 1]."""
    return 2 * trained.pooled(images, 2) - 1


def cropped(images: Tensor) -> Tensor:
    """14x14, without the black rim, in [-1, 1]."""
    return 2 * trained.pooled(images[..., 2:-2, 2:-2], 2) - 1


def glow(size: int, steps: int, hidden: int) -> nn.Module:
    """Two levels, on standard Normals."""
    shapes = [(8, size // 4, size // 4), (2, size // 2, size // 2)]
    with warnings.catch_warnings():  # its initialisation calls what PyTorch has renamed
        warnings.filterwarnings("ignore", "torch.lu is deprecated", UserWarning)
        flows = [
            [*(normflows.flows.GlowBlock(c, hidden) for _ in range(steps)), squeeze]
            for c, squeeze in ((8, normflows.flows.Squeeze()), (4, normflows.flows.Squeeze()))
        ]
    bases = [normflows.distributions.DiagGaussian(shape, trainable=False) for shape in shapes]
    return cast(nn.Module, normflows.MultiscaleFlow(bases, flows, [normflows.flows.Merge()]))


def spline(size: int, steps: int, hidden: int) -> nn.Module:
    flows: list[nn.Module] = []
    for i in range(steps):
        coupling = normflows.flows.CoupledRationalQuadraticSpline
        flows += [coupling(size**2, 1, hidden, reverse_mask=bool(i % 2))]
        flows += [normflows.flows.LULinearPermute(size**2)]
    base = normflows.distributions.DiagGaussian(size**2, trainable=False)
    return cast(nn.Module, normflows.NormalizingFlow(base, flows))


def full(data: Path, names: list[str]) -> Iterator[Row]:
    sets = protocol.sets(data, ON, Sizes())
    for name in names:
        watched = models()[name]
        module, facts = zoo.load(watched, weights_file(name))
        for row in rows_of(name, watched, module, sets, list(COMPARED)):
            yield {"on": ON, "training": facts} | row


def quick() -> Iterator[Row]:
    sets = protocol.digits(60)
    images = sets.pop("train")
    for name, watched in tiny().items():
        torch.manual_seed(0)
        module = watched.make()
        facts = trained.train(module, watched, images)
        for row in rows_of(name, watched, module.eval(), sets, list(COMPARED)):
            yield {"on": "digits", "training": facts} | row


def weights_file(name: str) -> Path:
    return zoo.weights_file(ON, name.replace(" ", "-"))


def trained_models(data: Path, names: list[str], folder: Path) -> None:
    """Trains them, each from where it was interrupted, and writes their weights."""
    images, held_out = zoo.training_images(data, ON)
    for name in names:
        where = folder / name.replace(" ", "-")
        train(models()[name], images, held_out, where, weights_file(name))


def claims(rows: list[Row]) -> list[Row]:
    """What was to be reached: a mean, and no set far below gradient norms."""
    by_method: dict[str, Mapping[tuple[str, str], float]] = {
        method: {
            (row["model"], name): value
            for row in rows
            if row["method"] == method
            for name, value in row["auroc"].items()
        }
        for method in ("forward", "gradient_norms")
    }
    ours, norms = by_method["forward"], by_method["gradient_norms"]
    lost = max(norms[case] - value for case, value in ours.items())
    mean = statistics.mean(ours.values())
    return [
        claim(f"1 - mean AUROC of {len(ours)} pairs", round(1 - mean, 4), 0.01),
        claim("the most that a set loses to gradient_norms", round(lost, 4), 0.01),
    ]


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    training: Annotated[
        Path | None, typer.Option("--train", help="Train them, with checkpoints there, instead.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    names = model or list(models())
    if not quick_run:
        datasets.require(data_dir, datasets.SOURCES)
    if training is not None:
        trained_models(data_dir, names, training)
        return
    rows = quick() if quick_run else full(data_dir, names)
    reported(rows, line, claims, output, sizes=vars(Sizes()))


if __name__ == "__main__":
    typer.run(main)
