"""Scores as rows of a table: csv, JSON lines, parquet."""

import csv
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch

from ood_monitor.calibration.scores import Scores

__all__ = ["Row", "Write", "check_output", "read_rows", "rows_of", "table"]

_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        id: The file, or the number of the sample.
        score: Higher = more anomalous; None for one that could not be scored.
        p_value: Conformal.
        log_likelihood: Nats.
        flagged: Whether the p-value is at most the false-positive rate.
        valid: Whether it could be scored.
        top_layer: The layer furthest from what is usual.
        top_z: How far, in standard deviations.
    """

    id: str
    score: float | None
    p_value: float | None
    log_likelihood: float | None
    flagged: bool
    valid: bool
    top_layer: str | None
    top_z: float | None


#: Takes rows.
Write = Callable[[Sequence[Row]], None]


def rows_of(ids: Sequence[str], scores: Scores, fpr: float) -> list[Row]:
    """A row for each sample."""
    names, z = _furthest(scores)
    columns = (scores.score, scores.p_value, scores.log_likelihood)
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Row(
            id=ids[i],
            score=_number(score),
            p_value=_number(p_value),
            log_likelihood=_number(log_likelihood),
            flagged=p_value <= fpr,
            valid=bool(scores.valid[i]),
            top_layer=names[i],
            top_z=_number(z[i]),
        )
        for i, (score, p_value, log_likelihood) in enumerate(values)
    ]


def check_output(path: Path) -> None:
    """Refuse a file that no table can be written to, before hours of scoring.

    Raises:
        ValueError: Its name ends in nothing known.
        FileNotFoundError: Its folder is missing.
        ImportError: Parquet without pyarrow.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"Expected a file ending in {', '.join(_SUFFIXES)}, got {path}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected the folder {path.parent} to write {path.name} to.")
    if path.suffix == ".parquet":
        _pyarrow()


@contextmanager
def table(path: Path | None) -> Iterator[Write]:
    """A writer of rows: to a file by its ending, whole or not at all, or JSON lines on stdout."""
    if path is None:
        yield lambda rows: _write_lines(sys.stdout, rows)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with ExitStack() as stack:
            yield _writer(path.suffix, partial, stack)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that :func:`table` wrote.

    Raises:
        ValueError: Another file.
    """
    check_output(path)
    try:
        return [_parsed(record) for record in _records(path)]
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected what `score` wrote in {path}, got {cause}.") from error


def _writer(suffix: str, path: Path, stack: ExitStack) -> Write:
    if suffix == ".parquet":
        return _parquet_writer(path, stack)
    file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
    if suffix == ".jsonl":
        return lambda rows: _write_lines(file, rows)
    sheet = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    sheet.writeheader()
    return lambda rows: sheet.writerows([asdict(row) for row in rows])


def _write_lines(file: IO[str], rows: Sequence[Row]) -> None:
    file.writelines(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)


def _parquet_writer(path: Path, stack: ExitStack) -> Write:
    arrow, parquet = _pyarrow()
    text, truth, number = arrow.string(), arrow.bool_(), arrow.float64()
    kinds = {"id": text, "top_layer": text, "flagged": truth, "valid": truth}
    schema = arrow.schema([(field.name, kinds.get(field.name, number)) for field in fields(Row)])
    file = stack.enter_context(parquet.ParquetWriter(path, schema))

    def write(rows: Sequence[Row]) -> None:
        file.write_table(arrow.Table.from_pylist([asdict(row) for row in rows], schema))

    return write


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ImportError(
            "Expected pyarrow for .parquet: pip install 'ood-monitor[mlflow]', or use .csv or "
            ".jsonl."
        ) from error


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = _pyarrow()[1].read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]
        return [json.loads(line) for line in file if line.strip()]


def _parsed(record: dict[str, Any]) -> Row:
    numbers = ("score", "p_value", "log_likelihood", "top_z")
    values = {k: None if record[k] is None else float(record[k]) for k in numbers}
    flags = {k: str(record[k]) in ("True", "true") for k in ("flagged", "valid")}
    top = record["top_layer"]
    return Row(id=str(record["id"]), top_layer=top, **values, **flags)  # type: ignore[arg-type]


def _furthest(scores: Scores) -> tuple[list[str | None], list[float]]:
    """The layer of the largest deviation, and its z, of each sample."""
    count = len(scores.score)
    if not scores.z:
        return [None] * count, [math.nan] * count
    z = torch.stack(list(scores.z.values()), 1)
    at = z.abs().nan_to_num(nan=-1.0).argmax(1)
    names = list(scores.z)
    known = scores.valid.tolist()
    found: list[str | None] = [names[i] if ok else None for i, ok in zip(at, known, strict=True)]
    return found, z.gather(1, at[:, None])[:, 0].tolist()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
