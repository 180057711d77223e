"""Tables: density models of rows, and shifts of their columns.

zuko's MAF and NSF of three tables that scikit-learn ships (breast cancer, digits as 64 columns,
diabetes), standardised, half of the rows to train on, a quarter to fit and a quarter to test. Rows
have no likelihood paradox: - log p stands beside everything. A full run takes two minutes on one
core and needs no files.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sklearn.datasets as tables
import torch
import typer
import zuko
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import protocol
from benchmarks.detection.forward import fitted
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.detector.plan import planned

Row = dict[str, Any]

#: Each with the classes that are held out; of a regression the largest targets.
TABLES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "breast cancer": lambda: tables.load_breast_cancer(return_X_y=True),
    "digits": lambda: tables.load_digits(return_X_y=True),
    "diabetes": lambda: tables.load_diabetes(return_X_y=True),
}
HELD_OUT: dict[str, Callable[[Any], Any]] = {
    "breast cancer": lambda y: y == 0,
    "digits": lambda y: y >= 8,
    "diabetes": lambda y: y > np.quantile(y, 0.8),
}

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "MAF": lambda width: zuko.flows.MAF(width, transforms=3, hidden_features=(64, 64)),
    "NSF": lambda width: zuko.flows.NSF(width, transforms=2, hidden_features=(64, 64)),
}

METHODS: dict[str, dict[str, Any]] = {
    "- log p": {"parts": ["log_likelihood"]},
    "paper": {"density": om.DiagonalGaussian()},
    "gradient_norms": {"method": "gradient_norms"},
    "forward": {"method": "forward"},
    "values, expected_norms": {"parts": ["values", "expected_norms"]},
}

STEPS, BATCH, NOISE = 1_500, 128, 0.1


def split(name: str) -> dict[str, Tensor]:
    """Rows (N, D): "train", "fit", "test" and "class held out", standardised by the first."""
    x, y = TABLES[name]()
    generator = np.random.default_rng(0)
    other = HELD_OUT[name](y)
    order = generator.permutation(np.flatnonzero(~other))
    ends = [len(order) // 2, 3 * len(order) // 4]
    parts = dict(zip(("train", "fit", "test"), np.split(order, ends), strict=True))
    rows = {k: x[at] for k, at in parts.items()} | {"class held out": x[other]}
    mean, sd = rows["train"].mean(0), rows["train"].std(0)
    varying = sd > 0
    return {
        k: torch.tensor((v[:, varying] - mean[varying]) / sd[varying], dtype=torch.float32)
        for k, v in rows.items()
    }


def shifted(test: Tensor) -> dict[str, Tensor]:
    """The test rows with columns that are not as they were."""
    generator = torch.Generator().manual_seed(0)
    swapped, scaled, torn = test.clone(), test.clone(), test.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    scaled[:, 2] *= 1.3
    torn[:, 3] = torn[torch.randperm(len(torn), generator=generator), 3]
    noise = torch.randn(test.shape, generator=generator)
    return {
        "columns swapped": swapped,
        "one column x 1.3": scaled,
        "one column of other rows": torn,
        "noise": test + NOISE * noise,
    }


def trained(name: str, rows: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    flow: Any = MODELS[name](rows.shape[1])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(steps):
        x = rows[torch.randint(len(rows), (BATCH,))]
        loss = -flow().log_prob(x + 0.05 * torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.eval()  # type: ignore[no-any-return]


def rows_of(table: str, model: str, steps: int) -> Iterator[Row]:
    """A row for each method."""
    sets = split(table)
    flow = trained(model, sets.pop("train"), steps)
    sets |= shifted(sets["test"])
    adapter = om.LogLikelihood(flow, sample="row")
    for method, options in METHODS.items():
        scores = scored(adapter, sets, options)
        case = {"table": table, "model": model, "method": method}
        found = protocol.with_mean(protocol.aurocs(scores))
        yield case | found | {"fpr_at_95_tpr": protocol.fprs(scores)}


def scored(
    adapter: om.Adapter, sets: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores of every set but the one that fits."""
    detector = om.Detector(adapter, **options)
    found = {name: detector.measure(x) for name, x in sets.items()}
    fit = found.pop("fit")
    plan = planned(fit.sample, detector.method, detector.density, detector.parts)
    joined = fitted(plan, fit)
    return {name: joined.score(it) for name, it in found.items()}


def line(row: Row) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    return f"{row['table']:14}{row['model']:5}{row['method']:24}{each}  mean {row['mean']:.4f}"


def claims(rows: list[Row]) -> list[Row]:
    """The mean of forward, and by how much its worst shift is below gradient norms'."""
    by_method = {
        name: {
            (row["table"], row["model"], shift): value
            for row in rows
            if row["method"] == name
            for shift, value in row["auroc"].items()
        }
        for name in METHODS
    }
    ours, before = by_method["forward"], by_method["gradient_norms"]
    mean = statistics.mean(ours.values())
    lost = max(before[case] - value for case, value in ours.items())
    low = statistics.mean(by_method["- log p"].values())
    return [
        claim(f"1 - mean AUROC of {len(ours)} shifts", round(1 - mean, 4), 0.17),
        claim("the most that a shift loses to gradient_norms", round(lost, 4), 0.0),
        claim("mean AUROC of - log p less that of forward", round(low - mean, 4), 0.0),
    ]


def main(
    quick: Annotated[bool, typer.Option(help="One table and few steps.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    rows = []
    for table in list(TABLES)[: 1 if quick else None]:
        for model in MODELS:
            for row in rows_of(table, model, 50 if quick else STEPS):
                typer.echo(line(row))
                rows.append(row)
    report = {"machine": machine(), "rows": rows, "claims": claims(rows)}
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
