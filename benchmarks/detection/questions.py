"""What the paper leaves open: which layers, what undertraining does, how many samples to fit on.

Layers against cost: the diffusion model's suffixes, from the last layers to all of them, at one,
two and four noise levels, each under three draws of the noise; beside them MSMA, which takes ten
forward passes. Every setting is shown; none was picked by these figures. A full run takes half an
hour on one core.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, methods, protocol, train, trained, zoo
from benchmarks.detection.evidence import NEAR
from benchmarks.detection.methods import DEFAULT, PAPER, Seen
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, conclude, machine, ratios
from ood_monitor.densities import GaussianMixture
from ood_monitor.densities.baselines import Typicality
from ood_monitor.densities.measurements import Measurements

Row = dict[str, Any]

LEVELS: dict[str, tuple[int, ...]] = {
    "500": (500,),
    "50, 500": (50, 500),
    "20, 100, 300, 500": (20, 100, 300, 500),
}
#: The default seed of the noise, and others.
SEEDS = (0, 1, 2)
#: Parts of a UNet: how many of its last up blocks are scored with the output layers.
OUTPUT = ("conv_norm_out.*", "conv_out.*")


@dataclass(frozen=True)
class Model:
    """A trained model of a set, and images, as `protocol.sets` gives them."""

    name: str
    watched: Watched
    module: Any
    sets: Mapping[str, Tensor]
    near: Sequence[str]

    def prepared(self) -> dict[str, Tensor]:
        return {name: self.watched.prepare(images) for name, images in self.sets.items()}


# Layers against cost.


def parts(unet: Any) -> dict[str, list[str] | None]:
    """Suffixes of the network by name, and their patterns."""
    blocks = len(unet.up_blocks)
    last = [f"up_blocks.{i}.*" for i in range(blocks)]
    return {
        "output layers": list(OUTPUT),
        "last up block": [last[-1], *OUTPUT],
        "last two up blocks": [*last[-2:], *OUTPUT],
        "up blocks": [*last, *OUTPUT],
        "all layers": None,
    }


def layers(
    model: Model,
    seeds: Sequence[int],
    by_name: Mapping[str, list[str] | None],
    by_title: Mapping[str, tuple[int, ...]] = LEVELS,
) -> Iterator[Row]:
    """Mean AUROC by part, levels and seed, and what a sample costs in forward passes."""
    every = sorted({level for levels in by_title.values() for level in levels})
    found = {seed: norms_at(model, every, seed) for seed in seeds}
    for name, patterns in by_name.items():
        for title, levels in by_title.items():
            aurocs = [
                mean_near(model, default(of(seen, levels, patterns))) for seen in found.values()
            ]
            yield {
                "question": "layers",
                "layers": name,
                "levels": title,
                "forwards": cost(model, levels, patterns),
                "near": [round(value, 4) for value in aurocs],
                "mean": round(statistics.mean(aurocs), 4),
            }
    yield msma(model)


def norms_at(model: Model, levels: Sequence[int], seed: int) -> dict[str, Measurements]:
    """Of what is compared here: fit, test and the near sets."""
    adapter = om.DenoisingBound(model.module, trained.SCHEDULE, levels=levels, seed=seed)
    x = model.prepared()
    return {name: methods.measured(adapter, x[name], 1) for name in ("fit", "test", *model.near)}


def of(
    seen: Mapping[str, Measurements], levels: Sequence[int], patterns: Sequence[str] | None
) -> dict[str, Measurements]:
    """What a detector at these levels, of these layers alone, would have measured."""
    terms = [f"t={level}" for level in levels]
    first = seen["fit"]
    columns = [first.terms.index(term) for term in terms]
    features = [i for i, name in enumerate(first.features) if kept(name, terms, patterns)]
    return {
        name: Measurements.of_norms(
            tuple(terms),
            m.log_likelihood[:, columns],
            tuple(m.features[i] for i in features),
            m.norms[:, features],
        )
        for name, m in seen.items()
    }


def kept(feature: str, terms: Sequence[str], patterns: Sequence[str] | None) -> bool:
    term, parameter = feature.split("/", 1)
    starts = tuple(pattern.rstrip("*") for pattern in patterns or [""])
    return term in terms and parameter.startswith(starts)


def default(seen: Mapping[str, Measurements]) -> dict[str, protocol.Array]:
    """Scores of the default density."""
    return protocol.scored(methods.default(seen["fit"]), methods.default_view(seen))


def mean_near(model: Model, scores: Mapping[str, protocol.Array]) -> float:
    return statistics.mean(protocol.auroc(scores["test"], scores[name]) for name in model.near)


def cost(model: Model, levels: Sequence[int], patterns: list[str] | None) -> float:
    """Time of a detector's pass over 50 samples, in units of a forward pass of the network."""
    adapter = om.DenoisingBound(model.module, trained.SCHEDULE, levels=levels)
    x = model.prepared()["test"][:50]
    times = torch.full((len(x),), 500)

    def forward() -> None:
        with torch.no_grad():
            model.module(x, times)

    def scored() -> None:
        om.gradient_norms(adapter, x, layers=patterns)

    scored()  # the first use of an adapter checks it
    return round(ratios(forward, {"scored": scored}, methods.ROUNDS)["scored"], 2)


