"""Whatever a text mentions is there: modules, names, files, links, commands and their options.

Texts are the pages, and of code its docstrings, comments and other strings.
"""

import ast
import functools
import importlib
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from ood_monitor.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ["*.md", "Makefile", "pyproject.toml", ".ci/run", "docs/**/*.md", "docs/**/*.rst"]
CODE = ["ood_monitor", "integrations", "benchmarks", "examples", "tests"]
#: Of other times, of files that a user has, and of what is wrong on purpose.
LEFT_OUT = ["CHANGELOG.md", "tests/test_mentions.py"]
#: Tags of MLflow, which look like names of Python.
TAGS = {
    *("ood_monitor.status", "ood_monitor.since", "ood_monitor.method", "ood_monitor.status_of"),
    *("ood_monitor.number", "ood_monitor.stream", "ood_monitor.alert_number"),
}


@dataclass(frozen=True)
class Text:
    """What is read.

    Attributes:
        place: Its file, below the root.
        words: The text.
    """

    place: Path
    words: str


@functools.cache
def texts() -> tuple[Text, ...]:
    patterns = [*PAGES, *(f"{folder}/**/*.{kind}" for folder in CODE for kind in ("py", "y*ml"))]
    files = {file for pattern in patterns for file in ROOT.glob(pattern)}
    places = sorted(str(file.relative_to(ROOT)) for file in files)
    return tuple(text for place in places if place not in LEFT_OUT for text in texts_of(place))


def texts_of(place: str) -> Iterator[Text]:
    words = (ROOT / place).read_text()
    each = strings(words) if place.endswith(".py") else [words]
    yield from (Text(Path(place), text) for text in each)


