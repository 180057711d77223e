"""What a report shows of samples: pictures, maps of surprise, and texts with tokens marked."""

import base64
import itertools
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import cli_cases
from support.cli_cases import flow, grey_images, write_images
from support.hostile_names import NAMES
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.report import Exhibit, Gallery, HeldOut, Stream, html_report
from ood_monitor.report.gallery import mapped, marked, picture


def pixels(address: str | None) -> np.ndarray:
    assert address is not None
    assert address.startswith("data:image/png;base64,")
    image = Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.asarray(image).astype(int)


def grey(size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), 128, dtype=np.uint8)


def exhibit(**known: object) -> Exhibit:
    return Exhibit(**({"id": "a", "p_value": 0.01} | known))  # type: ignore[arg-type]


# Pictures


def test_a_map_is_orange_where_less_was_expected_and_blue_where_more() -> None:
    surprise = np.zeros((4, 4))
    surprise[0, 0], surprise[3, 3] = -8.0, 8.0
    found = pixels(mapped(exhibit(image=grey(), surprise=surprise, unit="sd"), 4.0))
    red, _, blue = found[2, 2]
    assert red > blue + 100
    red, _, blue = found[-3, -3]
    assert blue > red + 100
    red, green, blue = found[2, -3]
    assert red == green == blue


def test_a_picture_is_no_larger_than_there_is_room_and_a_small_one_can_be_seen() -> None:
    assert pixels(picture(exhibit(image=grey(600)))).shape == (112, 112, 3)
    assert pixels(picture(exhibit(image=grey(8)))).shape == (96, 96, 3)
    wide = np.zeros((20, 500, 3), dtype=np.uint8)
    assert max(pixels(picture(exhibit(image=wide))).shape) == 112


def test_without_places_there_is_no_map() -> None:
    assert mapped(exhibit(image=grey()), 4.0) is None
    assert mapped(exhibit(surprise=np.zeros((4, 4))), 4.0) is None
    assert not Gallery([exhibit(image=grey())]).has_maps


@pytest.fixture(scope="module")
def detector() -> om.Detector:
    images = torch.tensor(grey_images(240) / 255, dtype=torch.float32).unsqueeze(1)
    return om.Detector(flow()).fit([images], progress=False)


