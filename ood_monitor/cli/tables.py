"""Scores as rows of a table: csv, JSON lines, parquet."""

import csv
import importlib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from ood_monitor.calibration.scores import Scores
from ood_monitor.cli.files import open_regular
from ood_monitor.escaping import csv_cell, csv_text, utf8

__all__ = ["Row", "Write", "check_output", "read_rows", "rows_of", "table"]

_SUFFIXES = (".csv", ".jsonl", ".parquet")

#: Fields that are texts, which others chose.
_TEXTS = ("id", "top_layer")

#: Of a file that is read, at most: bytes, in memory too, and rows.
_MOST_BYTES, _MOST_ROWS = 2**30, 10_000_000


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
        group: Its group, as :class:`~ood_monitor.Scores` has it; None of a detector without.
        fpr: The false-positive rate by which it is flagged; None in files of before it was written.
    """

    id: str
    score: float | None
    p_value: float | None
    log_likelihood: float | None
    flagged: bool
    valid: bool
    top_layer: str | None
    top_z: float | None
    group: int | None = None
    fpr: float | None = None


#: Takes rows.
Write = Callable[[Sequence[Row]], None]


def rows_of(ids: Sequence[str], scores: Scores, fpr: float) -> list[Row]:
    """A row for each sample."""
    names, z = _furthest(scores)
    groups = [None] * len(ids) if scores.group is None else scores.group.tolist()
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
            group=groups[i],
            fpr=fpr,
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
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
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
    except OSError:
        raise
    except Exception as error:  # pyarrow's, csv's and json's of anybody's file
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected what `score` wrote in {path}, got {cause}.") from error


def _writer(suffix: str, path: Path, stack: ExitStack) -> Write:
    if suffix == ".parquet":
        return _parquet_writer(path, stack)
    # A file of our own: what has that name already, a link perhaps, is not written to.
    file = stack.enter_context(path.open("x", encoding="utf-8", newline=""))
    if suffix == ".jsonl":
        return lambda rows: _write_lines(file, rows)
    sheet = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    sheet.writeheader()
    return lambda rows: sheet.writerows([_record(row, csv_cell) for row in rows])


def _record(row: Row, escape: Callable[[str], str] = utf8) -> dict[str, Any]:
    """The row by column, with texts as their destination takes them."""
    record = asdict(row)
    texts = {k: escape(record[k]) for k in _TEXTS if record[k] is not None}
    return record | texts


def _write_lines(file: IO[str], rows: Sequence[Row]) -> None:
    file.writelines(json.dumps(_record(row), allow_nan=False) + "\n" for row in rows)


def _parquet_writer(path: Path, stack: ExitStack) -> Write:
    arrow, parquet = _pyarrow()
    text, truth, number = arrow.string(), arrow.bool_(), arrow.float64()
    kinds = dict.fromkeys(_TEXTS, text) | {"flagged": truth, "valid": truth}
    kinds["group"] = arrow.int64()
    schema = arrow.schema([(field.name, kinds.get(field.name, number)) for field in fields(Row)])
    file = stack.enter_context(path.open("xb"))
    writer = stack.enter_context(parquet.ParquetWriter(file, schema))

    def write(rows: Sequence[Row]) -> None:
        writer.write_table(arrow.Table.from_pylist([_record(row) for row in rows], schema))

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
    with open_regular(path, _MOST_BYTES) as file:
        if path.suffix == ".parquet":
            return _of_parquet(file)
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        if path.suffix == ".csv":
            return [_of_csv(row) for row in csv.DictReader(text)]
        return [json.loads(line) for line in text if line.strip()]


def _of_csv(row: dict[str, Any]) -> dict[str, Any]:
    texts = {k: csv_text(row[k]) for k in _TEXTS}
    return {k: v or None for k, v in (row | texts).items()} | {"id": texts["id"]}


def _of_parquet(file: BinaryIO) -> list[dict[str, Any]]:
    """The columns of a row, if they are as small as a file of so many rows can be."""
    table = _pyarrow()[1].ParquetFile(file)
    said = table.metadata
    size = sum(said.row_group(i).total_byte_size for i in range(said.num_row_groups))
    if said.num_rows > _MOST_ROWS or size > _MOST_BYTES:
        raise ValueError(
            f"at most {_MOST_ROWS:,} rows of {_MOST_BYTES:,} bytes are read, it has "
            f"{said.num_rows:,} of {size:,}"
        )
    rows: list[dict[str, Any]] = table.read(
        [field.name for field in fields(Row) if field.name in table.schema_arrow.names]
    ).to_pylist()
    return rows


def _parsed(record: dict[str, Any]) -> Row:
    numbers = ("score", "p_value", "log_likelihood", "top_z")
    values = {k: None if record[k] is None else _finite(record[k]) for k in numbers}
    flags = {k: str(record[k]) in ("True", "true") for k in ("flagged", "valid")}
    # Files of before they were written have neither a rate nor a group.
    values["fpr"] = None if record.get("fpr") is None else _finite(record["fpr"])
    values["group"] = None if record.get("group") is None else int(record["group"])
    top = record["top_layer"]
    return Row(id=str(record["id"]), top_layer=top, **values, **flags)  # type: ignore[arg-type]


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r}, which `score` leaves out")
    return number


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
