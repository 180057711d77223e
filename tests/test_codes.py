"""Every warning ends with a code, and every code says what to do."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from ood_monitor_integrations.training.failures import CODES as BY_KIND
from ood_monitor_integrations.training.failures import Failures, Kind
from typer.testing import CliRunner

from ood_monitor.cli import app
from ood_monitor.codes import AREAS, CODES, meaning_of

ROOT = Path(__file__).parents[1]
OURS = [
    file
    for folder in ("ood_monitor", "integrations/ood_monitor_integrations")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
CODE = re.compile(r"\bOOD\d{3}\b")


def test_codes_are_in_order_and_each_has_an_area() -> None:
    assert list(CODES) == sorted(CODES)
    assert {code[3] for code in CODES} == set(AREAS)
    assert all(CODE.fullmatch(code) for code in CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_code_says_what_to_do(code: str) -> None:
    meaning = CODES[code]
    assert not meaning.title.endswith(".")
    assert meaning.cause.endswith(".")
    assert meaning.do.endswith(".")
    result = CliRunner().invoke(app, ["guide", code.lower()])
    assert result.exit_code == 0
    assert meaning.do in result.output


def test_titles_are_unique() -> None:
    assert max(Counter(meaning.title for meaning in CODES.values()).values()) == 1


def test_another_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected code to be one at the end .* got 'OOD999'"):
        meaning_of("OOD999")


def warnings_in(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.AST]]:
    """Calls that warn, in either way, each with the innermost function that has it."""
    inside: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(tree):  # from the outside in
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(dict.fromkeys(ast.walk(node), node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_warning(ast.unparse(node.func)):
            yield node, inside.get(node, tree)


def is_warning(function: str) -> bool:
    levels = "warning|error|exception|critical|log"
    return function == "warnings.warn" or bool(re.fullmatch(rf"_log\.({levels})", function))


def codes_in(node: ast.AST) -> set[str]:
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return {code for text in texts if isinstance(text, str) for code in CODE.findall(text)}


def lacking(code: str) -> list[int]:
    """Lines of warnings that name no code, neither in the call nor in a variable's text."""
    found = []
    for call, function in warnings_in(ast.parse(code)):
        named = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
        given = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            and {ast.unparse(target) for target in node.targets} & named
        ]
        if not any(map(codes_in, [call, *given])):
            found.append(call.lineno)
    return found


#: Where the code comes with the text that is handed in, from callers that a test here reads.
HANDED_IN = {"training/failures.py", "diffusers/telling.py"}


def test_every_warning_ends_with_a_code() -> None:
    read = [file for file in OURS if not str(file).endswith(tuple(HANDED_IN))]
    found = {str(file): lines for file in read if (lines := lacking(file.read_text()))}
    assert found == {}


def test_a_warning_without_a_code_is_found() -> None:
    assert lacking('def f():\n    text = "a"\n    _log.warning(text, 1)\n') == [3]
    assert lacking('def f():\n    text = "a [OOD101]"\n    _log.warning(text, 1)\n') == []
    assert lacking('import warnings\nwarnings.warn(f"a {1}", stacklevel=2)\n') == [2]
    assert lacking('_log.log(30, "a %s [OOD101]", 1)\n') == []


def test_what_is_handed_in_has_a_code() -> None:
    assert set(BY_KIND) == set(get_args(Kind))
    (telling,) = (file for file in OURS if str(file).endswith("diffusers/telling.py"))
    tree = ast.parse(telling.read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    told = [call for call in calls if ast.unparse(call.func) == "self._tell"]
    assert len(told) == 3
    assert all(map(codes_in, told))


def test_all_codes_are_used_and_all_that_are_used_are_known() -> None:
    used = set(BY_KIND.values())
    for file in OURS:
        if file.name not in ("codes.py", "showing.py"):
            used |= codes_in(ast.parse(file.read_text()))
    assert used == set(CODES)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_fails_in_a_training_is_told_once_with_its_code(kind: Kind) -> None:
    failures = Failures("a callback")
    with pytest.warns(UserWarning, match=rf"^a callback {re.escape(kind)}: why \[OOD\d+\]$"):
        failures.tell(kind, "why")
    failures.tell(kind, "why")  # a second warning would be an error
    assert failures.counts == {kind: 2}


def test_what_is_refused_is_raised_or_told_with_its_code() -> None:
    failures, error = Failures("a callback"), ValueError("no law")
    with pytest.raises(
        ValueError, match=r"^a callback could not be calibrated: ValueError: no law"
    ):
        failures.refuse("could not be calibrated", error, strict=True)
    with pytest.warns(UserWarning, match=r"ValueError: no law \[OOD502\]$"):
        failures.refuse("could not be calibrated", error, strict=False)
