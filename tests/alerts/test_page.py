"""The page that is rewritten: what it says, of whom, and that it is whole at any time."""

import json
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.alert_cases import ALERT, summary
from support.hostile_names import NAMES

from ood_monitor.alerts import (
    Alert,
    AlertKind,
    FlaggedSample,
    LayerShare,
    PageSink,
    Status,
    Summary,
    board,
    guidance_of,
)

NASTY = "<script>alert(1)</script> & \"quotes\" 'single'\u202e\x1b[0m"


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, sorted(name for name, _ in attrs)))
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def figures(seen: int, status: Status = "OK", evidence: float = 1.0, **more: object) -> Summary:
    known = {"ert": 10_000.0, "fpr": 0.01, "number": seen, "status": status}
    return replace(summary(seen), log_e_value=evidence, **(known | more))  # type: ignore[arg-type]


def told(kind: AlertKind, status: Status, seen: int = 100, **more: object) -> Alert:
    severity = "critical" if kind == "drift" else "warning"
    known = {"kind": kind, "status": status, "severity": severity, "samples_seen": seen}
    known |= {"number": seen, "id": f"{seen:032x}", "time": datetime.now(UTC)}
    return replace(ALERT, **(known | more))  # type: ignore[arg-type]


def shown(path: Path, said: Sequence[Alert | Summary]) -> Page:
    sink = PageSink(path)
    for each in said:
        if isinstance(each, Alert):
            sink(each)
        else:
            sink.summarise(each)
    return page_of(path)


