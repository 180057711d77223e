"""Lines of a log: JSON with its checksum, so that damage is never taken for what was written.

A line is eight hexadecimal digits, the CRC-32 of what follows, a space, and one JSON object. Format
1 had none; its lines are read as they are. Every line stands for itself, so that a damaged one
costs no other.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMAT", "Content", "framed", "line_of", "read"]

FORMAT = 2
_OLD_HEAD = b'{"ood_monitor_spool": 1}'

#: Of a damaged line: a number that the log, when it is read, must not fall behind.
_NUMBER = re.compile(rb'"(?:latest|number)": (\d{1,18})\b')


@dataclass(frozen=True)
class Content:
    """What a log's file holds.

    Attributes:
        lines: Each line that is whole, with its record.
        damaged: The others, without their line ends.
        is_torn: Whether the last of these has no line end: a crash tears the last line only.
        is_current: Whether all of it is of this format, to its last line end.
        highest: The highest number that damaged lines tell of, 0 if none does.
    """

    lines: list[tuple[bytes, dict[str, Any]]]
    damaged: list[bytes]
    is_torn: bool
    is_current: bool
    highest: int


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line."""
    return framed(json.dumps(record).encode())


def framed(text: bytes) -> bytes:
    """The JSON of a record as a line."""
    return b"%08x %b\n" % (zlib.crc32(text), text)


def read(content: bytes) -> Content:
    """What a file holds, of this format or the one before.

    Raises:
        ValueError: It is of a newer release; the text says of which format.
    """
    *lines, rest = content.split(b"\n")
    is_old = bool(content) and _record(lines[0] if lines else rest, is_old=False) is None
    whole, damaged = [], []
    for line in filter(None, [*lines, rest]):
        record = _record(line, is_old=is_old)
        if record is None:
            damaged.append(line)
        else:
            whole.append((line, record))
    is_torn = bool(rest and damaged and damaged[-1] == rest)
    formats = {record.get("ood_monitor_spool", FORMAT) for _, record in whole}
    if newer := formats - {1, FORMAT}:
        raise ValueError(f"format {newer.pop()!r}")
    highest = max((int(n) for line in damaged for n in _NUMBER.findall(line)), default=0)
    is_current = bool(whole) and formats == {FORMAT} and not rest
    return Content(whole, damaged, is_torn, is_current, highest)


def _record(line: bytes, *, is_old: bool) -> dict[str, Any] | None:
    """What a line says, if it says what was written."""
    checksum, _, text = line.partition(b" ")
    if checksum == b"%08x" % zlib.crc32(text):  # of bytes: to a number, "A" would be "a"
        return _parsed(text)
    record = _parsed(line) if is_old else None
    is_head = record is not None and "ood_monitor_spool" in record
    return None if is_head and line != _OLD_HEAD else record


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
