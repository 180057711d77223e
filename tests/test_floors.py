"""The order of the steps: no module imports from a step above its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, ADD_ONS = "ood_monitor", "ood_monitor_integrations"
#: The step that may import integrations.
COMMAND_LINE = "cli"


def steps() -> list[str]:
    """From the ground up, as the table of the design says."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = text.partition("## The steps")[2].partition("Beside the package")[0]
    return re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Lines and names of all imports in a module of a package, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__", "find_spec", "resolve_name")
        ):
            # One that is put together while the program runs is not seen.
            names = [ast.literal_eval(a) for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(name).lstrip(".")) for name in names[:1])


def climbs(package: Path) -> list[str]:
    """Where a module of a package imports from above, as "file:line: name"."""
    order, found = steps(), []
    for file in sorted(package.rglob("*.py")):
        inner = file.relative_to(package).with_suffix("").parts
        if inner == ("__init__",):
            continue  # the public names are above all steps
        own = ".".join([CORE, *inner[:-1]])
        for line, name in imported(ast.parse(file.read_text()), own):
            if is_above(name, inner[0], order):
                found.append(f"{'/'.join(inner)}:{line}: {name}")
    return found


def is_above(name: str, step: str, order: list[str]) -> bool:
    top, *rest = name.split(".")
    if top == ADD_ONS:
        return step != COMMAND_LINE
    if top != CORE or rest == ["__version__"]:
        return False
    # A name of the package itself comes with all of it.
    return not rest or rest[0] not in order or order.index(rest[0]) > order.index(step)


def test_no_module_imports_from_a_step_above_its_own() -> None:
    assert climbs(ROOT / CORE) == []


def test_the_design_has_every_step_once() -> None:
    there = {p.stem for p in (ROOT / CORE).iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert sorted(steps()) == sorted(there - {"__init__"})


@pytest.mark.parametrize("step", steps())
def test_every_step_has_tests_of_its_own(step: str) -> None:
    assert (
        list((ROOT / "tests").glob(f"{step}/test_*.py"))
        or (ROOT / "tests" / f"test_{step}.py").exists()
    )


UPWARD = [
    "import ood_monitor.monitor",
    "import ood_monitor.monitor.memory as m",
    "from ood_monitor.monitor import Monitor",
    "from ood_monitor import monitor",
    "from ood_monitor import Monitor",
    "import ood_monitor",
    "from .. import monitor",
    "from ..monitor import Monitor",
    "from ..monitor.memory import Memory",
    "def f():\n    from ood_monitor.monitor import Monitor",
    "class C:\n    def f(self):\n        import ood_monitor.cli",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ood_monitor.cli import app",
    "import importlib\nm = importlib.import_module('ood_monitor.monitor')",
    "from importlib import import_module\nm = import_module('ood_monitor.monitor')",
    "m = __import__('ood_monitor.monitor')",
    "from ood_monitor_integrations import lightning",
    "import ood_monitor_integrations.mlflow",
    "def f():\n    from ood_monitor_integrations.diffusers import hook",
    "import importlib\nm = importlib.import_module('ood_monitor_integrations.mlflow')",
]

DOWNWARD = [
    "import torch",
    "from ood_monitor.adapters.base import Adapter",
    "from ood_monitor import modules",
    "from ood_monitor import __version__",
    "from . import terms",
    "from .base import Density",
    "from ..adapters import Adapter",
    "import importlib\nm = importlib.import_module('diffusers')",
    '"""Say from ood_monitor.monitor import Monitor."""',
]


def climbs_of(folder: Path, statement: str, module: str = "densities/terms.py") -> list[str]:
    """Of a package that has this statement in one of its modules."""
    file = folder / CORE / module
    file.parent.mkdir(parents=True)
    file.write_text(statement)
    return climbs(folder / CORE)


@pytest.mark.parametrize("statement", UPWARD)
def test_an_import_from_above_is_found_and_named(statement: str, tmp_path: Path) -> None:
    (found,) = climbs_of(tmp_path, statement)
    line = len(statement.split("\n"))
    assert found.startswith(f"densities/terms:{line}: ood_monitor")


@pytest.mark.parametrize("statement", DOWNWARD)
def test_an_import_from_below_is_none_from_above(statement: str, tmp_path: Path) -> None:
    assert climbs_of(tmp_path, statement) == []


def test_a_module_beside_the_folders_is_a_step_too(tmp_path: Path) -> None:
    found = climbs_of(tmp_path, "from .detector import Detector", "plots.py")
    assert found == ["plots:1: ood_monitor.detector.Detector"]


def test_the_command_line_may_import_an_integration(tmp_path: Path) -> None:
    statement = "from ood_monitor_integrations.diffusers import fit_pipeline"
    assert climbs_of(tmp_path, statement, "cli/pipelines.py") == []
