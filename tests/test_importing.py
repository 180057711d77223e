"""Which functions a text may name."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

import ood_monitor as om
from ood_monitor.importing import check_name, importable_here, imported, is_name

NO_NAMES = [
    "", ":", "module", "module:", ":function", "a..b:f", ".a:f", "a.:f", "..a:f", "a:f:g", "a:b.c",
    "a/b:f", "../a:f", "a b:f", "a:f()", "a:f; g", "class:f", "a.import:f", "a:1", "a-b:f", None, 3,
]  # fmt: skip


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_names_no_function_is_refused(text: object) -> None:
    assert not is_name(text)
    with pytest.raises(ValueError, match=r"Expected a function as 'package.module:function', got"):
        imported(text, om.Adapter)


@pytest.mark.parametrize("name", ["os:getcwd", "os.path:join", "builtins:print", "this:s"])
def test_pythons_own_library_is_refused_before_it_is_imported(name: str) -> None:
    assert is_name(name)
    with pytest.raises(ValueError, match=f"got '{name}' of Python's own library"):
        check_name(name)
    assert "this" not in sys.modules


def test_the_running_program_is_refused() -> None:
    with pytest.raises(ValueError, match="of the program that is running"):
        imported("__main__:f", om.Adapter)


MODULE = """
from __future__ import annotations
from collections.abc import Sequence
from typing import Any, Optional
import torch
import ood_monitor as om

number = 3
class Own(om.LogLikelihood): ...
class Other: ...
def base() -> om.Adapter: ...
def derived() -> om.LogLikelihood: ...
def own() -> Own: ...
def union() -> Own | om.ELBO: ...
def nothing(): ...
def any_() -> Any: ...
def optional() -> Optional[om.Adapter]: ...
def unknown() -> Missing: ...
def other() -> Other: ...
def tensor() -> torch.Tensor: ...
def texts() -> list[str]: ...
def either() -> torch.Tensor | Sequence[int]: ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "named_functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "named_functions", raising=False)
    return "named_functions"


@pytest.mark.parametrize("name", ["base", "derived", "own", "union", "Own"])
def test_a_function_that_says_that_it_returns_an_adapter_is_taken(name: str, module: str) -> None:
    with importable_here():
        assert imported(f"{module}:{name}", om.Adapter).__name__ == name


@pytest.mark.parametrize(
    "name",
    ["nothing", "any_", "optional", "unknown", "other", "Other", "tensor", "texts", "number"],
)
def test_another_function_is_refused(name: str, module: str) -> None:
    with importable_here(), pytest.raises(TypeError, match=rf"{module}:{name}\b"):
        imported(f"{module}:{name}", om.Adapter)


@pytest.mark.parametrize(
    ("name", "is_taken"), [("tensor", True), ("texts", True), ("either", True), ("base", False)]
)
def test_other_classes_may_be_asked_for(name: str, is_taken: bool, module: str) -> None:
    with importable_here():
        if is_taken:
            imported(f"{module}:{name}", Tensor, Sequence)
            return
        with pytest.raises(TypeError, match=r"-> torch.Tensor \| collections.abc.Sequence"):
            imported(f"{module}:{name}", Tensor, Sequence)


@pytest.mark.parametrize("name", ["named_functions:gone", "no_such_package:f", "torch.gone:f"])
def test_what_is_not_there_is_told(name: str, module: str) -> None:
    with importable_here(), pytest.raises(ValueError, match=f"Expected '{name}' to be importable"):
        imported(name, om.Adapter)
