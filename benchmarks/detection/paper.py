"""What the paper shows and assumes, on our models: norms by layer, their law, the Fisher matrix.

Beside the table (`benchmarks.detection.evidence`): histograms of two layers' log norms and their
scatter; how Normal they are, whether a layer's norm is chi-square, how layers correlate; whether
the Fisher information is near its diagonal; AUROC by a diffusion model's noise level; and that
gradients do not depend on how the data are represented. A full run takes a quarter of an hour on
one core.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, trained, zoo
from benchmarks.detection.pixelcnn import PixelCNN
from benchmarks.detection.protocol import Array, Sizes
from benchmarks.detection.representations import invariance, stored
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.adapters.base import checked_terms
from ood_monitor.densities.baselines import Typicality
from ood_monitor.densities.features import layer_of

Row = dict[str, Any]
#: The paper's T; its loss is that of level T - 1.
TIMESTEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 999)


@dataclass(frozen=True)
class Case:
    """A trained model and images.

    Attributes:
        on: The set that it was trained on.
        model: Its name in the zoo.
        sets: As `protocol.sets` gives them.
    """

    on: str
    model: str
    watched: Watched
    module: nn.Module
    sets: Mapping[str, Tensor]

    @property
    def adapter(self) -> om.Adapter:
        return self.watched.adapter(self.module)

    def prepared(self, name: str) -> Tensor:
        return self.watched.prepare(self.sets[name])


# The law of the norms.


def law(case: Case) -> Row:
    """How far the paper's assumptions on log norms hold, as `om.diagnose` measures it."""
    found = om.diagnose(case.adapter, case.prepared("fit").split(50))
    sizes = dict(case.module.named_parameters())
    shares = [
        found.effective_dof[name] / sizes[layer_of(name).split("/", 1)[1]].numel()
        for name in found.effective_dof
    ]
    return {
        "shown": "law",
        "ks_median": round(statistics.median(found.ks.values()), 3),
        "effective_dof_median": round(statistics.median(found.effective_dof.values()), 2),
        "effective_dof_of_parameters": round(statistics.median(shares), 4),
        "mean_correlation": round(found.mean_correlation, 3),
        "shared_gradient_median": round(statistics.median(found.shared_gradient.values()), 3),
    }


# The Fisher information.


def fisher(case: Case, samples: int, weights: int = 50, layers: int = 3) -> Row:
    """Of random weights of random layers, over samples of the model itself.

    The off-diagonal elements are divided by the square roots of their diagonal ones: correlations.
    """
    torch.manual_seed(1)
    x = SAMPLERS[type(case.module).__name__](case.module, case.prepared("fit")[0], samples)
    picked, gradients = random_weights(case.module, weights, layers), []
    adapter = of_samples(case)
    for sample in x.split(1):
        likelihood = sum(value.sum() for _, value in checked_terms(adapter, sample))
        parts = torch.autograd.grad(likelihood, [p for p, _ in picked])
        flat = [g.flatten()[i] for g, (_, i) in zip(parts, picked, strict=True)]
        gradients.append(torch.cat(flat).double().numpy())
    return {"shown": "fisher", "samples": samples} | dominance(np.stack(gradients), weights)


def of_samples(case: Case) -> om.Adapter:
    """The adapter of what the model itself draws: a flow's samples are not in 256 steps."""
    flow = isinstance(case.module, om.models.Glow)
    return om.LogLikelihood(case.module) if flow else case.adapter


def random_weights(module: nn.Module, weights: int, layers: int) -> list[tuple[Tensor, Tensor]]:
    large = [p for p in module.parameters() if p.ndim > 1 and p.numel() >= weights]
    chosen = torch.randperm(len(large))[:layers]
    return [(large[i], torch.randperm(large[i].numel())[:weights]) for i in chosen]


