"""Sets that benchmarks make themselves, and what is told of rows: cells, and rows that stand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from benchmarks.detection import audio, domains, protocol, rates
from benchmarks.drift import real_streams

TIME = np.arange(audio.LENGTH) / audio.RATE


def test_ink_is_counted_by_block_after_it_fills_the_square() -> None:
    """A bar of twice its width: 32 high, 16 wide, in the middle."""
    image = np.zeros((2, 28, 28), np.uint8)
    image[0, 3:11, 20:24] = 200
    found = domains.counted(image)
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[:, 2:6] = domains.COUNTS * domains.STEP
    assert torch.equal(found[0, 0], expected)
    assert not found[1].any()


def test_the_digits_of_others_come_in_the_same_form() -> None:
    found = domains.optdigits()
    assert found.shape == (1797, 1, 8, 8)
    assert set(torch.unique(found).tolist()) == {domains.STEP * k for k in range(17)}


@pytest.mark.parametrize(("hertz", "row"), [(300, 29), (2000, 16), (3900, 0)])
def test_a_tone_is_in_its_band_with_high_ones_above(hertz: int, row: int) -> None:
    """A band is 125 Hz."""
    found = audio.spectrogram(np.sin(2 * np.pi * hertz * TIME))
    assert (found[:, 4:-4].argmax(0) == row).all()
    assert found.max() == 255


def test_half_a_second_in_the_middle_is_seen_and_silence_around_it() -> None:
    long, short = np.arange(3 * audio.LENGTH), np.ones(100)
    assert np.array_equal(audio.middle(long), np.arange(audio.LENGTH) + audio.LENGTH)
    padded = audio.middle(short)
    assert padded.sum() == 100
    assert padded[audio.LENGTH // 2] == 1


def test_a_speaker_is_held_out_and_recordings_that_are_changed_are_the_test_ones() -> None:
    generator = np.random.default_rng(0)
    speakers = {
        name: [generator.normal(size=5000) for _ in range(30)] for name in ("a", audio.OTHER)
    }
    sizes = protocol.Sizes(fit=8, calibration=8, test=8, ood=5)
    found = audio.case(speakers, sizes).images
    own = audio.images(speakers["a"])
    known = torch.cat([found[name] for name in ("train", "fit", "calibration", "test")])
    assert len(known) == 30
    assert not len(protocol.unlike(known, own))
    assert not len(protocol.unlike(found["another speaker"], audio.images(speakers[audio.OTHER])))
    assert list(found)[-4:] == list(audio.CHANGES)
    assert all(len(found[name]) == 5 for name in audio.CHANGES)


def test_recordings_of_another_rate_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="free-spoken-digit-dataset"):
        audio.read(tmp_path)
    wavfile.write(tmp_path / "0_a_1.wav", audio.RATE, np.zeros(9, np.int16))
    assert {name: len(each) for name, each in audio.read(tmp_path).items()} == {"a": 1}
    wavfile.write(tmp_path / "0_a_2.wav", 44_100, np.zeros(9, np.int16))
    with pytest.raises(ValueError, match="Expected mono at 8000 Hz, got \\(9,\\) at 44100"):
        audio.read(tmp_path)


def judged(**columns: dict[str, float]) -> dict[str, object]:
    return {"group": 1, "tested": 100} | columns


@pytest.mark.parametrize(
    ("rows", "cells"),
    [
        ([judged()], [None, None, None]),
        (
            [judged(found={"a": 0.5, "b": 1.0}), judged(fpr_at_95_tpr={"a": 0.1, "b": 0.3})],
            ["75.0 % (50.0 %)", "20.0 % (30.0 %)", None],
        ),
        ([judged(delay={"a": 9.0, "b": 20.0, "c": 101.0})], [None, None, "20 (never)"]),
        ([judged(delay={"a": 9.0, "b": 101.0, "c": 101.0})], [None, None, "never"]),
        (
            [judged(delay={"a": 9.0}), judged(delay={"a": 5.0}) | {"tested": 5}],
            [None, None, "9 (9)"],
        ),
        ([{"group": 5, "delay": {"a": 121.0}}], [None, None, "never"]),
    ],
)
def test_an_operator_sees_means_and_in_brackets_the_worst_pair(
    rows: list[dict[str, object]], cells: list[str | None]
) -> None:
    assert rates.cells(rows) == cells


def test_deciders_that_are_not_measured_again_stay_in_their_place() -> None:
    known = [{"decider": name, "run": 1} for name in ("river ADWIN", "ours", "river PageHinkley")]
    measured = [{"decider": name, "run": 2} for name in ("river ADWIN", "alibi-detect CVM")]
    found = {row["decider"]: row["run"] for row in real_streams.joined(known, measured)}
    assert list(found) == ["ours", "alibi-detect CVM", "river ADWIN", "river PageHinkley"]
    assert list(found.values()) == [1, 2, 2, 1]


def test_a_legend_says_what_the_columns_have() -> None:
    assert rates.legend([judged()]) == ""
    words = rates.legend([judged(fpr_at_95_tpr={"a": 0.1})])
    assert words.startswith("*FPR 95*: the share of normal samples")
    assert "Found" not in words
    assert words.endswith("In brackets the worst pair.")


def test_a_score_without_a_number_is_the_highest() -> None:
    scores = {"calibration": np.arange(99.0), "test": np.arange(9.0), "odd": np.array([np.nan, -1])}
    row = protocol.judged(scores, 2)
    assert (row["auroc"], row["found"]) == ({"odd": 0.5}, {"odd": 0.5})
