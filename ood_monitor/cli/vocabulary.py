"""What tokens are called, by a file: the vocabulary of a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ood_monitor.cli.files import open_regular

__all__ = ["Vocabulary"]

#: Of a file, at most: the largest vocabularies have some tens of megabytes.
_MOST_BYTES = 2**28

#: What marks the beginning of a word, in the vocabularies of SentencePiece and of bytes.
_WORD = ("▁", "Ġ")

#: What marks a piece that goes on with a word, in BERT's.
_GOES_ON = "##"


class Vocabulary:
    """Tokens by their numbers.

    Args:
        tokens: What each is called.
    """

    def __init__(self, tokens: Mapping[int, str]) -> None:
        self._tokens = tokens
        has_pieces = any(token.startswith(_GOES_ON) for token in tokens.values())
        has_marks = any(token.startswith(_WORD) for token in tokens.values())
        are_letters = all(len(token) < 2 for token in tokens.values() if not _is_special(token))
        self._are_apart = has_pieces or not (has_marks or are_letters)

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """From a text with a token a line, from number 0 on, or from a tokenizer's JSON.

        JSON is a `tokenizer.json` of Hugging Face's, or an object of names with their numbers.

        Raises:
            OSError: There is none.
            ValueError: It is neither.
        """
        with open_regular(path, _MOST_BYTES) as file:
            text = file.read().decode("utf-8", "replace")
        if path.suffix != ".json":
            # A token may itself be what splits lines elsewhere.
            lines = text.removesuffix("\n").split("\n")
            return cls({number: line.removesuffix("\r") for number, line in enumerate(lines)})
        try:
            return cls(_numbered(json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"Expected a tokenizer.json, or an object of tokens with their numbers, in {path}, "
                f"got something else ({type(error).__name__}: {error})."
            ) from error

    def spelled(self, numbers: Tensor) -> list[str]:
        """A text's tokens, (T,), as they are read one after the other.

        A number without a token is said as such.
        """
        return [self._spelled(number) for number in numbers.tolist()]

    def _spelled(self, number: int) -> str:
        token = self._tokens.get(number, f"[{number}]")
        if token.startswith(_GOES_ON):
            return token.removeprefix(_GOES_ON)
        if token.startswith(_WORD):
            return f" {token[1:]}"
        return f" {token}" if self._are_apart else token


def _is_special(token: str) -> bool:
    return token[:1] + token[-1:] in ("<>", "[]")


def _numbered(found: Any) -> dict[int, str]:
    """Tokens by number, of what a tokenizer's JSON holds."""
    if not isinstance(found.get("model"), dict):  # which may be a token's name
        return {_number(number): str(token) for token, number in found.items()}
    known = found["model"]["vocab"]
    if isinstance(known, list):  # SentencePiece's, each with its log-probability
        tokens = {number: str(token) for number, (token, _) in enumerate(known)}
    else:
        tokens = {_number(number): str(token) for token, number in known.items()}
    added = found.get("added_tokens", [])
    return tokens | {_number(each["id"]): str(each["content"]) for each in added}


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"Expected a token's number, got {value!r}.")
    return value
