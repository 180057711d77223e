"""Which density to take by default: AUROC of each, on several models and granularities.

A density is judged on single samples, against sets unlike the one that a model was trained on. The
claims are about the default alone: how far it is behind what hindsight would have picked. To
compare one more density, add it to `DENSITIES` and run again: models and features are in files.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ood_monitor as om
from benchmarks import trained
from benchmarks.measuring import claim, machine, save
from ood_monitor.baselines import (
    ChiSquare,
    IsolationForest,
    LevelMixture,
    LogNormal,
    LowLikelihood,
    OneClassSVM,
    TotalNorm,
    Typicality,
)
from ood_monitor.densities import FisherCombination, PrincipalGaussian, StudentT
from ood_monitor.features import LogNorms, layer_of

Array: TypeAlias = NDArray[np.float64]
#: Of each set of images, by name, what a method sees of it: (N, F), or (N,).
View: TypeAlias = Mapping[str, Array]


class Method(Protocol):
    """A density, or anything else that is fitted on one view and scores by it."""

    def fit(self, features: Array) -> object: ...

    def score(self, features: Array) -> Array: ...


DENSITIES: dict[str, Callable[[], Method]] = {
    "DiagonalGaussian": om.DiagonalGaussian,
    "StudentT": StudentT,
    "FisherCombination": FisherCombination,
    "ShrunkGaussian": om.ShrunkGaussian,
    "Ledoit-Wolf": lambda: om.ShrunkGaussian("ledoit_wolf"),
    "OAS": lambda: om.ShrunkGaussian("oas"),
    "leave-one-out": lambda: om.ShrunkGaussian("leave_one_out"),
    "shrunk by .3": lambda: om.ShrunkGaussian(0.3),
    "shrunk by .7": lambda: om.ShrunkGaussian(0.7),
    "PrincipalGaussian": PrincipalGaussian,
    "Maximum": om.Maximum,
}
DEFAULT = "ShrunkGaussian"

#: The methods compared on each view of a model.
METHODS: dict[str, dict[str, Callable[[], Method]]] = {
    "tensor": DENSITIES
    | {
        "TotalNorm": TotalNorm,
        "LogNormal": LogNormal,
        "ChiSquare": ChiSquare,
        "OneClassSVM": OneClassSVM,
        "IsolationForest": IsolationForest,
    },
    "row": DENSITIES,
    "terms' values": DENSITIES | {"LevelMixture": LevelMixture},
    "likelihood": {"LowLikelihood": LowLikelihood, "Typicality": Typicality},
}


def views(features: trained.Features, most_rows: int) -> Iterator[tuple[str, View]]:
    """Each view of a model's features, by name."""
    yield "tensor", log_norms(*by_tensor(features))
    yield "row", thinned(log_norms(features.rows, features.norms), most_rows)
    yield "terms' values", features.log_likelihood
    yield "likelihood", {name: v.sum(1) for name, v in features.log_likelihood.items()}


def by_tensor(features: trained.Features) -> tuple[tuple[str, ...], View]:
    """A tensor's squared norm is the sum of its rows'."""
    layers = [layer_of(row) for row in features.rows]
    names = tuple(dict.fromkeys(layers))
    starts = [layers.index(name) for name in names]
    return names, {k: np.add.reduceat(v, starts, axis=1) for k, v in features.norms.items()}


def log_norms(names: tuple[str, ...], norms: View) -> View:
    """Logs of the live features, as a detector takes them."""
    logs = LogNorms.fit(names, norms["fit"], torch.finfo(torch.float32).eps)
    return {name: logs(values) for name, values in norms.items()}


def thinned(view: View, most: int) -> View:
    """At most so many features, evenly spaced: what Ledoit and Wolf ask for takes their square."""
    count = view["fit"].shape[1]
    kept = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
    return {name: values[:, kept] for name, values in view.items()}


def matrix(model: str, features: trained.Features, most_rows: int) -> list[dict[str, Any]]:
    return [
        {"model": model, "granularity": name, "method": method} | evaluated(make, view)
        for name, view in views(features, most_rows)
        for method, make in METHODS[name].items()
    ]


