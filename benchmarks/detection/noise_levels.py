"""Whether noise levels chosen on held-out data alone detect as well as the best ones there are.

Squared gradient norms of a diffusion model at every candidate level, once; then the mean area under
the ROC curve (AUROC) over sets of out-of-distribution images, of the default density, for every
level, every pair and all levels together. Beside them the pair that a rule picks which sees
held-out data alone: the one whose features are least correlated.

The rule was picked, among some thirty, on the Fashion-MNIST model and its sets; the other models
were there to confirm it, and did not, so that the library does not have it. What does help on every
model is more levels. A full run takes half an hour on one core.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDPMPipeline, DDPMScheduler
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection.trained import unet
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.densities import Array
from ood_monitor.densities.features import LogNorms, table

LEVELS = (1, 5, 10, 25, 50, 100, 200, 350, 500, 700, 900)
DEFAULT = (50, 500)

FASHION, MNIST, EMNIST = "fashion_mnist_28x28", "mnist_28x28", "emnist_letters_28x28"
GTSRB, CHARS = "gtsrb_test4k_32x32", "chars74k_streetview4k_32x32"
CIFAR_TRAIN, CIFAR_TEST = "cifar10_train_part1of5_32x32", "cifar10_test_32x32"

FILES = (FASHION, MNIST, EMNIST, GTSRB, CHARS, CIFAR_TRAIN, CIFAR_TEST)

WHERE = f"""These are missing: {{missing}}.

The images: NumPy files with the arrays `train` (where used) and `test`, uint8, (N, 28, 28) or
(N, 32, 32, 3), written with `numpy.savez_compressed`:
  {FASHION}.npz  https://github.com/zalandoresearch/fashion-mnist
  {MNIST}.npz  its first 10 000 training images; https://huggingface.co/datasets/ylecun/mnist
  {EMNIST}.npz  the letters' test split; https://www.nist.gov/itl/products-and-services/emnist-dataset
  {GTSRB}.npz  test images at 32x32; https://benchmark.ini.rub.de
  {CHARS}.npz  English street-view characters at 32x32;
      https://teodecampos.github.io/chars74k
  {CIFAR_TRAIN}.npz  10 000 training images, shuffled, and
  {CIFAR_TEST}.npz  the test images; https://www.cs.toronto.edu/~kriz/cifar.html