def msma(model: Model) -> Row:
    adapter = om.DenoisingBound(model.module, trained.SCHEDULE)
    x, names = model.prepared(), ("fit", "test", *model.near)
    view = {name: np.log(methods.score_norms(adapter, x[name])) for name in names}
    mean = round(mean_near(model, protocol.scored(GaussianMixture(), view)), 4)
    return {
        "question": "layers",
        "layers": "MSMA",
        "levels": ", ".join(map(str, methods.MSMA_LEVELS)),
        "forwards": float(len(methods.MSMA_LEVELS)),
        "near": [mean],
        "mean": mean,
    }


# How many samples fit the density.


def fit_sizes(model: Model, sizes: Sequence[int]) -> Iterator[Row]:
    """Mean AUROC over all sets by the number of samples that the density is fitted on."""
    adapter, x = model.watched.adapter(model.module), model.prepared()
    pool = torch.cat([x["fit"], x["calibration"]])
    x = {"fit": pool, **{k: v for k, v in x.items() if k not in ("fit", "calibration")}}
    found = {name: methods.measured(adapter, images, 1) for name, images in x.items()}
    for size in sizes:
        if size <= len(pool):
            few = {**found, "fit": found["fit"].take(range(size))}
            logs = methods.log_norms(few)
            densities: dict[str, tuple[protocol.Method, protocol.View]] = {
                "diagonal": (om.DiagonalGaussian(), logs),
                "half-shrunk": (om.ShrunkGaussian(), logs),
                "Ledoit-Wolf": (om.ShrunkGaussian("ledoit_wolf"), logs),
                DEFAULT: (methods.default(few["fit"]), methods.default_view(few)),
            }
            means = {name: mean_of_all(*pair) for name, pair in densities.items()}
            yield {"question": "fit size", "model": model.name, "samples": size} | means


def mean_of_all(method: protocol.Method, view: protocol.View) -> float:
    scores = protocol.scored(method, view)
    normal = scores.pop("test")
    return round(statistics.mean(protocol.auroc(normal, odd) for odd in scores.values()), 4)


# Undertraining.


def undertraining(model: Model, stages: Mapping[int, nn.Module]) -> Iterator[Row]:
    """Mean AUROC over all sets, and the gradient that samples share, by steps of training."""
    for step, module in stages.items():
        found: dict[str, Seen] = {
            name: methods.seen(model.watched, module, images, 1)
            for name, images in model.sets.items()
            if name != "calibration"
        }
        views = methods.views(found)
        held_out = model.prepared()["fit"].split(50)
        diagnosis = om.diagnose(model.watched.adapter(module), held_out)
        shared = statistics.median(diagnosis.shared_gradient.values())
        yield {
            "question": "undertraining",
            "model": model.name,
            "steps": step,
            "typicality": mean_of_all(Typicality(), views["likelihood"]),
            PAPER: mean_of_all(om.DiagonalGaussian(), views["whole"]),
            DEFAULT: mean_of_all(methods.default(found["fit"].terms), views["default"]),
            "shared_gradient": round(shared, 3),
            "problems": len(diagnosis.problems),
        }