STORIES: dict[str, tuple[Alert, str]] = {
    "one sample": (
        told("sample", "WARN", samples=(FlaggedSample(97, 0.004, "a.png"),)),
        "Since sample 97.",
    ),
    "a drift": (
        told("drift", "ALERT", evidence=replace(ALERT.evidence, since=80)),
        "Since about sample 80.",
    ),
    "a stale detector": (
        told("stale_calibration", "WARN"),
        "Since sample 100 or before, when the weights were looked at.",
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_page_says_what_since_when_and_what_now(name: str, tmp_path: Path) -> None:
    """Before anything else of that stream."""
    alert, since = STORIES[name]
    page = shown(tmp_path / "p.html", [figures(50), figures(99), alert])
    guidance = guidance_of(alert.kind)
    first = page.text.partition("Last alerts")[0]
    parts = [alert.status, alert.message, alert.help, since.rstrip(".")]
    for part in (*parts, guidance.means, guidance.do, guidance.command):
        assert part in first
    assert page.text.split().index(f"{alert.status}") < 5


def test_a_page_is_static_and_reads_itself_anew(tmp_path: Path) -> None:
    page = shown(tmp_path / "p.html", [figures(1), figures(2), told("drift", "ALERT")])
    active = {"script", "a", "img", "iframe", "form", "link", "object"}
    assert not active & {tag for tag, _ in page.tags}
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name[:2] == "on"]
    assert ("content", "30") in page.attributes
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_evidence_rates_and_the_last_alerts_are_there(tmp_path: Path) -> None:
    said = [figures(10, evidence=0.5), figures(20, evidence=7.5), told("sample", "WARN", 21)]
    page = shown(tmp_path / "p.html", said)
    assert "e^7.5 of e^9.2, where it alarms" in page.text
    assert "1.00% (of normal samples at most 1.00%)" in page.text
    assert "now e^7.5, at most e^7.5; it alarms at e^9.2" in page.text
    assert "20, 0 of them could not be scored" in page.text
    [points] = [value for name, value in page.attributes if name == "points"]
    assert re.fullmatch(r"0\.0,[\d.]+ 600\.0,[\d.]+", points)


def test_no_bar_is_drawn_that_nobody_has_said(tmp_path: Path) -> None:
    page = shown(tmp_path / "p.html", [figures(10, ert=None), figures(20, ert=None)])
    assert "it alarms" not in page.text
    assert "line" not in [tag for tag, _ in page.tags]


def test_several_streams_share_a_page_the_worst_first(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    first, second = PageSink(path), PageSink(path)
    first.summarise(figures(10, stream="quiet"))
    second(told("drift", "ALERT", stream="loud"))
    first.summarise(figures(20, stream="quiet"))
    page = page_of(path)
    assert page.text.index("loud") < page.text.index("quiet")
    assert "ood-monitor: ALERT" in page.text


def test_a_page_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    sink = PageSink(path)
    sink(told("drift", "ALERT", 100))
    sink.close()
    assert "Its watch ended" in page_of(path).text
    page = shown(path, [figures(200, "ALERT")])
    assert "Its watch ended" not in page.text
    assert ALERT.message in page.text


def test_what_is_told_late_or_twice_changes_nothing(tmp_path: Path) -> None:
    drift, over = told("drift", "ALERT", 100), told("recovered", "OK", 300)
    said = [drift, over, figures(400), drift, figures(50, "ALERT", evidence=99.0)]
    page = shown(tmp_path / "p.html", said)
    assert "ood-monitor: OK" in page.text
    assert "e^99" not in page.text
    assert page.text.count(drift.message) == 2  # of the drift and of the recovery, in the table


STANDING: dict[str, tuple[list[Alert], AlertKind | None]] = {
    "stale weights under a drift": (
        [
            told("drift", "ALERT", 100, standing=("drift",)),
            told("stale_calibration", "ALERT", 120, standing=("stale_calibration", "drift")),
        ],
        "stale_calibration",
    ),
    "flags after stale weights": (
        [
            told("stale_calibration", "WARN", 10, standing=("stale_calibration",)),
            told("sample", "WARN", 20, standing=("stale_calibration",)),
        ],
        "stale_calibration",
    ),
    "a drift that is left when the weights are right again": (
        [
            told("drift", "ALERT", 100, standing=("drift",)),
            told("stale_calibration", "ALERT", 120, standing=("stale_calibration", "drift")),
            told("recovered", "ALERT", 140, standing=("drift",)),
        ],
        "drift",
    ),
    "flags after a drift that is over": (
        [
            told("drift", "ALERT", 100, standing=("drift",)),
            told("recovered", "OK", 200),
            told("sample", "WARN", 210),
        ],
        "sample",
    ),
    "a drift of before alerts said what stands": (
        [told("drift", "ALERT", 100), told("invalid_input", "ALERT", 120)],
        "drift",
    ),
    "nothing that is left": (
        [told("drift", "ALERT", 100, standing=("drift",)), told("recovered", "OK", 200)],
        None,
    ),
    "a drift that many flags came before, and an explanation after": (
        [
            *(told("sample", "WARN", seen) for seen in range(10, 40)),
            told("drift", "ALERT", 100, standing=("drift",)),
            told("explanation", "ALERT", 101, standing=("drift",)),
        ],
        "drift",
    ),
}


@pytest.mark.parametrize("name", STANDING)
def test_the_gravest_that_stands_is_the_story(name: str, tmp_path: Path) -> None:
    alerts, kind = STANDING[name]
    page = shown(tmp_path / "p.html", alerts)
    first = page.text.partition("Last alerts")[0]
    others = {guidance_of(alert.kind).means for alert in alerts}
    expected = set[str]() if kind is None else {guidance_of(kind).means}
    assert {means for means in others if means in first} == expected


def test_a_layer_of_an_explanation_joins_the_alert(tmp_path: Path) -> None:
    drift = told("drift", "ALERT", 100, top_layers=())
    layers = (LayerShare("down.3.weight", 0.9, 5.0),)
    why = told("explanation", "ALERT", 101, top_layers=layers, explains=drift.id, id="e" * 32)
    assert "Layers: down.3.weight" in shown(tmp_path / "p.html", [drift, why]).text


def test_a_stream_that_is_silent_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    PageSink(path).summarise(figures(10, stream="dead"))
    folder = path.with_name("p.html.streams")
    [before] = board.read_all(folder)
    board.write(folder, replace(before, written=datetime.now(UTC) - timedelta(seconds=121)))
    page = shown(path, [figures(10, stream="alive")])
    assert "Nothing was heard of this stream since" in page.text
    assert "ood-monitor: SILENT" in page.text


DAMAGE: dict[str, dict[str, object]] = {
    "a format of another release": {"format": 99},
    "a status that there is not": {"status": "FINE"},
    "a name that is none": {"stream": None},
    "figures without any": {"summary": {}},
    "a time without a zone": {"written": "2026-11-29T12:00:00"},
    "endless patience": {"refresh": 1e308},
    "a sample that is no number": {"since_sample": "1"},
    "evidence without end": {"points": [[1, math.inf]]},
    "a point after the last": {"points": [[math.inf, 1.0]]},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_stream_file_that_is_damaged_costs_no_other(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.html"
    PageSink(path).summarise(figures(10, stream="one"))
    [whole] = (tmp_path / "p.html.streams").glob("*.json")
    damaged = json.dumps(json.loads(whole.read_text()) | DAMAGE[name])
    (tmp_path / "p.html.streams" / "bad.json").write_text(damaged)
    page = shown(path, [figures(10, stream="two")])
    assert "one" in page.text
    assert "two" in page.text
    assert "Left out of the page" in caplog.text


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    """Of streams, samples, layers, messages and the heading."""

    def of(name: str, folder: Path) -> Page:
        folder.mkdir()
        sink = PageSink(folder / "p.html", title=f"about {name}")
        samples, layers = (FlaggedSample(1, 0.1, name),), (LayerShare(name, 0.5, 1.0),)
        sink(told("sample", "WARN", stream=name, message=name, samples=samples, top_layers=layers))
        (folder / "p.html").read_text().encode("utf-8")
        return page_of(folder / "p.html")

    plain = of("plain", tmp_path / "plain")
    for i, name in enumerate([NASTY, *NAMES[::12]]):
        assert of(name, tmp_path / str(i)).tags == plain.tags, name


def test_a_reader_always_sees_a_whole_page(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    PageSink(path).summarise(figures(1))
    stop, torn = threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            text = path.read_text(encoding="utf-8")
            if not (text.startswith("<!DOCTYPE html>") and text.endswith("</html>")):
                torn.append(text)

    def tell(stream: str) -> None:
        sink = PageSink(path)
        for seen in range(1, 40):
            sink.summarise(figures(seen, stream=stream))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=tell, args=[name]) for name in ("a", "b")]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert torn == []
    assert {file.name for file in tmp_path.iterdir()} == {"p.html", "p.html.streams"}
    assert {"a", "b"} <= {each.stream for each in board.read_all(tmp_path / "p.html.streams")}


def test_a_page_stays_small(tmp_path: Path) -> None:
    """However long a stream is."""
    path = tmp_path / "p.html"
    state = board.Shown("long")
    for seen in range(1, 5000):
        state = state.with_summary(figures(seen))
    for seen in range(5000, 5050):
        state = state.with_alert(told("sample", "WARN", seen))
    assert len(state.points) <= 240
    assert len(state.alerts) == 10
    assert board.Shown.parse(state.dump()) == state
    (tmp_path / "p.html.streams").mkdir()
    board.write(tmp_path / "p.html.streams", state)
    PageSink(path).summarise(figures(10_000, stream="other"))
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("name", [".", "nowhere/p.html"])
def test_a_place_that_cannot_be_written_to_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Expected a file in a folder that is there"):
        PageSink(name)
