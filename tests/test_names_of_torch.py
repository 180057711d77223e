"""Each name of torch that our code writes out is there, in the oldest release that we support too.

Some stand on paths that few runs take, such as the handling of an accelerator's error. What only
later releases have is asked for by `getattr`.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def chain(node: ast.expr) -> list[str]:
    """Of `torch.nn.Linear` its words; nothing of another expression."""
    words = []
    while isinstance(node, ast.Attribute):
        words.append(node.attr)
        node = node.value
    return [node.id, *reversed(words)] if isinstance(node, ast.Name) else []


def named(code: str) -> Iterator[list[str]]:
    """The names of torch in a module, and what it imports from there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ([*str(node.module).split("."), each.name] for each in node.names)
        elif isinstance(node, ast.Attribute) and chain(node)[:1] == ["torch"]:
            yield chain(node)


def is_there(words: list[str]) -> bool:
    """Whether modules and classes have the name; what objects have is not asked."""
    found = torch
    for number, word in enumerate(words[1:], 2):
        if not isinstance(found, type(torch) | type):
            return True
        if not hasattr(found, word):
            try:
                importlib.import_module(".".join(words[:number]))
            except ImportError:
                return False
        found = getattr(found, word)
    return True


def test_names_of_torch_are_there() -> None:
    files = [
        file
        for folder in ("ood_monitor", "integrations")
        for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    names = {".".join(words) for file in files for words in named(file.read_text())}
    assert len(names) > 100
    assert [name for name in sorted(names) if not is_there(name.split("."))] == []


def test_a_name_that_is_not_there_is_found() -> None:
    code = "from torch.nn import Lineal\nimport torch\ntorch.nn.functional.relu\ntorch.zeroes(1).x"
    found = [".".join(words) for words in named(code) if not is_there(words)]
    assert sorted(found) == ["torch.nn.Lineal", "torch.zeroes"]
