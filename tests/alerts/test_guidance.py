"""What to do now: each kind of alert has it, in the code and in the documentation, alike."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from markdown_it import MarkdownIt
from ood_monitor_integrations.mlflow.note import note_with
from support.alert_cases import ALERT
from typer.testing import CliRunner

from ood_monitor.alerts import Alert, AlertKind, FlaggedSample, guidance_of
from ood_monitor.alerts.guidance import since_of, told
from ood_monitor.alerts.sink import alert_line
from ood_monitor.cli import app

ROOT = Path(__file__).parents[2]
KINDS = get_args(AlertKind)


def sections() -> dict[str, str]:
    """Sections of the page by the anchor that MyST and GitHub make of their heading."""
    found = dict[str, str]()
    lines = (ROOT / "docs" / "alerts.md").read_text().splitlines()
    heads = [t for t in MarkdownIt().parse("\n".join(lines)) if t.type == "heading_open"]
    starts = [head.map[0] for head in heads if head.map]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        title = lines[start].lstrip("# ").lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        assert anchor not in found
        found[anchor] = " ".join(" ".join(lines[start + 1 : end]).split())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_section_where_its_alert_says(kind: AlertKind) -> None:
    page, _, anchor = replace(ALERT, kind=kind).help.partition("#")
    assert (ROOT / page).is_file()
    assert anchor == kind
    guidance, said = guidance_of(kind), sections()[anchor]
    assert len(guidance.causes) == 3
    for part in (
        guidance.means,
        f"*What it does not mean.* {guidance.means_not}",
        *(f"{i}. {cause}" for i, cause in enumerate(guidance.causes, 1)),
        f"*Do now.* {guidance.do}",
        guidance.command,
    ):
        assert part in said


@pytest.mark.parametrize("kind", KINDS)
def test_what_to_run_next_is_a_command_with_options_that_it_has(kind: AlertKind) -> None:
    program, command, *words = guidance_of(kind).command.split()
    assert program == "ood-monitor"
    help_text = CliRunner().invoke(app, [command, "--help"]).output
    assert "Usage" in help_text
    assert [word for word in words if word.startswith("--") and word not in help_text] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_says_it_where_there_is_no_documentation(kind: AlertKind) -> None:
    result = CliRunner().invoke(app, ["guide", kind])
    assert result.exit_code == 0
    guidance = guidance_of(kind)
    for part in (guidance.means, guidance.means_not, guidance.do, guidance.command):
        assert part in result.stdout


def test_a_guide_of_another_word_names_the_kinds() -> None:
    result = CliRunner().invoke(app, ["guide", "panic"])
    assert result.exit_code == 1
    assert "one of sample, drift" in result.stderr
    with pytest.raises(ValueError, match="got 'panic'"):
        guidance_of("panic")  # type: ignore[arg-type]


SINCE: dict[str, tuple[Alert, str]] = {
    "a drift": (
        replace(ALERT, evidence=replace(ALERT.evidence, since=5, since_earliest=3, since_latest=9)),
        "about sample 5, most likely between 3 and 9",
    ),
    "one sample": (replace(ALERT, kind="sample", samples=(FlaggedSample(7, 0.01),)), "sample 7"),
    "several samples": (
        replace(ALERT, kind="sample", samples=(FlaggedSample(7, 0.01), FlaggedSample(9, 0.01))),
        "sample 7 to 9",
    ),
    "stale weights": (
        replace(ALERT, kind="stale_calibration", samples_seen=3),
        "sample 3 or before, when the weights were looked at",
    ),
    "weights that were stale at the start": (
        replace(ALERT, kind="stale_calibration", samples_seen=0),
        "the first sample or before, when the weights were looked at",
    ),
    "a recovery": (replace(ALERT, kind="recovered", samples_seen=3), "sample 3"),
}


@pytest.mark.parametrize("name", SINCE)
def test_an_alert_says_since_when(name: str) -> None:
    alert, since = SINCE[name]
    alert = replace(alert, evidence=replace(alert.evidence, since=5 if name == "a drift" else None))
    assert since_of(alert) == since
    line = told(alert)
    assert f"Since {since}." in line
    assert guidance_of(alert.kind).do in line
    assert line.isprintable()
    assert alert.help in alert_line(alert)


def test_what_to_do_is_what_the_gravest_that_stands_asks_for() -> None:
    flags = replace(ALERT, kind="sample", standing=("stale_calibration", "drift"))
    line, note = told(flags), note_with("", flags)
    for text in (line, note):
        assert text is not None
        assert guidance_of("stale_calibration").do in text
        assert guidance_of("stale_calibration").means in text
        assert guidance_of("sample").do not in text
