"""Text in and out of distribution, as windows of bytes, with no byte that gives a set away."""

import inspect
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pydoc_data import topics
from typing import TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

LENGTH = 128

MISSING = """{path} is missing: a file of arrays of bytes (uint8), train, test, ood_german,
ood_italian and ood_python_code. To make it,
  train, test       the first 90 % and the last 10 % of
                    https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
  ood_german        500 kB of any German text in UTF-8, such as Debian's package fortunes-de
  ood_italian       the same in Italian, fortunes-it
  ood_python_code   500 kB of Python's standard library
and write it by `np.savez_compressed(path, train=np.frombuffer(text, np.uint8), ...)`. `--quick`
needs no file."""


@dataclass(frozen=True)
class Counts:
    """How many windows to fit and calibrate on, and to test on, of each set."""

    held_out: int
    test: int
    ood: int


@dataclass(frozen=True)
class Texts:
    """In-distribution text for training and for testing, and out-of-distribution text by name."""

    train: bytes
    test: bytes
    others: Mapping[str, bytes]


@dataclass(frozen=True)
class Samples:
    """Windows (N, 128): to fit and calibrate on, in distribution, out of it by name; all bytes.

    ``held_out`` is of the training text, and no part of it was trained on.
    """

    held_out: Bytes
    test: Bytes
    ood: Mapping[str, Bytes]


def stored_texts(folder: Path) -> Texts:
    path = folder / "text_bytes.npz"
    if not path.exists():
        typer.echo(MISSING.format(path=path), err=True)
        raise typer.Exit(2)
    with np.load(path) as arrays:
        texts = {name: bytes(arrays[name]) for name in arrays.files}
    others = {
        "German": texts["ood_german"],
        "Italian": texts["ood_italian"],
        "Python code": texts["ood_python_code"],
    }
    return Texts(texts["train"], texts["test"], others)


def shipped_texts() -> Texts:
    """Python's language reference as in-distribution text, its standard library as the other."""
    text = "\n".join(topics.topics.values()).encode()
    cut = len(text) * 9 // 10
    modules = ("argparse", "ast", "inspect", "tarfile")
    code = "\n".join(inspect.getsource(import_module(name)) for name in modules)
    return Texts(text[:cut], text[cut:], {"Python code": code.encode()})


def in_alphabet(text: bytes, alphabet: bytes) -> bytes:
    """The text in bytes of the alphabet: no accents, and a space for what remains outside of it."""
    decoded = text.decode("utf-8", errors="ignore").replace("ß", "ss")
    ascii_only = unicodedata.normalize("NFKD", decoded).encode("ascii", "ignore")
    return ascii_only.translate(bytes(b if b in alphabet else ord(" ") for b in range(256)))


def without_layout(text: bytes) -> bytes:
    """No indentation, no run of spaces, and at most one empty line."""
    lines = re.sub(rb" ?\n ?", b"\n", re.sub(rb" +", b" ", text))
    return re.sub(rb"\n{3,}", b"\n\n", lines)


def windows(text: bytes, count: int, generator: np.random.Generator) -> Bytes:
    """Non-overlapping windows (count, 128) in random order: neighbours in a text are alike."""
    whole = np.frombuffer(text, np.uint8)[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if len(whole) < count:
        raise ValueError(f"Expected text of {count} windows of {LENGTH} bytes, got {len(whole)}.")
    return whole[generator.permutation(len(whole))[:count]]


def shuffled_words(window: Bytes, generator: np.random.Generator) -> Bytes:
    """The same words in random order, with the white space where it was.

    The window cuts the first and the last, so these stay: half a word would be a new one elsewhere.
    """
    pieces = re.split(rb"(\s+)", window.tobytes())
    words = np.array(pieces[2:-2:2], dtype=object)
    pieces[2:-2:2] = list(generator.permutation(words))
    return np.frombuffer(b"".join(pieces), np.uint8)


def upper_case(window: Bytes) -> Bytes:
    return np.frombuffer(window.tobytes().upper(), np.uint8)


def samples(texts: Texts, held_out: bytes, counts: Counts, seed: int) -> Samples:
    """Held-out training text comes apart from ``texts.train``, which gives the alphabet."""
    generator = np.random.default_rng(seed)
    alphabet = bytes(sorted(set(texts.train)))
    others = {name: in_alphabet(text, alphabet) for name, text in texts.others.items()}
    ood = {
        name: windows(without_layout(text), counts.ood, generator) for name, text in others.items()
    }
    ood["Python code, indented"] = windows(others["Python code"], counts.ood, generator)
    # What is made of test windows is made of others than those it is compared with.
    test = windows(texts.test, counts.test + counts.ood, generator)
    rest = test[counts.test :]
    ood["words shuffled"] = np.stack([shuffled_words(window, generator) for window in rest])
    ood["characters reversed"] = rest[:, ::-1].copy()
    ood["upper case"] = np.stack([upper_case(window) for window in rest])
    return Samples(windows(held_out, counts.held_out, generator), test[: counts.test], ood)
