"""Files of hostile names through the commands: each line, row and cell is a name and no more."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.cli_cases import grey_images, write_images
from support.hostile_names import CONTROLS, NAMES
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.cli.console import print_facts
from ood_monitor.cli.tables import Row, read_rows, table
from ood_monitor.escaping import terminal, utf8


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 3, 4), result.output
    return result


def is_file_name(name: str) -> bool:
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return size < 250 and not name.startswith(".") and "/" not in name and "\0" not in name


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    held_out = write_images(root / "held_out", grey_images(240))
    run("fit", "support.cli_cases:flow", held_out, root / "detector")
    return root / "detector"


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of those names, the first and each second one after it damaged."""
    folder = tmp_path_factory.mktemp("inbox")
    other = write_images(tmp_path_factory.mktemp("other"), np.zeros((1, 4, 4), np.uint8))
    whole = (other / "0000.png").read_bytes()
    for i, name in enumerate(filter(is_file_name, sorted({f"{name}.png" for name in NAMES}))):
        (folder / name).write_bytes(whole if i % 2 else b"no image")
    assert len(list(folder.iterdir())) > 200
    return folder


def names_of(inbox: Path) -> list[str]:
    return sorted(file.relative_to(inbox).as_posix() for file in inbox.rglob("*.png"))


def damaged(names: list[str]) -> int:
    return (len(names) + 1) // 2


def shown(text: str) -> list[str]:
    """Lines, of which each is one that a terminal only shows."""
    lines = text.removesuffix("\n").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    return lines


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_has_every_name_and_nothing_of_its_own(
    suffix: str, detector: Path, inbox: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"s.{suffix}"
    lines = shown(run("score", detector, inbox, "--output", output).stderr)
    names = names_of(inbox)
    assert len(lines) == damaged(names) + 1
    as_told = terminal if suffix == "csv" else utf8
    assert sorted(row.id for row in read_rows(output)) == sorted(map(as_told, names))
    if suffix == "csv":
        content = output.read_text(encoding="utf-8")
        assert content.count("\n") == len(names) + 1
        cells = [row for line in csv.reader(content.splitlines()) for row in line]
        formulas = [c for c in cells if c.lstrip()[:1] in tuple("=+-@＝＋－＠")]
        assert [float(cell) for cell in formulas if cell.startswith("-")]  # numbers stay numbers
        assert not [cell for cell in formulas if not cell.startswith("-")]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_of_layers_are_held_to_the_same(suffix: str, tmp_path: Path) -> None:
    rows = [Row(name, -1.0, 0.5, None, False, True, name or None, -2.0) for name in NAMES]
    with table(tmp_path / f"s.{suffix}") as write:
        write(rows)
    as_told = terminal if suffix == "csv" else utf8
    found = [
        (row.id, row.score, row.top_layer, row.top_z) for row in read_rows(tmp_path / f"s.{suffix}")
    ]
    assert found == [(as_told(n), -1.0, as_told(n) or None, -2.0) for n in NAMES]


def test_lines_on_stdout_are_ascii_and_json(detector: Path, inbox: Path) -> None:
    lines = shown(run("score", detector, inbox).stdout)
    ids = sorted(json.loads(line)["id"] for line in lines)
    assert ids == sorted(map(utf8, names_of(inbox)))


def test_a_watch_tells_of_every_name_in_a_line(detector: Path, inbox: Path) -> None:
    result = run("watch", detector, inbox, "--once", "--name", "a\udc80\x1b[0m`")
    lines = shown(result.stderr)
    names = names_of(inbox)
    assert sum("unreadable: " in line for line in lines) == damaged(names)
    assert sum("flagged: " in line for line in lines) == len(names) - damaged(names)
    for line in shown(result.stdout):
        alert = om.Alert.from_json(line)
        for text in (alert.stream, *(str(sample.id) for sample in alert.samples)):
            text.encode("utf-8")


def test_a_report_of_such_a_table_is_made(detector: Path, inbox: Path, tmp_path: Path) -> None:
    run("score", detector, inbox, "--fpr", "0.5", "--output", tmp_path / "s.jsonl")
    run("report", detector, tmp_path / "r.html", "--scores", tmp_path / "s.jsonl", "--fpr", "0.5")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.replace("\n", "").isprintable()
    assert page.count("<script") == 0


def test_facts_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts(dict.fromkeys(CONTROLS, "\x1b[0m\n"), as_json=False)
    assert len(shown(capsys.readouterr().out)) == len(set(CONTROLS))
