"""The paper's statements that no other benchmark measures, on the committed models.

By part: `norms`, which are larger on foreign data, which density of them detects what, and which
layers; `influence`, what a step on a sample changes; `flatness`, what disturbed parameters do;
`fisher`, the Fisher information metric itself; `sizes`, flows by depth, width and training images,
trained here. `docs/paper.md` answers each statement by these and the other results. A part of a
model is kept in a folder as soon as it is measured, so that a run that was interrupted goes on. A
full run takes forty minutes on one core.

    python -m benchmarks.detection.statements --data-dir FOLDER \
        --json benchmarks/results/statements.json
"""

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from benchmarks.detection import (
    datasets,
    paper,
    protocol,
    statements_fisher,
    statements_norms,
    statements_sizes,
    statements_steps,
    zoo,
)
from benchmarks.detection.answers import counts, table_of, where
from benchmarks.detection.methods import PAPER
from benchmarks.detection.paper import Case
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.statements_norms import TYPICALITY
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]
Make = Callable[[], Iterable[Row]]

FEW_STEPS = statements_steps.Counts(known=15, foreign=6, others=5, draws=2)
#: Of a UNet, which in double precision takes ten times the time of a flow.
OF_UNET = statements_steps.Counts(known=40, foreign=12, others=10, draws=5)
FEW_GRADIENTS = statements_fisher.Counts(fit=40, held_out=30, test=30, foreign=10)


#: Of whose models norms alone are measured: the other parts take as long again.
NORMS_ALONE = "MNIST"


def parts_of(case: Case, *, quick: bool = False) -> dict[str, Make]:
    """What is measured of a model, by part."""
    steps = OF_UNET if case.model == "UNet" else statements_steps.Counts()
    steps = FEW_STEPS if quick else steps
    fisher = FEW_GRADIENTS if quick else statements_fisher.Counts()
    norms: dict[str, Make] = {"norms": functools.partial(statements_norms.rows_of, case)}
    if case.on == NORMS_ALONE:
        return norms
    return norms | {
        "influence": functools.partial(statements_steps.influence, case, steps),
        "flatness": functools.partial(statements_steps.flatness, case, steps),
        "fisher": functools.partial(statements_fisher.rows_of, case, fisher),
    }


def kept(file: Path, make: Make) -> list[Row]:
    """Rows of a file, else what is measured, kept there."""
    if not file.exists():
        rows = list(make())
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".part")
        whole.write_text(json.dumps(rows))
        whole.rename(file)
    found: list[Row] = json.loads(file.read_text())
    return found


def rows_of(cases: Iterable[Case], sizes: Make, folder: Path, *, quick: bool) -> Iterator[Row]:
    """Norms of all models first, which most statements need."""
    parts = {(case.on, case.model): parts_of(case, quick=quick) for case in cases}
    for of_norms in (True, False):
        for (on, model), makes in parts.items():
            for part, make in makes.items():
                if (part == "norms") is of_norms:
                    rows = kept(folder / f"{part}-{on}-{model}.json", make)
                    yield from ({"on": on, "model": model} | row for row in rows)
        if of_norms:
            yield from kept(folder / "sizes.json", sizes)


def full(data: Path, folder: Path) -> Iterator[Row]:
    on = "Fashion-MNIST"

    def sizes() -> Iterator[Row]:
        images, _ = zoo.training_images(data, on)
        sets = protocol.sets(data, on, Sizes(fit=400, test=200, ood=100))
        return statements_sizes.rows_of(on, images, sets, statements_sizes.Plan())

    yield from rows_of(paper.cases(data), sizes, folder, quick=False)


def quick_rows(folder: Path) -> Iterator[Row]:
    sets = protocol.digits()
    images = sets.pop("train")
    make = functools.partial(
        statements_sizes.rows_of, "digits", images, sets, statements_sizes.QUICK
    )
    yield from rows_of(paper.quick_cases(), make, folder, quick=True)


def line(row: Row) -> str:
    return "  ".join(f"{name} {value}" for name, value in row.items())


# What is claimed.


def every(rows: Iterable[Row], column: str) -> list[float]:
    """The values of a column of mappings."""
    return [value for row in rows for value in row[column].values()]


def mean_of_form(rows: Iterable[Row], form: str) -> float:
    """The mean AUROC of a quadratic form over models."""
    return statistics.mean(r["mean"] for r in where(rows, part="fisher", form=form))


def claims(rows: list[Row]) -> list[Row]:
    """The paper's statements as figures that are at most a target."""
    paper, typicality = (table_of({"statements": rows}, name) for name in (PAPER, TYPICALITY))
    better, _, worse = counts(paper, typicality)
    shares = every(where(rows, part="larger"), "median")
    ranks = [r["rank correlation"]["others"]["all"] for r in where(rows, part="influence")]
    flat = every(where(rows, part="flatness"), "foreign to known")
    full, norms = (mean_of_form(rows, name) for name in ("full, damping 1", "norms by layer"))
    return [
        claim(
            "B = 1: pairs where typicality is above the paper's score, less the others",
            worse - better,
            0,
        ),
        claim(
            "1 - mean share of layers that are larger on foreign data",
            round(1 - statistics.mean(shares), 3),
            0.5,
        ),
        claim(
            "1 - median rank correlation of norm and change of others",
            round(1 - statistics.median(ranks), 3),
            0.5,
        ),
        claim(
            "share of cases in which known data change more by a disturbance",
            round(statistics.mean(v < 1 for v in flat), 3),
            0.1,
        ),
        claim(
            "mean AUROC of the Fisher metric less that of norms by layer",
            round(full - norms, 4),
            0.0,
        ),
    ]


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    folder: Annotated[
        Path, typer.Option(help="Where rows are kept; delete to measure anew.")
    ] = Path("runs/statements"),
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick:
        datasets.require(data_dir, datasets.SOURCES)
        reported(full(data_dir, folder), line, claims, output, sizes=vars(Sizes()))
        return
    with TemporaryDirectory() as temporary:
        reported(quick_rows(Path(temporary)), line, claims, output)


if __name__ == "__main__":
    typer.run(main)
