"""The note, whatever names are in it."""

from dataclasses import replace

from markdown_it import MarkdownIt
from ood_monitor_integrations.mlflow.note import note_with, with_report
from support.alert_cases import ALERT, FlaggedSample, LayerShare, TermShare
from support.hostile_names import NAMES

from ood_monitor.alerts import Alert, guidance_of

BEGIN, END = "<!-- ood-monitor:begin -->", "<!-- ood-monitor:end -->"


def named(name: str) -> Alert:
    return replace(
        ALERT,
        stream=name,
        message=f"{name} of {name}",
        top_layers=(LayerShare(name, 0.5, 1.0),) * 9,
        top_terms=(TermShare(name, 0.5),) * 9,
        samples=tuple(FlaggedSample(i, 0.1, name) for i in range(9)),
    )


def elements(note: str) -> set[str]:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(note)
    return {child.type for token in tokens for child in [token, *(token.children or [])]}


def test_a_note_of_any_name_is_the_notes_own_elements() -> None:
    own = elements(str(note_with("", named("camera 1"))))
    assert {"strong_open", "code_inline", "html_block"} <= own
    for name in NAMES:
        note = note_with("", named(name))
        assert note is not None, name
        note.encode("utf-8")
        assert elements(note) <= own, name
        assert (note.count("<"), note.count("`")) == (2, 40), name


def test_a_note_of_any_name_is_replaced_whole_and_leaves_room() -> None:
    mine = "# Mine\n"
    for name in NAMES:
        first = note_with(mine, named(name))
        assert first is not None
        assert len(first) < 5000, name
        second = note_with(first, named("camera 1"))
        assert second is not None
        assert second.startswith(f"{mine}\n\n{BEGIN}")
        assert (second.count(BEGIN), second.count(END), second.count("camera 1")) == (1, 1, 18)


def test_a_note_begins_with_status_since_when_what_to_do_and_a_picture() -> None:
    """MLflow's page shows four lines of it before it is asked for more."""
    alert = replace(ALERT, evidence=replace(ALERT.evidence, since=1200), id="a" * 32)
    note = note_with("", alert, "b" * 32)
    assert note is not None
    first, second, *_ = note.removeprefix(f"{BEGIN}\n").split("\n\n")
    for part in ("ood-monitor: ALERT", "since about sample 1,200", guidance_of("drift").do):
        assert part in first
    assert len(first) < 420  # four lines of a hundred characters
    path = f"get-artifact?path=ood/alerts/{'a' * 32}.png&run_uuid={'b' * 32}"
    assert second == f"![Picture of the alert]({path})"
    images = [t for token in MarkdownIt().parse(note) for t in token.children or []]
    assert [t.attrs["src"] for t in images if t.type == "image"] == [path]


def test_an_id_that_may_be_more_than_one_has_no_picture() -> None:
    for alert_id, run_id in (("x](http", "b" * 32), ("a" * 32, "../b"), ("A" * 32, "b" * 32)):
        assert "![" not in str(note_with("", replace(ALERT, id=alert_id), run_id))


def test_a_report_is_linked_once_in_the_first_lines() -> None:
    run, mine = "b" * 32, "# Mine\n\n[Report](mine)"
    note = note_with(mine, replace(ALERT, id="a" * 32), run)
    linked = with_report(str(note), "3", run)
    address = f"#/experiments/3/runs/{run}/artifacts/ood/report.html"
    assert linked.startswith(f"{mine}\n\n{BEGIN}\n**ood-monitor: ALERT**")
    first = linked.partition(f"{BEGIN}\n")[2].partition("\n\n")[0]
    assert first.endswith(f"{guidance_of('drift').do} [Report]({address}).")
    assert with_report(linked, "3", run) == linked
    assert linked.replace(f" [Report]({address}).", "") == note


def test_a_report_is_linked_nowhere_else() -> None:
    """Without a paragraph of ours, without room, or with ids that may be more."""
    run, note = "b" * 32, str(note_with("", ALERT))
    for before in ("", "mine", note + "x" * (8000 - len(note))):
        assert with_report(before, "3", run) == before
    for experiment, run_id in (("3)", run), ("", run), ("3", "x](http"), ("3", "B" * 32)):
        assert with_report(note, experiment, run_id) == note
