"""Which density to take by default: AUROC of each, on several models and granularities.

A density is judged on single samples, against sets unlike the one that a model was trained on. The
claims are about the default alone: how far it is behind what hindsight would have picked. To
compare one more density, add it to `DENSITIES` and run again: models and features are in files.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from benchmarks.detection import datasets, trained
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.densities import FisherCombination, GaussianMixture, PrincipalGaussian, StudentT
from ood_monitor.densities.baselines import (
    ChiSquare,
    DensityOfStates,
    IsolationForest,
    LogNormal,
    LowLikelihood,
    OneClassSVM,
    TotalNorm,
    Typicality,
)
from ood_monitor.densities.features import LogNorms, layer_of

Array: TypeAlias = NDArray[np.float64]
#: Of each set of images, by name, what a method sees of it: (N, F), or (N,).
View: TypeAlias = Mapping[str, Array]


class Method(Protocol):
    """A density, or anything else that is fitted on one view and scores by it."""

    def fit(self, features: Array) -> object: ...

    def score(self, features: Array) -> Array: ...


Methods: TypeAlias = Mapping[str, Callable[[], Method]]

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
DEFAULT = "TermsAndNorms"

#: The methods compared on each view of a model.
METHODS: dict[str, Methods] = {
    "tensor": DENSITIES
    | {
        "TotalNorm": TotalNorm,
        "LogNormal": LogNormal,
        "ChiSquare": ChiSquare,
        "OneClassSVM": OneClassSVM,
        "IsolationForest": IsolationForest,
    },
    "row": DENSITIES,
    "terms' values": DENSITIES
    | {"GaussianMixture": GaussianMixture, "DensityOfStates": DensityOfStates},
    "likelihood": {"LowLikelihood": LowLikelihood, "Typicality": Typicality},
}


class ByLayer:
    """Rows of different layers independent, those of one layer by a full covariance.

    Args:
        layers: Of each row, (F,).
    """

    def __init__(self, layers: Sequence[str]) -> None:
        names = dict.fromkeys(layers)
        self._columns = [np.flatnonzero(np.array(layers) == name) for name in names]

    def fit(self, features: Array) -> object:
        self._blocks = [om.ShrunkGaussian().fit(features[:, at]) for at in self._columns]
        return self

    def score(self, features: Array) -> Array:
        pairs = zip(self._blocks, self._columns, strict=True)
        return np.asarray(sum(block.score(features[:, at]) for block, at in pairs))


def views(features: trained.Features, most_rows: int) -> Iterator[tuple[str, View, Methods]]:
    """Each view of a model's features, by name, and the methods that are compared on it."""
    terms, values = len(features.terms), features.log_likelihood
    rows, by_row = thinned(*log_norms(features.rows, features.norms), most_rows)
    for name, view in {"tensor": log_norms(*by_tensor(features))[1], "row": by_row}.items():
        yield name, view, METHODS[name]
        both = {key: np.hstack([values[key], logs]) for key, logs in view.items()}
        yield name, both, {DEFAULT: lambda: om.TermsAndNorms(terms)}
    layers = [layer_of(row) for row in rows]
    yield "row", by_row, {"ByLayer": lambda: ByLayer(layers)}
    yield "terms' values", values, METHODS["terms' values"]
    sums = {name: v.sum(1) for name, v in values.items()}
    yield "likelihood", sums, METHODS["likelihood"]


def by_tensor(features: trained.Features) -> tuple[tuple[str, ...], View]:
    """A tensor's squared norm is the sum of its rows'."""
    layers = [layer_of(row) for row in features.rows]
    names = tuple(dict.fromkeys(layers))
    starts = [layers.index(name) for name in names]
    return names, {k: np.add.reduceat(v, starts, axis=1) for k, v in features.norms.items()}


def log_norms(names: tuple[str, ...], norms: View) -> tuple[tuple[str, ...], View]:
    """Logs of the live features, as a detector takes them, and their names."""
    logs = LogNorms.fit(names, norms["fit"], torch.finfo(torch.float32).eps)
    return logs.live_names, {name: logs(values) for name, values in norms.items()}


def thinned(names: tuple[str, ...], view: View, most: int) -> tuple[tuple[str, ...], View]:
    """At most so many features, evenly spaced: what Ledoit and Wolf ask for takes their square."""
    kept = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))
    return tuple(names[i] for i in kept), {key: values[:, kept] for key, values in view.items()}


def matrix(model: str, features: trained.Features, most_rows: int) -> list[dict[str, Any]]:
    return [
        {"model": model, "granularity": name, "method": method} | evaluated(make, view)
        for name, view, methods in views(features, most_rows)
        for method, make in methods.items()
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
    for image in images.permute(0, 2, 3, 1).squeeze(3).numpy():
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
        short = shortfalls(rows, granularity)
        text = f"{granularity}: mean AUROC of {DEFAULT} short of each model's best of all methods"
        found.append(claim(f"{text}, mean", round(statistics.mean(short.values()), 4), 0.01))
        found += [claim(f"{text}, {m}", round(value, 4), 0.03) for m, value in short.items()]
    return found


def shortfalls(rows: list[dict[str, Any]], granularity: str) -> dict[str, float]:
    """Of each model: best mean AUROC at a granularity, or without gradients, less the default's."""
    best: dict[str, float] = {}
    ours: dict[str, float] = {}
    for row in rows:
        model, at = row["model"], row["granularity"]
        if at in (granularity, "terms' values", "likelihood"):
            best[model] = max(best.get(model, 0.0), row["mean"])
        if (at, row["method"]) == (granularity, DEFAULT):
            ours[model] = row["mean"]
    return {model: best[model] - mean for model, mean in ours.items()}


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
        datasets.require(data_dir, trained.SETS)
        images = trained.fashion(data_dir)
        found = report(trained.full(pipeline), images, cache_dir, most_rows)
    conclude(found, output)


if __name__ == "__main__":
    typer.run(main)