The model: any diffusers DDPMPipeline folder trained on the first 50 000 Fashion-MNIST images, one
channel, black margins of 2 pixels, in [-1, 1].
Pass --data-dir and --model-dir, or --quick, which needs neither.
"""

Norms: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """A model and its images.

    Attributes:
        adapter: Of a model trained on neither `held_out` nor `test`.
        held_out: (N, 1, H, W), in distribution.
        test: (N, 1, H, W), in distribution.
        ood: Images (N, 1, H, W) of other sets.
    """

    adapter: om.DenoisingBound
    held_out: Tensor
    test: Tensor
    ood: dict[str, Tensor]


def images(arrays: np.ndarray) -> Tensor:
    """Grey or RGB images (N, H, W[, 3]) of 28 or 32 pixels, as (N, 1, 32, 32) in [-1, 1]."""
    grey = arrays @ np.array([0.299, 0.587, 0.114]) if arrays.ndim == 4 else arrays
    margin = (32 - grey.shape[1]) // 2
    padded = np.pad(grey, ((0, 0), (margin, margin), (margin, margin)))
    return torch.from_numpy(padded / 127.5 - 1).float()[:, None]


def taken(data: Path, name: str, count: int, key: str = "test", start: int = 0) -> Tensor:
    """A random `count` of the images from `start` on."""
    arrays = np.load(data / f"{name}.npz")[key][start:]
    return images(arrays[np.random.default_rng(0).permutation(len(arrays))[:count]])


def trained(network: nn.Module, data: Tensor, steps: int, batch: int = 32) -> om.DenoisingBound:
    """After `steps` of the usual training: a random level and random noise for each image."""
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = data[torch.randint(len(data), (batch,), generator=generator)]
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = F.mse_loss(network(scheduler.add_noise(x, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    typer.echo(f"trained for {steps} steps, the last loss {loss.item():.3f}")
    return om.DenoisingBound(network.eval(), scheduler)


def fashion(data: Path, model: Path) -> Case:
    """The model that the rule was found on."""
    pipeline = DDPMPipeline.from_pretrained(model)
    return Case(
        om.DenoisingBound(pipeline.unet, pipeline.scheduler),
        taken(data, FASHION, 300, "train", start=50_000),
        taken(data, FASHION, 300),
        {name: taken(data, name, 150) for name in (MNIST, EMNIST, GTSRB, CHARS)},
    )


def mnist(data: Path) -> Case:
    """A model that had no part in finding the rule."""
    digits = np.load(data / f"{MNIST}.npz")
    return Case(
        trained(unet(32, (32, 64, 64)), images(digits["train"][:9_000]), 700),
        taken(data, MNIST, 340, "train", start=9_000),
        taken(data, MNIST, 160),
        {name: taken(data, name, 80) for name in (FASHION, EMNIST, GTSRB, CHARS)},
    )


def photographs(data: Path) -> Case:
    """A smaller model of other images, at half the size, that had no part in it either."""
    train = np.load(data / f"{CIFAR_TRAIN}.npz")["train"][:9_000]
    sets = (taken(data, name, 80) for name in (FASHION, MNIST, GTSRB, CHARS))
    return Case(
        trained(unet(16, (16, 32, 32)), halved(images(train)), 800),
        halved(taken(data, CIFAR_TRAIN, 340, "train", start=9_000)),
        halved(taken(data, CIFAR_TEST, 160)),
        dict(zip((FASHION, MNIST, GTSRB, CHARS), map(halved, sets), strict=True)),
    )


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def digits() -> Case:
    """8x8 digits at 16x16, and what a short training can tell from them."""
    x = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]
    x = F.interpolate(x, scale_factor=2)[torch.randperm(len(x))]
    test = x[1400:1460]
    return Case(
        trained(unet(16, (8, 16)), x[:1200], 60),
        x[1200:1300],
        test,
        {"negatives": -test, "upside down": test.flip(2), "noise": 2 * torch.rand_like(test) - 1},
    )


def measured(case: Case, levels: Sequence[int]) -> Norms:
    """Squared norms of each set, (N, levels, layers)."""
    adapter = case.adapter.with_levels(levels)
    sets = {"held out": case.held_out, "test": case.test} | case.ood
    norms = {}
    for name, x in sets.items():
        parts = [table(om.gradient_norms(adapter, batch))[1] for batch in x.split(50)]
        norms[name] = np.concatenate(parts).reshape(len(x), len(levels), -1)
        typer.echo(f"measured {len(x)} of {name}")
    return norms


def cached(path: Path | None, measure: Callable[[], Norms]) -> Norms:
    """What the file holds, else what is measured, kept there."""
    if path is not None and path.exists():
        return dict(np.load(path))
    norms = measure()
    if path is not None:
        np.savez_compressed(path, **norms)
    return norms


def features(norms: Norms, levels: Sequence[int]) -> dict[str, dict[int, Array]]:
    """Log norms of the layers that are live on held-out data, of each set and level."""
    found: dict[str, dict[int, Array]] = {name: {} for name in norms}
    for i, level in enumerate(levels):
        held_out = norms["held out"][:, i]
        names = tuple(f"t={level}/{layer}" for layer in range(held_out.shape[1]))
        log_norms = LogNorms.fit(names, held_out, float(np.finfo(np.float32).eps))
        for name, values in norms.items():
            found[name][level] = log_norms(values[:, i])
    return found


def auroc(sets: dict[str, dict[int, Array]], levels: Sequence[int]) -> float:
    """Mean over the out-of-distribution sets, of the default density at these levels."""
    joined = {name: np.hstack([of[level] for level in levels]) for name, of in sets.items()}
    density = om.ShrunkGaussian().fit(joined.pop("held out"))
    scores = {name: density.score(values) for name, values in joined.items()}
    test = scores.pop("test")
    truth = {name: np.repeat([0, 1], [len(test), len(s)]) for name, s in scores.items()}
    areas = [roc_auc_score(truth[name], np.hstack([test, s])) for name, s in scores.items()]
    return statistics.mean(map(float, areas))


def effective_dimensions(features: Mapping[int, Array], count: int) -> dict[tuple[int, ...], float]:
    """Of every set of levels, p^2 / ||R||_F^2 of the correlations R of its p features.

    This participation ratio of R's eigenvalues is 1 where all features rise and fall as one, and p
    where none is correlated with another: where few directions carry the variation a sample can be
    unusual in few ways only.

    References:
        A theory of multineuronal dimensionality, dynamics and measurement (Gao et al., 2017),
        https://doi.org/10.1101/214262
    """
    levels = sorted(features)
    standardised = [unit_columns(features[level]) for level in levels]
    energy = np.array([[np.sum((a.T @ b) ** 2) for b in standardised] for a in standardised])
    widths = np.array([a.shape[1] for a in standardised])
    sets = (list(chosen) for chosen in itertools.combinations(range(len(levels)), count))
    return {
        tuple(levels[i] for i in s): float(widths[s].sum() ** 2 / energy[np.ix_(s, s)].sum())
        for s in sets
    }


def unit_columns(features: Array) -> Array:
    """Columns of mean 0 and length 1: products of them are correlations."""
    centred = features - features.mean(0)
    return np.asarray(centred / np.linalg.norm(centred, axis=0))


def compared(model: str, norms: Norms, levels: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every level, every pair and all: the statistic that chooses, and the AUROC."""
    sets = features(norms, levels)
    dimensions: dict[tuple[int, ...], float] = {}
    for count in (1, 2, len(levels)):
        dimensions |= effective_dimensions(sets["held out"], count)
    return [
        {
            "model": model,
            "levels": list(chosen),
            "effective dimension": round(dimension, 3),
            "AUROC": round(auroc(sets, chosen), 4),
        }
        for chosen, dimension in dimensions.items()
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The pairs that matter of one model, and whether the statistic goes with the AUROC."""
    pairs = [row for row in rows if len(row["levels"]) == 2]
    areas = [pair["AUROC"] for pair in pairs]
    return {
        "best": max(pairs, key=lambda pair: pair["AUROC"]),
        "chosen": max(pairs, key=lambda pair: pair["effective dimension"]),
        "default": next(pair for pair in pairs if tuple(pair["levels"]) == DEFAULT),
        "all": next(row for row in rows if len(row["levels"]) > 2),
        "median": statistics.median(areas),
        "rank correlation": spearmanr([p["effective dimension"] for p in pairs], areas).statistic,
    }


def claims(model: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    chosen, every = found["chosen"]["AUROC"], found["all"]["AUROC"]
    text = f"{model}, all levels: AUROC short of the default pair's"
    return [
        claim(text, round(found["default"]["AUROC"] - every, 4), 0.0),
        *(
            claim(f"{model}, chosen pair: AUROC short of {name}", round(value - chosen, 4), target)
            for name, value, target in (
                ("the best pair's", found["best"]["AUROC"], 0.02),
                ("the median pair's", found["median"], 0.0),
                ("the default pair's", found["default"]["AUROC"], 0.01),
            )
        ),
    ]


def tell(model: str, rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    typer.echo(f"\n{model}\n{'levels':>12}  effective dimension  AUROC")
    named = {name: found[name] for name in ("chosen", "default", "best", "all")}
    for name, row in [*(("", r) for r in rows if len(r["levels"]) == 1), *named.items()]:
        levels = "all" if name == "all" else ", ".join(map(str, row["levels"]))
        typer.echo(f"{levels:>12}  {row['effective dimension']:19.2f}  {row['AUROC']:.3f}  {name}")
    typer.echo(
        f"median pair {found['median']:.3f}; rank correlation over pairs "
        f"{found['rank correlation']:.2f}"
    )


def cases(data: Path, model: Path, quick: bool) -> dict[str, Callable[[], Case]]:
    if quick:
        return {"8x8 digits": digits}
    files = [data / f"{name}.npz" for name in FILES]
    missing = [str(path) for path in (*files, model) if not path.exists()]
    if missing:
        typer.echo(WHERE.format(missing=", ".join(missing)), err=True)
        raise typer.Exit(2)
    return {
        "Fashion-MNIST": lambda: fashion(data, model),
        "MNIST": lambda: mnist(data),
        "CIFAR-10, grey, 16x16": lambda: photographs(data),
    }


def main(
    data_dir: Annotated[Path, typer.Option(help="Where the images are.")] = Path("../shared/data"),
    model_dir: Annotated[Path, typer.Option(help="A diffusers pipeline on Fashion-MNIST.")] = Path(
        "../shared/models/ddpm-fashion-mnist"
    ),
    cache: Annotated[Path | None, typer.Option(help="Where norms are kept between runs.")] = None,
    quick: Annotated[bool, typer.Option(help="Digits, a tiny network, few levels.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    levels = (1, 50, 200, 500, 900) if quick else LEVELS
    report: dict[str, Any] = {"machine": machine(), "rows": [], "claims": []}
    for name, make in cases(data_dir, model_dir, quick).items():
        torch.manual_seed(0)
        kept = None if cache is None else cache / f"{name}.npz"
        rows = compared(name, cached(kept, lambda make=make: measured(make(), levels)), levels)
        found = summary(rows)
        tell(name, rows, found)
        report["rows"] += rows
        report["claims"] += claims(name, found)
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
