"""The page of wrong guesses says what the committed results say."""

import json
from pathlib import Path

import pytest

from benchmarks.detection import guesses
from benchmarks.detection.guesses import GUESSES, Guess

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("guess", GUESSES, ids=lambda guess: guess.guess)
def test_a_guess_is_told_by_results_that_are_committed(guess: Guess) -> None:
    words = guess.measured(json.loads((RESULTS / guess.file).read_text())["rows"])
    assert words in guesses.rendered(RESULTS)
    assert any(letter.isdigit() for letter in words)


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    report = json.loads((RESULTS / "galaxies.json").read_text())
    for row in report["rows"]:
        row["mean"] = 0.123
    (tmp_path / "galaxies.json").write_text(json.dumps(report))
    page = guesses.rendered(tmp_path)
    assert "that has .123 where" in page
    assert len(page.splitlines()) == 8  # no other guess has results there
