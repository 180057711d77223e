"""Tokens' names from a tokenizer's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ood_monitor.cli.vocabulary import Vocabulary

TEXT = torch.tensor([2, 0, 1, 9])


def spelled(folder: Path, content: Any, name: str = "tokenizer.json") -> list[str]:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Vocabulary.read(path).spelled(TEXT)


BYTES = {"ing": 0, "Ġun": 1, "read": 2}
ADDED = [{"id": 9, "content": "<end>"}]


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (BYTES, ["read", "ing", " un", "[9]"]),
        ({"model": {"vocab": BYTES}, "added_tokens": ADDED}, ["read", "ing", " un", "<end>"]),
        ({"model": {"vocab": [["ing", -1.0], ["▁un", -2.0], ["read", 0]]}}, ["read", "ing", " un"]),
        ({"##ing": 0, "un": 1, "read": 2}, [" read", "ing", " un", " [9]"]),
        ({"A": 0, "C": 1, "<cls>": 2}, ["<cls>", "A", "C", "[9]"]),
        ({"model": 0, "a": 1, "token": 2}, [" token", " model", " a", " [9]"]),
    ],
)
def test_tokens_are_read_one_after_the_other(content: Any, read: list[str], tmp_path: Path) -> None:
    assert spelled(tmp_path, content)[: len(read)] == read


def test_a_line_is_a_token_whatever_is_in_it(tmp_path: Path) -> None:
    """BERT's vocabulary has tokens that split lines elsewhere."""
    assert spelled(tmp_path, "a\u2028\r\n\nc\n", "vocab.txt")[:3] == [" c", " a\u2028", " "]


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "{", '{"a": "b"}', '{"model": {"vocab": [1]}}', '{"model": {"type": "BPE"}}'],
)
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a tokenizer\.json, or an object of tokens"):
        spelled(tmp_path, content)
