import base64
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from support.cli_cases import flow, grey_images, write_images
from support.hostile_names import NAMES
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.cli.tables import read_rows
from ood_monitor.report import HeldOut, Stream, html_report
from ood_monitor.report.course import drift_of
from ood_monitor.saving import Fitted

NASTY = "<script>alert(1)</script> & \"quotes\" 'single' $x$.png"


class Page(HTMLParser):
    """What a reader of the page meets: tags, their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def tags_alone(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]

    @property
    def alts(self) -> list[str]:
        return [str(image["alt"]) for image in self.of("img")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, its held-out data and a stream that drifts, with a file that is no image."""
    root = tmp_path_factory.mktemp("root")
    write_images(root / "held_out", grey_images(240))
    assert run("fit", "support.cli_cases:flow", root / "held_out", root / "detector").exit_code == 0
    write_images(root / "stream", np.concatenate([grey_images(20, 1), grey_images(40, 2) // 8]))
    (root / "stream" / "zz.png").write_bytes(b"\x89PNG no more")
    assert run("score", root / "detector", root / "stream", "-o", root / "s.csv").exit_code == 0
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def reported(root: Path, output: Path, *options: object) -> Page:
    result = run("report", root / "detector", output, *options)
    assert result.exit_code == 0, result.output
    return Page(output.read_text(encoding="utf-8"))


def fitted_of(root: Path) -> Fitted:
    return Fitted.load(root / "detector")[0]


@pytest.fixture(scope="module")
def whole(root: Path) -> Page:
    return reported(
        root, root / "whole.html", "--held-out", root / "held_out", "--stream", root / "stream"
    )


@pytest.mark.slow
def test_a_report_shows_all_that_it_was_given(whole: Page) -> None:
    for part in (
        "Histogram of the anomaly scores of 120 calibration samples",
        "Evidence of drift over 61 samples. It first crosses",
        "Layers that deviate most in flagged samples",
        "Kolmogorov-Smirnov distance of",
        "Heat map of the correlation",
        "Quantile plots of the 6 layers",
    ):
        assert any(part in alt for alt in whole.alts), (part, whole.alts)
    assert "Drift: an alarm at sample" in whole.text
    assert "1 of 61 samples could not be read" in whole.text
    assert "mean absolute correlation between layers" in whole.text
    assert "adapter support.cli_cases:flow" in whole.text


def test_a_report_is_complete_in_itself(whole: Page) -> None:
    """No address but of what is in the page, no script, and a policy that forbids both."""
    names = {"src", "href", "srcset", "action", "data", "poster"}
    addresses = [v for _, attributes in whole.tags for k, v in attributes.items() if k in names]
    assert addresses
    assert all(str(address).startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not whole.of("script")
    assert not [k for _, attributes in whole.tags for k in attributes if k.startswith("on")]
    policy = next(str(a["content"]) for a in whole.of("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")


def test_figures_are_pictures_and_each_says_in_words_what_it_shows(whole: Page) -> None:
    for image in whole.of("img"):
        svg = base64.b64decode(str(image["src"]).partition(",")[2])
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert len(str(image["alt"])) > 40


def test_the_page_has_a_language_a_title_and_headings_in_order(whole: Page) -> None:
    assert whole.of("html") == [{"lang": "en"}]
    assert "width=device-width" in str(whole.of("meta"))
    levels = [int(tag[1]) for tag, _ in whole.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(cell.get("scope") for cell in whole.of("th"))


def test_scores_from_a_file_say_what_scoring_anew_says(whole: Page, root: Path) -> None:
    page = reported(root, root / "file.html", "--scores", root / "s.csv")
    for part in ("Drift: an alarm at sample", "samples are flagged: "):
        [expected] = re.findall(f"{part}[^.]*", whole.text)
        assert expected in page.text


def test_a_report_of_a_detector_alone_needs_no_model(root: Path, tmp_path: Path) -> None:
    recipe = json.loads((root / "detector" / "model.json").read_text())
    for name in ("config.json", "detector.safetensors"):
        (tmp_path / name).write_bytes((root / "detector" / name).read_bytes())
    (tmp_path / "model.json").write_text(json.dumps(recipe | {"model": "gone:away"}))
    result = run("report", tmp_path, tmp_path / "r.html", "--scores", root / "s.csv", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == (tmp_path / "r.html").stat().st_size
    page = reported(root, tmp_path / "alone.html")
    assert len(page.alts) == 1
    assert "No stream was given" in page.text
    assert "No held-out samples were given" in page.text


def stream_of(fitted: Fitted, scores: list[float], name: str = "a", layer: str = "w") -> Stream:
    values = np.array(scores)
    return Stream(
        name=name,
        ids=[f"{i}-{name}" for i in range(len(values))],
        score=values,
        p_value=fitted.calibration.p_value(values),
        top_layers=[layer] * len(values),
    )


def test_names_are_text_and_nothing_else(root: Path) -> None:
    """Of files, layers, the stream, facts and the heading."""
    fitted = fitted_of(root)
    z = np.random.default_rng(0).normal(size=(2, 50))
    html = html_report(
        fitted,
        facts={NASTY: NASTY},
        held_out=HeldOut({NASTY: z[0], "other": z[1]}),
        stream=stream_of(fitted, [0.0, 1e6], NASTY, NASTY),
        title=NASTY,
    )
    page = Page(html)
    assert not page.of("script")
    assert page.text.count(NASTY) >= 6
    assert sum(NASTY in alt for alt in page.alts) >= 3


@pytest.mark.slow
def test_a_page_of_any_names_is_utf8_and_has_its_own_elements_alone(root: Path) -> None:
    """One name is everywhere; all that we know of are facts."""
    name = "\udc80\u202e\x1b[0m\n</title></td><!-- '>\" $x$ {{ 1 }}"
    fitted = fitted_of(root)
    z = np.random.default_rng(0).normal(size=(2, 50))

    def page_of(name: str, facts: dict[str, str]) -> str:
        return html_report(
            fitted,
            facts=facts,
            held_out=HeldOut({name: z[0], "other": z[1]}),
            stream=stream_of(fitted, [0.0, 1e6], name, name),
            title=f"about {name}",
        )

    html = page_of(name, {other: other for other in NAMES})
    html.encode("utf-8")
    assert html.replace("\n", "").isprintable()
    plain = Page(page_of("plain", {str(i): str(i) for i in range(len(set(NAMES)))}))
    assert Page(html).tags_alone == plain.tags_alone


def test_the_drift_of_a_report_is_what_a_monitor_says(root: Path) -> None:
    detector = om.Detector.from_pretrained(root / "detector", flow())
    images = np.concatenate([grey_images(20, 1), grey_images(40, 2) // 8])
    batch = torch.tensor(images / 255, dtype=torch.float32).unsqueeze(1)
    alerts, evidence = [], []
    with om.Monitor(detector) as monitor:
        for sample in batch.split(1):
            alerts += monitor.update(sample)
            evidence.append(monitor.log_e_value)
    scores = detector.score(batch).score.tolist()
    stream = stream_of(detector.fitted, scores)
    drift = drift_of(detector.fitted, stream, ert=monitor.ert, fpr=monitor.fpr)
    assert drift is not None
    said = [(a.kind, a.samples_seen, a.message, a.evidence.since) for a in alerts]
    assert [(a.kind, a.samples_seen, a.message, a.evidence.since) for a in drift.alerts] == [
        it for it in said if it[0] != "explanation"
    ]
    assert drift.status == monitor.status == "ALERT"
    at = [alert.samples_seen for alert in alerts if alert.kind == "drift"]
    assert list(drift.alarms) == at
    np.testing.assert_allclose(drift.log_e_values, evidence)


def test_alerts_stand_with_the_last_first_be_they_given_or_found(root: Path) -> None:
    fitted = fitted_of(root)
    stream = stream_of(fitted, [float(fitted.calibration.scores.max()) + 1.0] * 60)
    found = drift_of(fitted, stream, ert=10_000, fpr=0.05)
    assert found is not None
    seen = [alert.samples_seen for alert in found.alerts]
    assert seen == sorted(set(seen))
    assert len(seen) > 1
    for alerts in ((), found.alerts):
        html = html_report(fitted, stream=stream, fpr=0.05, alerts=alerts)
        shown = re.findall(r'<td class="number">(\d+)</td><td>\w+</td>', html)
        assert [int(number) for number in shown] == seen[::-1][:10]


def test_a_stream_as_usual_is_called_good(root: Path) -> None:
    fitted = fitted_of(root)
    scores = np.random.default_rng(0).choice(fitted.calibration.scores, 100).tolist()
    page = Page(html_report(fitted, stream=stream_of(fitted, scores), fpr=0.05))
    assert "Problem" not in page.text
    assert "The stream looks like the samples that were called normal" in page.text


def test_samples_that_could_not_be_scored_leave_a_report(root: Path) -> None:
    fitted = fitted_of(root)
    page = Page(html_report(fitted, stream=stream_of(fitted, [np.nan, np.nan])))
    assert "2 of 2 samples could not be read or scored" in page.text
    assert len(page.alts) == 1


def test_layers_that_no_longer_fit_are_a_problem(root: Path) -> None:
    z = np.random.default_rng(0).normal(3, 1, (2, 200))
    page = Page(html_report(fitted_of(root), held_out=HeldOut({"a": z[0], "b": z[1]})))
    assert "2 of 2 layers are badly fitted" in page.text
    assert page.text.index("2 of 2 layers") < page.text.index("120 calibration samples:")


def test_an_fpr_that_nothing_reaches_is_a_problem(root: Path) -> None:
    assert "no sample can be flagged" in Page(html_report(fitted_of(root), fpr=0.001)).text


def test_a_diagnosis_that_cannot_be_made_is_said_and_leaves_a_report(
    root: Path, tmp_path: Path
) -> None:
    few = write_images(tmp_path / "few", grey_images(12, seed=6))
    result = run("report", root / "detector", tmp_path / "r.html", "--held-out", few)
    assert result.exit_code == 0, result.output
    assert "no diagnosis of the model: expected at least 100 samples, got 12" in result.stderr
    assert "Kolmogorov-Smirnov" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 30])
def test_few_samples_alone_do_not_make_a_bad_fit(count: int, root: Path) -> None:
    """Of twenty layers that are as fitted: their distance from a normal is what chance makes it."""
    z = np.random.default_rng(0).normal(size=(20, count))
    held_out = HeldOut({f"layer {i}": values for i, values in enumerate(z)})
    assert "Problem" not in Page(html_report(fitted_of(root), held_out=held_out)).text


def test_a_report_judges_by_the_rate_of_its_file_or_says_that_it_does_not(
    root: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "s.jsonl"
    made = run("score", root / "detector", root / "stream", "-o", scores, "--fpr", "0.2")
    assert made.exit_code == 0, made.output
    flagged = sum(json.loads(line)["flagged"] for line in scores.read_text().splitlines())
    page = reported(root, tmp_path / "r.html", "--scores", scores)
    assert f"{flagged} of 60 samples are flagged" in page.text
    assert "at most 20.00% on average" in page.text
    assert "other samples anomalous than the file" not in page.text
    other = reported(root, tmp_path / "o.html", "--scores", scores, "--fpr", "0.05")
    assert "flagged at fpr 0.2; this report was asked for fpr 0.05" in other.text
    both = tmp_path / "both.jsonl"
    both.write_text(scores.read_text() + scores.read_text().replace('"fpr": 0.2', '"fpr": 0.1'))
    refused = run("report", root / "detector", tmp_path / "no.html", "--scores", both)
    assert refused.exit_code == 1
    assert "got 0.1, 0.2" in refused.stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_scores_of_before_they_had_a_rate_are_read(suffix: str, root: Path, tmp_path: Path) -> None:
    made, old = tmp_path / f"new.{suffix}", tmp_path / f"old.{suffix}"
    assert run("score", root / "detector", root / "stream", "-o", made).exit_code == 0
    lines = [] if suffix == "parquet" else made.read_text().splitlines()
    if suffix == "parquet":
        rows = parquet.read_table(made)
        parquet.write_table(rows.drop_columns(["fpr", "group"]), old)
    elif suffix == "csv":
        old.write_text("".join(f"{row.rsplit(',', 2)[0]}\n" for row in lines))
    else:
        records = [json.loads(line) for line in lines]
        kept = [{k: v for k, v in r.items() if k not in ("fpr", "group")} for r in records]
        old.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
    new = read_rows(made)
    assert {row.fpr for row in new} == {0.01}
    assert read_rows(old) == [replace(row, fpr=None) for row in new]


ERRORS: dict[str, tuple[list[str], str]] = {
    "no detector": (["HELD_OUT", "r.html"], "config.json"),
    "no folder to write to": (["DETECTOR", "nowhere/r.html"], "nowhere"),
    "two streams": (["DETECTOR", "r.html", "--scores", "a", "--stream", "b"], "got both"),
    "no scores": (["DETECTOR", "r.html", "--scores", "nowhere.csv"], "nowhere.csv"),
    "scores of another kind": (["DETECTOR", "r.html", "--scores", "OTHER"], "other.csv"),
    "an ert of none": (
        ["DETECTOR", "r.html", "--ert", "1", "--scores", "SCORES"],
        "ert in [2, inf)",
    ),
    "an fpr of none": (["DETECTOR", "r.html", "--fpr", "1"], "(0, 1)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_wrong_report_is_one_line_and_no_file(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    arguments, message = ERRORS[name]
    places = {
        "DETECTOR": root / "detector",
        "HELD_OUT": root / "held_out",
        "OTHER": tmp_path / "other.csv",
        "SCORES": root / "s.csv",
    }
    result = run("report", *(places.get(text, text) for text in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_colour_images_are_reported_too(tmp_path: Path, root: Path) -> None:
    """Of a grey model, which sees them in grey."""
    pixels = np.repeat(grey_images(30, seed=3)[..., None], 3, -1)
    folder = tmp_path / "colour"
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    assert "No drift alarm" in reported(root, tmp_path / "r.html", "--stream", folder).text