def without_model(images: trained.Images) -> dict[str, Any]:
    """What the size of its PNG file, which is its smoothness, tells of an image."""
    sizes = {name: png_bytes(of) for name, of in images.sets.items()}
    return {"model": "none", "granularity": "PNG size", "method": "Typicality"} | evaluated(
        Typicality, sizes
    )


def png_bytes(images: Tensor) -> Array:
    """Length of each image's PNG file, (N,)."""
    lengths = []
    for image in images.squeeze(1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        lengths.append(float(file.tell()))
    return np.array(lengths)


def evaluated(make: Callable[[], Method], view: View) -> dict[str, Any]:
    """AUROC against each OOD set, their mean, and the seconds it took."""
    start = time.perf_counter()
    method = make()
    method.fit(view["fit"])
    scores = {name: method.score(values) for name, values in view.items() if name != "fit"}
    normal = scores.pop("test")
    found = {name: auroc(normal, odd) for name, odd in scores.items()}
    return {
        "features": int(np.atleast_2d(view["fit"].T).shape[0]),
        "auroc": {name: round(value, 4) for name, value in found.items()},
        "mean": round(statistics.mean(found.values()), 4),
        "seconds": round(time.perf_counter() - start, 2),
    }


def auroc(normal: Array, odd: Array) -> float:
    labels = np.repeat([0, 1], [len(normal), len(odd)])
    return float(roc_auc_score(labels, np.concatenate([normal, odd])))


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the default is behind the best method on each model, at each granularity."""
    found = []
    for granularity in ("tensor", "row"):
        at_it = [row for row in rows if row["granularity"] == granularity]
        short = shortfalls(at_it)
        text = f"{granularity}: mean AUROC of {DEFAULT} short of each model's best method"
        found.append(claim(f"{text}, mean", round(statistics.mean(short.values()), 4), 0.01))
        found += [claim(f"{text}, {m}", round(value, 4), 0.03) for m, value in short.items()]
    return found


def shortfalls(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each model, the best mean AUROC less the default's."""
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        means.setdefault(row["model"], {})[row["method"]] = row["mean"]
    return {model: max(of.values()) - of[DEFAULT] for model, of in means.items()}


def report(
    models: Mapping[str, trained.Watched], images: trained.Images, cache: Path, most_rows: int
) -> dict[str, Any]:
    rows, training = [without_model(images)], {}
    typer.echo(line(rows[0]))
    for name, watched in models.items():
        typer.echo(f"{name}:")
        features, training[name] = trained.measured(name, watched, images, cache)
        for row in matrix(name, features, most_rows):
            typer.echo(line(row))
            rows.append(row)
    return {"machine": machine(), "training": training, "rows": rows, "claims": claims(rows)}


def line(row: dict[str, Any]) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    named = f"{row['granularity']:14}{row['method']:20}{row['features']:6}"
    return f"  {named}  {each}  mean {row['mean']:.3f}  ({row['seconds']} s)"


def main(
    quick: Annotated[bool, typer.Option(help="Tiny models of 8x8 digits; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    pipeline: Annotated[
        Path | None,
        typer.Option(help="Folder of a DDPMPipeline trained on Fashion-MNIST; else it is trained."),
    ] = None,
    cache_dir: Annotated[
        Path, typer.Option(help="Where weights and features are kept; delete to measure anew.")
    ] = Path("runs/densities"),
    most_rows: Annotated[int, typer.Option(help="Most features by row.")] = 2_000,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as directory:
            found = report(trained.tiny(), trained.digits(), Path(directory), 200)
    else:
        if words := trained.missing(data_dir):
            typer.echo(words, err=True)
            raise typer.Exit(1)
        images = trained.fashion(data_dir)
        found = report(trained.full(pipeline), images, cache_dir, most_rows)
    for c in found["claims"]:
        typer.echo(f"{'holds' if c['holds'] else 'FAILS'}  {c['claim']}: {c['value']}")
    save(found, output)


if __name__ == "__main__":
    typer.run(main)