def stages(model: str, watched: Watched, folder: Path) -> dict[int, nn.Module]:
    """Weights along the way, as `benchmarks.detection.train` left them, by step."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem))
    if not files:
        typer.echo(f"No weights of {model} along the way in {folder}; see {train.__name__}.")
    return {int(file.stem): zoo.load(watched, file)[0] for file in files}


# The whole.


def cost_figure(rows: list[Row]) -> Figure:
    """Mean AUROC against cost, a line for each choice of levels."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for title in LEVELS:
        points = [row for row in rows if row.get("levels") == title]
        x, y = [r["forwards"] for r in points], [r["mean"] for r in points]
        axes.plot(x, y, marker="o", label=f"t = {title}")
        for row in points:
            spread = [min(row["near"]), max(row["near"])]
            axes.plot([row["forwards"]] * 2, spread, color="grey", linewidth=0.7)
    for row in rows:
        if row.get("layers") == "MSMA":
            axes.plot(row["forwards"], row["mean"], "k*", markersize=10, label="MSMA")
    axes.set(xlabel="forward passes a sample", ylabel=f"mean AUROC: {' and '.join(NEAR)}")
    axes.legend()
    return figure


def claims(rows: list[Row]) -> list[Row]:
    """Of the last up block, at the default seed of the noise: its AUROC and its cost."""
    targets = {"50, 500": (0.015, 4.0), "500": (0.025, 1.8)}
    found = []
    for row in rows:
        if row.get("layers") == "last up block" and row["levels"] in targets:
            error, forwards = targets[row["levels"]]
            what = f"last up block, levels {row['levels']}"
            text = f"{what}: 1 - mean AUROC against the near sets, default seed"
            found.append(claim(text, round(1 - row["near"][0], 4), error))
            found.append(claim(f"{what}: forward passes a sample", row["forwards"], forwards))
    return found


def full(data: Path, folder: Path, sizes: Sizes) -> Iterator[Row]:
    on = "Fashion-MNIST"
    sets = protocol.sets(data, on, sizes)
    fewer = {k: v if k in ("fit", "calibration") else v[:300] for k, v in sets.items()}
    for name, watched in zoo.zoo().items():
        module, _ = zoo.load(watched, zoo.weights_file(on, name))
        model = Model(name, watched, module, sets, NEAR)
        if name == "UNet":
            yield from layers(model, SEEDS, parts(module))
        yield from fit_sizes(Model(name, watched, module, fewer, NEAR), (50, 100, 200, 500, 1_000))
        small = {k: v[: 200 if k == "fit" else 100] for k, v in fewer.items()}
        where = folder / datasets.SOURCES[on].folder / name.lower()
        yield from undertraining(
            Model(name, watched, module, small, NEAR), stages(name, watched, where)
        )


def quick_rows() -> Iterator[Row]:
    sets = protocol.digits(60)
    images, near = sets.pop("train"), ("inverted", "blurred")
    sets = {k: v if k in ("fit", "calibration") else v[:30] for k, v in sets.items()}
    for name in ("UNet", "VAE"):
        watched = zoo.tiny()[name]
        torch.manual_seed(0)
        module = watched.make()
        before = watched.make().eval()
        trained.train(module, watched, images)
        model = Model(name, watched, module.eval(), sets, near)
        if name == "UNet":
            few = {name: parts(module)[name] for name in ("output layers", "last up block")}
            yield from layers(model, (0,), few, {"500": LEVELS["500"]})
        yield from fit_sizes(model, (50, 100))
        yield from undertraining(model, {0: before, watched.steps: module})


def main(
    quick: Annotated[bool, typer.Option(help="Tiny models of 8x8 digits; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    folder: Annotated[
        Path, typer.Option(help="Where benchmarks.detection.train kept weights along the way.")
    ] = Path("runs/evidence"),
    figures: Annotated[Path | None, typer.Option(help="Folder for figures.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick:
        datasets.require(data_dir, datasets.SOURCES)
    rows = []
    for row in quick_rows() if quick else full(data_dir, folder, Sizes()):
        typer.echo("  ".join(f"{name} {value}" for name, value in row.items()))
        rows.append(row)
    if figures is not None:
        cost_figure(rows).savefig(figures / "evidence-layers-cost.png", dpi=110)
    conclude({"machine": machine(), "rows": rows, "claims": claims(rows)}, output)


if __name__ == "__main__":
    typer.run(main)