def test_exhibits_have_the_places_that_the_detector_explains(detector: om.Detector) -> None:
    """One sample at a time, over terms of several sizes; in standard deviations where known."""
    images = torch.tensor(grey_images(3, 5) / 255, dtype=torch.float32).unsqueeze(1)
    shown = Exhibit.each(
        detector, images, ids=["a", "b", "c"], p_values=[0.1, 0.2, 0.3], images=images
    )
    for i, each in enumerate(shown):
        why = detector.explain(images[i : i + 1])
        maps = [z[0].double() for z in why.surprise_z.values() if z[0].ndim == 2]
        size = max(len(z) for z in maps)
        large = [z.repeat_interleave(size // len(z), 0) for z in maps]
        large = [z.repeat_interleave(size // z.shape[1], 1) for z in large]
        assert each.unit == "sd"
        assert each.surprise is not None
        np.testing.assert_allclose(each.surprise, torch.stack(large).mean(0).numpy(), rtol=1e-6)
        assert each.image is not None
        assert (each.image[..., 0] == (images[i, 0] * 255).round().byte().numpy()).all()


def test_what_is_no_image_is_shown_without_one(detector: om.Detector) -> None:
    odd = torch.full((1, 1, 4, 4), 7.0)
    [shown] = Exhibit.each(detector, odd, ids=["a"], p_values=[0.1], images=odd)
    assert shown.image is None
    with pytest.raises(ValueError, match="one of each kind a sample"):
        Exhibit.each(detector, odd, ids=["a", "b"], p_values=[0.1], images=odd)


# Texts


def texts_of(count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 5, (count, 9), generator=torch.Generator().manual_seed(seed))


def bigram() -> om.Detector:
    return om.Detector(cli_cases.bigram()).fit([texts_of(400, 1)], progress=False)


def test_a_token_is_marked_by_its_own_surprise() -> None:
    """The first is given, not predicted; padding on either side is none of the text."""
    detector, text = bigram(), [4, 1, 2, 3]
    logits = detector.adapter.module.weight.detach().double().log_softmax(-1)  # type: ignore[union-attr]
    own = [
        float(logits[a, b] - (logits[a].exp() * logits[a]).sum())
        for a, b in itertools.pairwise(text)
    ]
    for row in ([*text, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, *text]):
        words = [f"t{token}" for token in text]
        [shown] = Exhibit.each(
            detector, torch.tensor([row]), ids=["a"], p_values=[0.1], tokens=[words]
        )
        assert shown.surprise is not None
        assert np.isnan(shown.surprise[0])
        np.testing.assert_allclose(shown.surprise[1:], own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at most 9 tokens"):
        Exhibit.each(detector, torch.tensor([row]), ids=["a"], p_values=[0.1], tokens=[["t"] * 10])


def test_the_less_likely_the_darker() -> None:
    surprise = np.array([np.nan, 1.0, -1.0, -2.0, -4.0, -99.0])
    shown = exhibit(tokens=list("abcdef"), surprise=surprise)
    assert [level for _, level, _ in marked(shown, 4.0)] == [0, 0, 1, 2, 4, 4]
    assert [said for *_, said in marked(shown, 4.0)][:3] == ["", "1.0 nats", "-1.0 nats"]
    long = list(marked(exhibit(tokens=["a"] * 1000), 4.0))
    assert long[-1][0] == " … and 840 more"


def test_places_are_measured_against_those_of_typical_samples() -> None:
    typical = [exhibit(tokens=list("ab"), surprise=np.array([np.nan, -2.0]))]
    odd = [exhibit(tokens=list("ab"), surprise=np.array([np.nan, -50.0]))]
    assert Gallery(odd, typical).full == pytest.approx(2.0)
    assert Gallery().full == 1.0


# The page


@pytest.mark.slow
def test_tokens_and_names_are_text_and_nothing_else(detector: om.Detector) -> None:
    def tags(name: str) -> list[str]:
        shown = exhibit(id=name, tokens=[name, "b"], surprise=np.array([-9.0, 0.0]))
        html = html_report(detector.fitted, gallery=Gallery([shown], [shown]))
        html.encode("utf-8")
        return re.findall(r"<[a-z/!][^ >]*", html)

    plain = tags("plain")
    assert "<script" not in plain
    for name in NAMES[::40]:
        assert tags(name) == plain, name


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_images(root / "held_out", grey_images(240))
    assert run("fit", "support.cli_cases:flow", root / "held_out", root / "detector").exit_code == 0
    write_images(root / "stream", np.concatenate([grey_images(20, 1), grey_images(40, 2) // 8]))
    write_images(root / "few", grey_images(12, 3))
    return root


@pytest.mark.slow
def test_images_are_shown_if_asked_for_and_of_a_drift_those_since_it_began(
    root: Path, tmp_path: Path
) -> None:
    page, given = tmp_path / "r.html", ("--stream", root / "stream", "--held-out", root / "few")
    assert run("report", root / "detector", page, *given).exit_code == 0
    assert "image/png" not in page.read_text()
    result = run("report", root / "detector", page, *given, "--images")
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.count("data:image/png") == 2 * 2 * 8  # of each kind, with a map
    [since] = re.findall(r"Most anomalous since sample (\d+)", text)
    shown = text.partition("Most anomalous since")[2].partition("Typical held-out")[0]
    numbers = [int(name) for name in re.findall(r"<p>(\d{4})\.png</p>", shown)]
    assert len(numbers) == 8
    assert min(numbers) + 1 >= int(since)


def test_images_without_a_stream_are_refused(root: Path, tmp_path: Path) -> None:
    result = run("report", root / "detector", tmp_path / "r.html", "--images")
    assert result.exit_code == 1
    assert "Expected `--stream` beside `--images`" in result.stderr


@pytest.mark.slow
def test_texts_are_shown_if_asked_for(root: Path, tmp_path: Path) -> None:
    words, held_out = ["_", "un", "der", "stand", "ing"], texts_of(240, 1).numpy()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    stream = torch.tensor([[0, 0, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 0, 0, 0, 0, 0]])
    np.savez(tmp_path / "held_out.npz", held_out)
    np.savez(tmp_path / "stream.npz", stream.numpy())
    detector, page = tmp_path / "detector", tmp_path / "r.html"
    given = ("report", detector, page, "--stream", tmp_path / "stream.npz")
    texts = ("--texts", tmp_path / "vocab.txt")
    for command in (
        ("fit", "support.cli_cases:bigram", tmp_path / "held_out.npz", detector),
        (*given, *texts, "--held-out", tmp_path / "held_out.npz"),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    shown = re.findall(r'<p class="text">(.*?)</p>', page.read_text())
    read = [re.sub("<.*?>", "", text) for text in shown]
    assert set(read[:2]) == {" stand ing un der stand ing un", " un der stand ing"}
    assert len(read) == 2 + 8
    assert all('title="' in text for text in shown)
    images = ("report", root / "detector", page, "--stream", root / "few")
    for command, said in (
        ((*images, *texts), "Expected sequences of tokens for `--texts`, got samples of a LogL"),
        ((*given, *texts, "--images"), "Expected one of `--images` and `--texts`, got both"),
        (("report", detector, page, *texts), "Expected `--stream` beside `--texts`"),
    ):
        refused = run(*command)
        assert refused.exit_code == 1
        assert said in refused.stderr


@pytest.mark.slow
def test_a_report_of_a_long_stream_stays_below_three_megabytes(detector: om.Detector) -> None:
    """Of ten thousand samples and held-out ones, with pictures that nothing compresses."""
    generator, known = np.random.default_rng(0), detector.fitted.calibration
    score = generator.choice(known.scores, 10_000)
    noise = [
        exhibit(
            image=generator.integers(0, 256, (300, 300, 3), dtype=np.uint8),
            surprise=generator.normal(size=(300, 300)),
            unit="sd",
        )
        for _ in range(20)
    ]
    stream = stream_of(score, known.p_value(score))
    held_out = {f"layer {i}": generator.normal(size=10_000) for i in range(40)}
    html = html_report(
        detector.fitted,
        stream=stream,
        held_out=HeldOut(held_out),
        gallery=Gallery(noise, noise),
        fpr=0.05,
    )
    assert html.count("data:image/png") == 2 * 2 * 8
    assert len(html.encode()) < 3_000_000


def stream_of(score: np.ndarray, p_value: np.ndarray) -> Stream:
    ids = [f"a/folder/{i:06}.png" for i in range(len(score))]
    return Stream("s", ids, score, p_value, ["up.3.weight"] * len(score))


@pytest.mark.slow
def test_a_report_says_what_a_watch_has_said(root: Path, tmp_path: Path) -> None:
    """Of the weights too, where the report has the model at hand or the watch's words."""
    said, page = tmp_path / "alerts.jsonl", tmp_path / "r.html"
    other = ("--model", "support.cli_cases:other_flow")
    watched = run("watch", root / "detector", root / "few", "--once", "--json", *other)
    said.write_text(watched.stdout)
    for given in (("--alerts", said), ("--stream", root / "few", *other)):
        result = run("report", root / "detector", page, *given)
        assert result.exit_code == 0, result.output
        banner = page.read_text().partition('<section class="banner')[2].partition("</section>")[0]
        assert "The model has other weights than the detector was fitted on" in banner
    said.write_text("nothing of ours\n")
    refused = run("report", root / "detector", tmp_path / "no.html", "--alerts", said)
    assert refused.exit_code == 1
    assert "Expected the JSON of an alert" in refused.stderr
