"""Whether low likelihood, as one more one-sided part, helps or costs, and whether a model tells.

Where a sample is typical of a model and one small thing in it is changed, one-sided - log p finds
what two-sided densities do not; for foreign samples that are simpler than known ones it points the
wrong way. Here the default is joined with it on the likelihood models of the evidence, beside what
held-out data alone say: how surprised the model is of them, by its own expectation. The same of
antibody models is in `benchmarks.detection.published.antibodies`.

A run takes ten minutes on one core: `python -m benchmarks.detection.known_data --data-dir FOLDER`.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, forward, protocol, zoo
from benchmarks.detection.protocol import Sizes, aurocs
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.plan import planned

Row = dict[str, Any]

SIZES = Sizes(fit=400, calibration=1, test=300, ood=200)
DEFAULT, LOW = "forward", "forward, low - log p too"
PARTS = {
    DEFAULT: ["values", "expected_norms"],
    LOW: ["values", "expected_norms", "log_likelihood"],
    "- log p": ["log_likelihood"],
}
#: What a part of low likelihood may cost a set, to be offered.
MOST = 0.005


def rows_of(
    model: str, watched: Watched, module: nn.Module, sets: Mapping[str, Tensor]
) -> Iterator[Row]:
    """A row for each of what is compared."""
    adapter = watched.adapter(module)
    detector = om.Detector(adapter, parts=PARTS[LOW], chunk_size=50)
    found = {
        name: detector.measure(watched.prepare(images))
        for name, images in sets.items()
        if name not in ("train", "calibration")
    }
    told = surprise(found["fit"])
    for method, parts in PARTS.items():
        joined = forward.fitted(planned("image", None, None, parts), found["fit"])
        scores = {name: joined.score(it) for name, it in found.items() if name != "fit"}
        yield {"model": model, "method": method, **told} | protocol.with_mean(aurocs(scores))


def surprise(held_out: Measurements) -> dict[str, float | None]:
    """The mean of the sample's whole surprise in its standard deviations, and of how far it is off.

    Near 0 a model is right about how unlikely its data are: it knows them.
    """
    table = held_out.tables["values"]
    columns = [i for i, name in enumerate(table.names) if name.endswith(".surprise")]
    if not columns:
        return {"surprise": None}
    whole = table.values[:, columns].sum(1)
    return {"surprise": round(float(np.mean(whole) / np.std(whole)), 3)}


def gains(rows: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """By model and training set: what the part adds to each set's AUROC."""
    by = {(row["on"], row["model"], row["method"]): row["auroc"] for row in rows}
    return {
        (on, model): {
            name: round(value - by[on, model, DEFAULT][name], 4)
            for name, value in by[on, model, LOW].items()
        }
        for on, model, method in by
        if method == LOW
    }


def claims(rows: list[Row]) -> list[Row]:
    """What it costs, and adds, on average and at worst."""
    every = [value for found in gains(rows).values() for value in found.values()]
    return [
        claim("the most that low likelihood as one more part costs a set", -min(every), MOST),
        claim("what it costs on average", round(-statistics.mean(every), 4), 0.0),
    ]


def full(data: Path) -> Iterator[Row]:
    for on in zoo.TRAINED_ON:
        sets = protocol.sets(data, on, SIZES)
        for model in forward.MODELS:
            watched = zoo.zoo()[model]
            module, _ = zoo.load(watched, zoo.weights_file(on, model))
            for row in rows_of(model, watched, module.eval(), sets):
                yield {"on": on} | row


def quick() -> Iterator[Row]:
    sets = protocol.digits()
    for model, watched, module, _ in zoo.trained_tiny(sets["train"]):
        if model in forward.MODELS:
            for row in rows_of(model, watched, module, sets):
                yield {"on": "digits"} | row


def line(row: Row) -> str:
    each = "  ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    told = f"{row['on']:14}{row['model']:9}{row['method']:26}surprise {row['surprise']}"
    return f"{told}  {each}  mean {row['mean']:.4f}"


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.SOURCES)
    rows = quick() if quick_run else full(data_dir)
    reported(rows, line, claims, output, command="python -m benchmarks.detection.known_data")


if __name__ == "__main__":
    typer.run(main)
