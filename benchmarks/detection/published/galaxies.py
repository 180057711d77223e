"""A published flow that is no PyTorch at all: the galaxies of `pzflow` 4.0.0, in JAX.

A spline flow of seven columns (redshift and six magnitudes), trained by its authors on 100 000
simulated galaxies that the package carries too, so that all rows here are rows it was trained on.
Its latents are uniform in a box, so that of the likelihood only the log-determinant varies inside;
JAX gives values and no layers: all that a detector has is low likelihood.
The package (MIT licence) reads its own pickles; nothing here does.

`make published` brings it into an environment of its own; a run takes a minute.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import forward, protocol
from benchmarks.detection.protocol import auroc
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.calibration import ConformalPValue
from ood_monitor.densities.baselines import Typicality
from ood_monitor.detector.plan import planned

Row = dict[str, Any]
Array = np.ndarray
#: Gives of rows (N, D) their log-likelihood (N,) in nats.
LogProb = Callable[[Array], Array]

COLUMNS = ("redshift", "u", "g", "r", "i", "z", "y")
FIT = CALIBRATION = TEST = 1_000
RATE = 0.05


class Observed(om.Adapter):
    """Values that another framework computes of rows of a table.

    Its module holds the foreign weights as buffers, so that a detector knows them by their digest.
    """

    sample = "row"
    is_one_pass = True

    def __init__(self, log_prob: LogProb, weights: list[Array]) -> None:
        self.module, self._log_prob = nn.Module(), log_prob
        for i, each in enumerate(weights):
            self.module.register_buffer(f"weight_{i}", torch.from_numpy(np.array(each)))

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        found = self._log_prob(batch.detach().cpu().numpy())
        yield "log_likelihood", torch.from_numpy(np.array(found, dtype=np.float64))


def published() -> tuple[Observed, Array]:
    """The flow, and its galaxies in an order of ours."""
    import jax
    import pandas as pd
    from pzflow import examples

    flow, names = examples.get_example_flow(), list(COLUMNS)
    rows = examples.get_galaxy_data()[names].to_numpy(np.float32)

    def log_prob(x: Array) -> Array:
        return np.asarray(flow.log_prob(pd.DataFrame(x, columns=names)))

    weights = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(flow._params)]
    return Observed(log_prob, weights), np.random.default_rng(0).permutation(rows)


def stand_in() -> tuple[Observed, Array]:
    """A Gaussian of as many columns, for a quick run."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(len(COLUMNS), len(COLUMNS)))
    rows = (generator.normal(size=(3 * FIT, len(COLUMNS))) @ mix).astype(np.float32)
    inverse = np.linalg.inv(mix)

    def log_prob(x: Array) -> Array:
        return np.asarray(-0.5 * ((x @ inverse) ** 2).sum(1))

    return Observed(log_prob, [mix]), rows


def shifted(test: Array) -> dict[str, Array]:
    """Galaxies whose columns are not as they were: what goes wrong in a survey."""
    generator = np.random.default_rng(1)

    def moved(by: Mapping[int, float | Array]) -> Array:
        found = test.copy()
        for column, shift in by.items():
            found[:, column] += shift
        return found

    swapped, torn = test.copy(), test.copy()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    torn[:, 0] = generator.permutation(torn[:, 0])
    reddening = dict(enumerate((0.0, 0.24, 0.19, 0.13, 0.1, 0.08, 0.06)))
    return {
        "redshift + 0.05": moved({0: 0.05}),
        "u zero point + 0.1": moved({1: 0.1}),
        "all magnitudes + 0.1": moved(dict.fromkeys(range(1, 7), 0.1)),
        "dust": moved(reddening),
        "noise of 0.05": moved({c: generator.normal(0, 0.05, len(test)) for c in range(1, 7)}),
        "r and i swapped": swapped,
        "redshift of another": torn,
    }


def scores_of(
    adapter: Observed, sets: Mapping[str, Array]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Of each method the scores of all sets but the one that fits."""
    detector = om.Detector(adapter, parts=["log_likelihood"])
    found = {name: detector.measure(torch.from_numpy(rows)) for name, rows in sets.items()}
    joined = forward.fitted(planned("row", None, None, ["log_likelihood"]), found["fit"])
    others = {name: it for name, it in found.items() if name != "fit"}
    yield "- log p", {name: joined.score(it) for name, it in others.items()}
    typicality = Typicality().fit(found["fit"].total)
    yield "typicality", {name: typicality.score(it.total) for name, it in others.items()}
    yield from controls(sets)


def controls(sets: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    """What needs no model."""
    others = {name: rows for name, rows in sets.items() if name != "fit"}
    gaussian = LedoitWolf().fit(sets["fit"])
    yield "Gaussian, no model", {k: gaussian.mahalanobis(v) for k, v in others.items()}
    mean, sd = sets["fit"].mean(0), sets["fit"].std(0)
    nearest = NearestNeighbors(n_neighbors=5).fit((sets["fit"] - mean) / sd)
    yield (
        "5 neighbours, no model",
        {k: nearest.kneighbors((v - mean) / sd)[0].mean(1) for k, v in others.items()},
    )


def rows_of(adapter: Observed, rows: Array) -> Iterator[Row]:
    ends = np.cumsum([FIT, CALIBRATION, TEST])
    parts = np.split(rows[: ends[-1]], ends[:-1])
    sets = dict(zip(("fit", "calibration", "test"), parts, strict=True))
    sets |= shifted(sets["test"])
    for method, scores in scores_of(adapter, sets):
        p_value = ConformalPValue.fit(scores["calibration"]).p_value
        others = protocol.others_of(scores)
        each = {name: round(auroc(scores["test"], scores[name]), 4) for name in others}
        found = [float(np.mean(p_value(scores[name]) <= RATE)) for name in others]
        yield {
            "method": method,
            "auroc": each,
            "mean": round(statistics.mean(each.values()), 4),
            f"found at {RATE:g}": round(statistics.mean(found), 4),
            f"flagged at {RATE:g}": round(float(np.mean(p_value(scores["test"]) <= RATE)), 4),
        }


def line(row: Row) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    return f"{row['method']:24}{each}  mean {row['mean']:.4f}  {row['flagged at 0.05']:.3f}"


def claims(rows: list[Row]) -> list[Row]:
    """Low likelihood, which rows are judged by, beside what needs no model."""
    by = {row["method"]: row for row in rows}
    ours, two = by["- log p"], by["typicality"]
    best = max(row["mean"] for row in rows if row["method"].endswith("no model"))
    return [
        claim("1 - mean AUROC of - log p", round(1 - ours["mean"], 4), 0.17),
        claim("mean AUROC of the best without a model less it", round(best - ours["mean"], 4), 0.0),
        claim("mean AUROC of typicality less it", round(two["mean"] - ours["mean"], 4), 0.0),
        claim(f"share of galaxies flagged at {RATE:g}", ours[f"flagged at {RATE:g}"], 0.07),
    ]


def main(
    quick: Annotated[bool, typer.Option(help="A Gaussian in place of the flow.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    adapter, galaxies = stand_in() if quick else published()
    rows = []
    for row in rows_of(adapter, galaxies):
        typer.echo(line(row))
        rows.append(row)
    report = {
        "machine": machine(),
        "command": "python -m benchmarks.detection.published.galaxies",
        "rows": rows,
        "claims": claims(rows),
    }
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