def dominance(gradients: Array, weights: int) -> Row:
    """How large diagonal elements of the Fisher information (K, K) are beside the others."""
    matrix = gradients.T @ gradients / len(gradients)
    live = np.diag(matrix) > 0
    layer = (np.arange(len(matrix)) // weights)[live]
    matrix = matrix[np.ix_(live, live)]
    scale = np.sqrt(np.diag(matrix))
    correlation = np.abs(matrix / np.outer(scale, scale))
    off = ~np.eye(len(matrix), dtype=bool)
    same = layer[:, None] == layer
    return {
        "diagonal_over_off_diagonal": round(float(1 / correlation[off].mean()), 2),
        "within_layers": round(float(correlation[off & same].mean()), 4),
        "between_layers": round(float(correlation[~same].mean()), 4),
        # Of independent gradients, from as many samples: the mean of a half-Normal.
        "if_independent": round(float(np.sqrt(2 / np.pi / len(gradients))), 4),
    }


def draw_flow(glow: om.models.Glow, like: Tensor, count: int) -> Tensor:
    return glow.sample(count)


@torch.no_grad()
def draw_vae(vae: trained.VAE, like: Tensor, count: int) -> Tensor:
    latent = vae.decoder[0].in_features
    return torch.bernoulli(vae.decode(torch.randn(count, latent)).sigmoid())


@torch.no_grad()
def draw_pixels(net: PixelCNN, like: Tensor, count: int) -> Tensor:
    tokens = torch.zeros(count, *like.shape, dtype=torch.long)
    for row in range(like.shape[0]):
        for column in range(like.shape[1]):
            logits = net(tokens)[:, :, row, column]
            tokens[:, row, column] = torch.distributions.Categorical(logits=logits).sample()
    return tokens


@torch.no_grad()
def draw_diffusion(unet: Any, like: Tensor, count: int, steps: int = 25) -> Tensor:
    """By deterministic steps (DDIM) from noise."""
    alphas, x = trained.SCHEDULE.alphas_cumprod, torch.randn(count, *like.shape)
    times = torch.linspace(999, 0, steps).long()
    for t, after in itertools.pairwise(times):
        noise = torch.cat([unet(part, t).sample for part in x.split(64)])
        clean = ((x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()).clamp(-1, 1)
        x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * noise
    return clean


SAMPLERS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "Glow": draw_flow,
    "VAE": draw_vae,
    "PixelCNN": draw_pixels,
    "UNet2DModel": draw_diffusion,
}


# Noise levels.


def by_timestep(case: Case, count: int, group: int = 5) -> Iterator[Row]:
    """Mean AUROC over the other sets by noise level: the paper's score and typicality."""
    adapter: Any = case.adapter
    for timestep in TIMESTEPS:
        level = adapter.with_levels((timestep - 1,))
        kept = {k: case.watched.prepare(v[:count]) for k, v in case.sets.items()}
        kept.pop("calibration")
        found = {name: methods.measured(level, x, group) for name, x in kept.items()}
        logs = methods.log_norms(found)
        values = {name: m.log_likelihood.sum(1) for name, m in found.items()}
        means = {
            "paper": mean_auroc(om.DiagonalGaussian(), logs),
            "half-shrunk": mean_auroc(om.ShrunkGaussian(), logs),
            "typicality": mean_auroc(Typicality(), values),
        }
        yield {"shown": "timestep", "T": timestep, "group": group} | means


def mean_auroc(method: protocol.Method, view: protocol.View) -> float:
    scores = protocol.scored(method, view)
    normal = scores.pop("test")
    return round(statistics.mean(protocol.auroc(normal, odd) for odd in scores.values()), 4)


# Representation.


def representation(case: Case) -> Row:
    """What changes if the same images are stored otherwise: the likelihood, not its gradient."""
    found = invariance(case.module, stored(), case.prepared("test")[:100])
    return {"shown": "representation"} | found


# Figures.


def layers_figure(cases: list[Case], others: list[str], count: int) -> Figure:
    """For each model: log norms of two layers in and out of distribution, and their scatter."""
    figure = Figure(figsize=(9, 2.4 * len(cases)), layout="constrained")
    for case, axes in zip(cases, figure.subplots(len(cases), 3, squeeze=False), strict=True):
        norms = {
            name: om.gradient_norms(methods.Whole(case.adapter), case.prepared(name)[:count])
            for name in ("test", *others)
        }
        first, second = two_layers(norms["test"])
        for name, layers in norms.items():
            label = case.on if name == "test" else name
            a, b = (np.log(layers[layer].double().numpy()) for layer in (first, second))
            axes[0].hist(a, bins=40, density=True, alpha=0.5, label=label)
            axes[1].hist(b, bins=40, density=True, alpha=0.5)
            axes[2].scatter(a, b, s=3, alpha=0.5)
        named(axes, case, first, second)
    return figure


def two_layers(norms: Mapping[str, Tensor]) -> tuple[str, str]:
    """A layer a third into the model and one two thirds in, of those with a gradient."""
    live = [name for name, value in norms.items() if (value > 0).all()]
    return live[len(live) // 3], live[2 * len(live) // 3]


def named(axes: Array, case: Case, first: str, second: str) -> None:
    short = [".".join(name.split("/", 1)[1].split(".")[-4:]) for name in (first, second)]
    panels: list[Axes] = list(axes)
    panels[0].set_ylabel(case.model)
    for panel, label in zip(panels, (*short, short[0]), strict=True):
        panel.set_xlabel(f"log f of {label}", fontsize=7)
    panels[2].set_ylabel(f"log f of {short[1]}", fontsize=7)
    panels[0].legend(fontsize=7)


def timestep_figure(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for method in ("paper", "half-shrunk", "typicality"):
        mean = means_by_timestep(rows, method)
        axes.plot(list(mean), list(mean.values()), marker="o", label=method)
    axes.set(xscale="log", xlabel="T", ylabel="mean AUROC of all pairs, B = 5")
    axes.legend()
    return figure


def means_by_timestep(rows: list[Row], method: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["shown"] == "timestep":
            found.setdefault(row["T"], []).append(row[method])
    return {timestep: statistics.mean(values) for timestep, values in found.items()}


# The whole.


def cases(data: Path) -> list[Case]:
    found = []
    for on in zoo.TRAINED_ON:
        sets = protocol.sets(data, on, Sizes())
        for model, watched in zoo.zoo().items():
            module, _ = zoo.load(watched, zoo.weights_file(on, model))
            found.append(Case(on, model, watched, module, sets))
    return found


def quick_cases(count: int = 120) -> list[Case]:
    sets = protocol.digits(count)
    images = sets.pop("train")
    models = zoo.trained_tiny(images)
    return [Case("digits", model, watched, module, sets) for model, watched, module, _ in models]


def rows_of(case: Case, samples: int, count: int) -> Iterator[Row]:
    named = {"on": case.on, "model": case.model}
    yield named | law(case)
    yield named | fisher(case, samples)
    if case.model == "UNet":
        yield from (named | row for row in by_timestep(case, count))
    if case.model == "Glow":
        yield named | representation(case)


def claims(rows: list[Row]) -> list[Row]:
    paper, typicality = (means_by_timestep(rows, name) for name in ("paper", "typicality"))
    changed = max(r.get("norms_relative_difference", 0.0) for r in rows)
    text = "mean AUROC of all pairs at T = 1, B = 5: typicality less paper"
    return [
        claim(text, round(typicality[1] - paper[1], 4), 0.0),
        claim("largest relative change of a norm with the representation", changed, 1e-6),
    ]


def main(
    quick: Annotated[bool, typer.Option(help="Tiny models of 8x8 digits; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    figures: Annotated[Path | None, typer.Option(help="Folder for figures.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick:
        datasets.require(data_dir, datasets.SOURCES)
    samples, count = (64, 50) if quick else (1_024, 150)
    every, rows = quick_cases(60) if quick else cases(data_dir), []
    for case in every:
        for row in rows_of(case, samples, count):
            typer.echo("  ".join(f"{name} {value}" for name, value in row.items()))
            rows.append(row)
    if figures is not None:
        first = [case for case in every if case.on == every[0].on]
        others = list(first[0].sets)[3:5]
        layers_figure(first, others, count).savefig(figures / "evidence-layers.png", dpi=110)
        timestep_figure(rows).savefig(figures / "evidence-timesteps.png", dpi=110)
    conclude({"machine": machine(), "rows": rows, "claims": claims(rows)}, output)


if __name__ == "__main__":
    typer.run(main)