def strings(code: str) -> Iterator[str]:
    """Comments, docstrings and other strings, with {} in the place of what an f-string puts in."""
    yield from re.findall(r"(?:^|  )#.*", code, re.MULTILINE)
    inner = set[ast.AST]()
    for node in ast.walk(ast.parse(code)):  # an f-string comes before its parts
        if isinstance(node, ast.JoinedStr):
            inner.update(node.values)
            yield "".join(
                str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "{}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield node.value


# What is there.


def resolved(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        LookupError: Nothing.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        tried = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(tried)
        except ModuleNotFoundError as error:
            if not tried.startswith(str(error.name)):
                return None  # it is there, and takes a package that is not
            continue
        for part in parts[count:]:
            found = attribute(found, part)
        return found
    raise LookupError(name)


def attribute(owner: Any, name: str) -> Any:
    """One that a class only annotates, or sets on its instances, counts."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if isinstance(owner, type) and name in instance_attributes(owner):
        return None
    raise LookupError(name)


def instance_attributes(owner: type) -> set[str]:
    bases = [base for base in owner.__mro__ if base is not object]
    annotated = {name for base in bases for name in inspect.get_annotations(base)}
    described = re.findall(r"^\s+(\w+): ", owner.__doc__ or "", re.MULTILINE)
    return annotated | set(described)


def is_name(text: Text, found: re.Match[str]) -> bool:
    name = re.sub(r"^om\b", "ood_monitor", found[1]).replace(":", ".")
    return name in TAGS or is_there(name)


@functools.cache
def is_there(name: str) -> bool:
    try:
        resolved(name)
    except LookupError:
        return False
    return True


def is_reference(text: Text, found: re.Match[str]) -> bool:
    """Of a role such as :class:, as Sphinx would look for it: here, then in what holds here."""
    target = found[1].rpartition("<")[2].rstrip(">").lstrip("~!.").removesuffix("()")
    inside = any(is_there(f"{scope}{target}") for scope in scopes(module_name(text.place)))
    return inside or f"self.{target}" in (ROOT / text.place).read_text()


@functools.cache
def scopes(module: str) -> list[str]:
    if not module.startswith("ood_monitor"):
        return ["", f"{module}."]
    loaded = importlib.import_module(module)
    classes = [name for name, value in vars(loaded).items() if isinstance(value, type)]
    inner = [f"{module}.{name}." for name in classes]
    return ["", f"{module}.", *inner, f"{module.rpartition('.')[0] or module}."]


def module_name(place: Path) -> str:
    parts = place.with_suffix("").parts
    return ".".join(part for part in parts if part not in ("integrations", "__init__"))


def is_path(text: Text, found: re.Match[str]) -> bool:
    return any(ROOT.glob(found[1].rstrip("./")))


@functools.cache
def file_names() -> set[str]:
    patterns = ["*.*", *(f"{folder}/**/*.*" for folder in ("docs", *CODE))]
    return {file.name for pattern in patterns for file in ROOT.glob(pattern)}


def is_file_name(text: Text, found: re.Match[str]) -> bool:
    return found[1] in file_names()


def is_part(text: Text, found: re.Match[str]) -> bool:
    """A name in a file."""
    file = ROOT / found[2]
    return file.exists() and re.search(rf"\b{found[1]}\b", file.read_text()) is not None


def is_link(text: Text, found: re.Match[str]) -> bool:
    """Of a page; code may write pages into other folders."""
    is_far = text.place.suffix != ".md" or found[1].startswith("http")
    return is_far or (ROOT / text.place.parent / found[1]).exists()


def is_target(text: Text, found: re.Match[str]) -> bool:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return found[1] in targets


def is_extra(text: Text, found: re.Match[str]) -> bool:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(found[1].split(",")) <= set(project["optional-dependencies"])


def is_command(text: Text, found: re.Match[str]) -> bool:
    """Of ours, with options that it has."""
    group: Any = typer.main.get_command(app)
    if found[1].startswith("--"):
        return True
    command = group.commands.get(found[1])
    return command is not None and set(options_in(found[2])) <= {
        option for parameter in command.params for option in parameter.opts
    } | {"--help"}


def options_in(words: str) -> list[str]:
    return re.findall(r"(?<!\S)--[a-z][a-z-]*", words.partition("#")[0])


def is_program(text: Text, found: re.Match[str]) -> bool:
    """A module that can be run, with options that it has."""
    file = ROOT / Path(*found[1].split(".")).with_suffix(".py")
    if not file.exists() or '__name__ == "__main__"' not in file.read_text():
        return False
    names = [n.arg for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.arg)]
    own = {"--" + name.replace("_", "-") for name in names}
    own.update(re.findall(r'"(--[a-z-]+)"', file.read_text()))
    return set(options_in(found[2])) <= own


#: What is run begins a line of code, or a span of it.
_CODE = r"(?:`|^ {4,}(?:\w+ .*\| )?|^\t\$\(BIN\)/|echo \")"
#: The rest of its command.
_REST = r"((?:[^`\n\\]|\\\n)*)"

#: By kind: how a mention looks, and whether what it mentions is there.
KINDS: dict[str, tuple[str, Callable[[Text, re.Match[str]], bool]]] = {
    "name": (
        r"(?<![\w./-])((?:ood_monitor(?:_integrations)?|om|benchmarks)(?:[.:][A-Za-z_]\w*)+)"
        r"(?![\w*/{]|\.\{)",
        is_name,
    ),
    "reference": (r":(?:class|func|meth|attr|data|exc|mod|obj):`([^`]+)`", is_reference),
    "path": (
        r"(?<![\w/.{}-])((?:docs|benchmarks|tests|examples|integrations|ood_monitor)/[\w./*-]*)",
        is_path,
    ),
    "part": (r"`(\w+)` (?:in|of)\s+`([\w./]+\.py)`", is_part),
    "file": (r"`([\w-]+\.(?:py|md|rst|toml|lock))`", is_file_name),
    "link": (r"\]\(([^)\s#]+)[^)]*\)", is_link),
    "target": (rf"{_CODE}make ([a-z][\w-]*)", is_target),
    "extra": (r"(?:ood-monitor|')\.?\[([\w,]+)\]", is_extra),
    "command": (rf"{_CODE}ood-monitor ([a-z-]+){_REST}", is_command),
    "program": (rf"python3? -m ((?:benchmarks|examples)(?:\.\w+)+)(?!\w|\.{{){_REST}", is_program),
}


def lacking(kind: str, among: Iterable[Text]) -> list[str]:
    """Mentions of nothing, as "file: mention"."""
    pattern, exists = KINDS[kind]
    return [
        f"{text.place}: {found[0].strip()}"
        for text in among
        for found in re.finditer(pattern, text.words, re.MULTILINE)
        if not exists(text, found)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_mentioned_is_there(kind: str) -> None:
    assert lacking(kind, texts()) == []


#: By kind: mentions of what is not there.
WRONG: dict[str, list[str]] = {
    "name": [
        "`ood_monitor.episode`",
        ":class:`~ood_monitor.dispatcher.Dispatcher`",
        "see ood_monitor.Monitor.observed.",
        "`om.Detectors(adapter)`",
        "``ood_monitor_integrations.diffusers.watching.PipelineMonitor``",
        "ood_monitor_integrations.autoload:callback",
        "by `python -m benchmarks.evidence`, on",
    ],
    "reference": [":func:`pooled`", ":meth:`Detector.refit`", ":class:`that <Detectors>`"],
    "path": [
        "`tests/cases.py`",
        "benchmarks/noise_levels,",
        "(docs/evidence.rst)",
        "examples/d*.js",
    ],
    "part": ["`MODEL` in `tests/support/cases.py`", "`MODELS` of\n`tests/cases.py`"],
    "file": ["`outlet.py`", "see `DESIGN.md`."],
    "link": ["[the page](docs/evidences.md)", "![A figure](docs/figure.png)", "[it](test.md#a)"],
    "target": ["`make evidences`", "    make lint", "```\n    make tests  # all\n```"],
    "extra": ["pip install 'ood-monitor[plot]'", "`'.[all,develop]'`"],
    "command": [
        "`ood-monitor monitor runs/detector`",
        "    ood-monitor score runs/detector data --out scores.csv",
        "    find inbox -name '*.png' | ood-monitor watches runs/detector -",
        "`ood-monitor watch runs/detector inbox --states watch.json`",
    ],
    "program": [
        "`python -m benchmarks.evidence`",
        "python -m benchmarks.harness.pages",
        "`python -m benchmarks.detection.text --data-folder data`",
        "python -m benchmarks.cost.performance \\\n\t--figures docs",
    ],
}

#: By kind: mentions of what is there, and what is no mention.
RIGHT: dict[str, list[str]] = {
    "name": [
        "`ood_monitor.monitor.memory.Episode`",
        "ood_monitor.Monitor.last.",
        "the field `ood_monitor.Scores.p_value`",
        "om.models.Glow(1)",
        "the tag `ood_monitor.status`",
        "pipe.ood_monitor.stale",
        "ood_monitor_integrations.autoload:callbacks",
        "benchmarks.detection.{}",
    ],
    "reference": [":class:`Text`", ":func:`texts_of`", ":class:`~pathlib.Path`"],
    "path": ["`tests/support/`.", "examples/lightning_*.py", "/home/me/docs/mine.md", "docs/*.md"],
    "part": ["`MODELS` in `tests/support/cases.py`"],
    "file": ["`sink_thread.py`", "`model.py.bak`"],
    "link": ["[here](README.md#a)", "[there](https://example.org/b.md)", "[below](#c)"],
    "target": ["`make test-slow`", "    make bench  # an hour", "that would make it slow"],
    "extra": ["'ood-monitor[plots]'", "'.[all,dev]'", "numbers[0]"],
    "command": [
        "`ood-monitor --help`",
        "    ood-monitor watch d - --state s  # --not",
        "`ood-monitor`",
    ],
    "program": ["`python -m benchmarks.drift.history --json f`", "python -m benchmarks.{} --quick"],
}


def pairs(lists: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, words) for kind, each in lists.items() for words in each]


def here(words: str) -> Text:
    """As if it stood in a page at the root, or for a reference in this module."""
    return Text(Path("tests/test_mentions.py" if words.startswith(":") else "README.md"), words)


@pytest.mark.parametrize(("kind", "words"), pairs(WRONG))
def test_a_mention_of_nothing_is_found(kind: str, words: str) -> None:
    assert len(lacking(kind, [here(words)])) == 1


@pytest.mark.parametrize(("kind", "words"), pairs(RIGHT))
def test_a_mention_of_something_is_let_pass(kind: str, words: str) -> None:
    assert lacking(kind, [here(words)]) == []


def test_all_strings_and_comments_of_code_are_read() -> None:
    code = '"""One."""\nx = f"two {3} four"  # five\n\n\ndef f():\n    """Six."""\n'
    assert sorted(strings(code)) == ["  # five", "One.", "Six.", "two {} four"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_mention_something_of_every_kind(kind: str) -> None:
    assert any(re.search(KINDS[kind][0], text.words, re.MULTILINE) for text in texts())
