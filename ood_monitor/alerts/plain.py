"""Records of plain numbers and words, whatever library theirs came from."""

import math
import operator

from ood_monitor.escaping import utf8

__all__ = ["check_word", "make_plain", "make_text", "make_whole"]


def make_plain(record: object, *names: str) -> None:
    """Make numbers of any library Python's own, and None of what JSON cannot carry."""
    for name in names:
        value = getattr(record, name)
        number = None if value is None else float(value)
        finite = number is not None and math.isfinite(number)
        object.__setattr__(record, name, number if finite else None)


def make_whole(record: object, *names: str) -> None:
    """Make whole numbers of any library Python's own.

    Raises:
        TypeError: One is no whole number.
    """
    for name in names:
        object.__setattr__(record, name, operator.index(getattr(record, name)))


def make_text(record: object, *names: str) -> None:
    """Make texts that are UTF-8, whatever a file or a stream was called."""
    for name in names:
        value = getattr(record, name)
        object.__setattr__(record, name, None if value is None else utf8(str(value)))


def check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    """Refuse a word that is none of those.

    Raises:
        ValueError: It is none.
    """
    if word not in words:
        raise ValueError(f"Expected {name} to be one of {', '.join(words)}, got {word!r}.")
