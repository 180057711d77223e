r"""Names from elsewhere on their way out: of files, samples, streams and layers, by destination.

A name is anybody's text. Each function makes it one that its destination shows and never acts on,
and that is valid UTF-8. What cannot be shown is written as Python writes it, ``\x1b``; a name
without any such character stays as it is where the destination allows.
"""

import html as _html
import re
from collections.abc import Iterable

__all__ = ["csv_cell", "csv_text", "html", "markdown_code", "markdown_text", "terminal", "utf8"]

#: With these a spreadsheet begins a formula; the wide ones are taken for the narrow ones.
_FORMULA = frozenset("=+-@＝＋－＠")

#: What marks a cell as text, for people and for :func:`csv_text`.
_QUOTE = "'"

#: Characters that end a span of code, begin HTML or a cell of a table, or escape others.
_NOT_IN_CODE = frozenset("`<>|\\")

#: Characters that Markdown acts on within a line, by their numbers in its text.
_NUMBERED = {c: f"&#{ord(c)};" for c in "\\`*_{}[]<>#|~$&"}

#: What Markdown makes an address of without being asked.
_ADDRESS = re.compile(r":(?=//)|(?<=www)\.|@", re.IGNORECASE)

_NAME_LENGTH, _TEXT_LENGTH = 160, 1500


def utf8(text: str) -> str:
    """Text as any encoder takes it; half a pair of surrogates, as of a file's bytes, is written.

    JSON, MLflow, Prometheus and Parquet escape the rest by themselves.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def terminal(text: str) -> str:
    """One line for a terminal, a log or a figure: no control characters, no change of direction."""
    return "".join(map(_visible, text))


def csv_cell(text: str) -> str:
    """One line of a cell that no spreadsheet takes for a formula; :func:`csv_text` reads it.

    A text that begins with ``=``, ``+``, ``-`` or ``@``, after any spaces, gets ``'`` before it,
    and so does one that begins with ``'``. It is for texts: a number is written as a number.
    """
    line = terminal(text)  # a line break would also begin a row, in what does not quote it
    is_marked = line.startswith(_QUOTE) or line.lstrip(" ")[:1] in _FORMULA
    return f"{_QUOTE}{line}" if is_marked else line


def csv_text(cell: str) -> str:
    """What :func:`csv_cell` was given, as it can be shown."""
    return cell.removeprefix(_QUOTE)


def markdown_code(name: str) -> str:
    """A name as a span of code: no link, no HTML, no comment.

    Of a long one its last 160 characters, after an ellipsis.
    """
    shown = [_backslashed(c) if c in _NOT_IN_CODE else _visible(c) for c in name or " "]
    return f"`{_within(reversed(shown), _NAME_LENGTH, from_end=True)}`"


def markdown_text(text: str) -> str:
    """A sentence as a paragraph without markup, 1 500 characters at most.

    An address is no link: it is written ``http[:]//``.
    """
    line = _ADDRESS.sub(lambda found: f"[{found[0]}]", " ".join(text.split()))
    shown = [_NUMBERED.get(c) or _visible(c) for c in line]
    if line and not line[0].isalpha():  # which may begin a list, or underline a heading
        shown[0] = f"&#{ord(line[0])};" if line[0].isprintable() else shown[0]
    return _within(shown, _TEXT_LENGTH)


def html(text: str) -> str:
    """Text for an element or a quoted attribute of a page; line breaks stay."""
    return _html.escape("".join(c if c == "\n" else _visible(c) for c in text))


def _visible(character: str) -> str:
    """The character, or its name in Python if it cannot be seen or turns what is around it."""
    return character if character.isprintable() else _backslashed(character)


def _backslashed(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else character.encode("unicode_escape").decode()


def _within(parts: Iterable[str], length: int, *, from_end: bool = False) -> str:
    """As many parts as have room, whole, with … for the others."""
    kept: list[str] = []
    room = length
    for part in parts:
        room -= len(part)
        if room < 0:
            kept.append("…")
            break
        kept.append(part)
    return "".join(reversed(kept) if from_end else kept)
