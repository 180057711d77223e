"""`ood-monitor score`: a row for each sample."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ood_monitor.calibration.scores import Scores
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts, say
from ood_monitor.cli.data import Samples, readable
from ood_monitor.cli.models import Model
from ood_monitor.cli.options import Data, Directory, Fpr, Scoring, asking_for_scoring
from ood_monitor.cli.tables import check_output, rows_of, table
from ood_monitor.detector.detector import Detector
from ood_monitor.monitor.scoring import scored as scored_alone

__all__ = ["score", "scored"]


@checked
@asking_for_scoring
def score(
    directory: Directory,
    data: Data,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .csv, .jsonl or .parquet file; JSON lines on stdout by default.",
        ),
    ] = None,
    fpr: Fpr = 0.01,
    *,
    scoring: Scoring,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Score samples: a row for each, with its p-value and whether it is flagged.

    Columns: id (the file, or the number), score (higher = more anomalous), p_value,
    log_likelihood (nats), flagged (p_value <= fpr), valid (false for one that cannot be read or
    scored), top_layer and top_z (the layer furthest from what is usual, in standard deviations),
    group (of a detector with groups), fpr (by which it is flagged).

    \b
    Example:
        ood-monitor score runs/detector data/new --output scores.csv
    """
    if as_json and output is None:
        raise ValueError("Expected `--output` beside `--json`: stdout has the rows without it.")
    if output is not None:
        check_output(output)
    detector, model, recipe = scoring.detector(directory)
    detector.fitted.check_fpr(fpr)
    source, size = scoring.samples(data, recipe), scoring.batch_size
    counts = {"samples": 0, "flagged": 0, "invalid": 0}
    with table(output) as write:
        for ids, scores in scored(detector, model, source, size, progress=scoring.shows_progress):
            rows = rows_of(ids, scores, fpr)
            write(rows)
            counts["samples"] += len(rows)
            counts["flagged"] += sum(row.flagged for row in rows)
            counts["invalid"] += sum(not row.valid for row in rows)
    _summarise(counts, output, fpr, as_json=as_json)


def scored(
    detector: Detector, model: Model, source: Samples, batch_size: int, *, progress: bool
) -> Iterator[tuple[Sequence[str], Scores]]:
    """Names and scores of all samples by batch; nan for those that cannot be read or scored."""
    count = len(source.ids)
    with tqdm(total=count, desc="scoring", unit="sample", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            samples, reasons = readable(source, indices)
            for reason in reasons.values():
                say(f"unreadable: {reason}")
            yield [source.ids[i] for i in indices], scored_alone(detector, model.batch(samples))
            bar.update(len(indices))


def _summarise(counts: dict[str, int], output: Path | None, fpr: float, *, as_json: bool) -> None:
    if as_json:
        print_facts(counts | {"fpr": fpr, "output": str(output)}, as_json=True)
        return
    say(
        f"{counts['samples']:,} samples, {counts['flagged']:,} flagged at fpr {fpr:g}, "
        f"{counts['invalid']:,} not scored"
        + (f"; written to {output}." if output is not None else ".")
    )
