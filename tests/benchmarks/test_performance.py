"""The page of what the library costs says what was measured, and what was not."""

import shutil
from pathlib import Path

import pytest

from benchmarks.cost.performance import PARTS, Part, rendered

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_committed_page_is_of_the_committed_results() -> None:
    """Where it is not, `python -m benchmarks.cost.performance` writes it anew."""
    assert (ROOT / "docs" / "performance.md").read_text() == rendered(RESULTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_was_not_measured_is_named_with_its_command(part: Part, tmp_path: Path) -> None:
    others = [other for other in PARTS if other is not part]
    for other in others:
        shutil.copy(RESULTS / f"{other.name}.json", tmp_path)
    page = rendered(tmp_path)
    assert f"Not measured yet:\n\n- {part.title}: `{part.command}`\n" in page
    assert [other.title for other in PARTS if f"\n## {other.title}\n" in page] == [
        other.title for other in others
    ]


def test_without_any_result_the_page_says_so(tmp_path: Path) -> None:
    page = rendered(tmp_path)
    assert "Not measured yet" in page
    assert all(part.command in page for part in PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_make_bench_runs_the_command_that_the_page_tells(part: Part) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    bench = makefile.split("\nbench:")[1].split("\n\n")[0]
    runs = [sorted(line.split()[1:]) for line in bench.splitlines()[1:]]
    assert sorted(part.command.split()[1:]) in runs
