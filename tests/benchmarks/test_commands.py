"""The benchmarks run and say what they must; how fast anything is, is no test."""

import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").glob("*/**/*.py")
    if 'typer.Option("--json"' in path.read_text()  # pages are made of what these write
)


#: Of those the ones that take longest, two minutes together: `make test-benchmarks` runs them.
LONG = {
    *("alerts.arrive", "detection.denoisers", "detection.evidence", "detection.no_law"),
    *("detection.audio", "detection.domains"),  # as quick as detection.reserved, and the same
    *("detection.paper", "detection.questions", "detection.shifts"),
    *("integrations.diffusers", "integrations.lightning"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in NAMES],
)
def test_a_quick_run_reports_machine_rows_and_claims(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", str(output)])
    # As `python -m` does, but for importing again what takes longer than most of them.
    with warnings.catch_warnings(action="default"), pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    report = json.loads(output.read_text())
    assert report["machine"]["torch"]
    assert report["rows"]
    assert report["claims"]
    for claim in report["claims"]:
        assert claim.keys() == {"claim", "value", "target", "holds"}
        assert claim["holds"] == (claim["value"] <= claim["target"])


def test_committed_results_are_of_commands_that_are_written_down() -> None:
    files = [ROOT / "Makefile", *(ROOT / "benchmarks").glob("*/**/*.py")]
    commands = "\n".join(path.read_text() for path in files)
    results = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert results
    assert {result for result in results if f"/{result}" not in commands} == set()
