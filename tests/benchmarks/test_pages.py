"""What pages are made of."""

import pytest

from benchmarks.harness import pages
from benchmarks.harness.measurement import claim


def test_a_table_has_a_line_for_each_row_and_none_is_empty() -> None:
    assert pages.table(["", "a"], [("x", 1), (None, 0)]) == "| | a |\n|---|---|\n| x | 1 |\n| | 0 |"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.985, ".985"),
        (1.0, "1.000"),
        (0.9996, "1.000"),
        (0.0, ".000"),
        (-0.0104, "-.010"),
        (-0.0001, ".000"),
        (10.5, "10.500"),
    ],
)
def test_an_auroc_has_no_zero_before_the_point(value: float, written: str) -> None:
    assert pages.auroc(value) == written


@pytest.mark.parametrize(
    ("share", "written"), [(0.8157, "81.6 %"), (1.0, "100.0 %"), (-0.0001, "0.0 %")]
)
def test_a_share_is_written_as_percent(share: float, written: str) -> None:
    assert pages.percent(share) == written


def test_a_ratio_has_two_decimals_and_no_negative_zero() -> None:
    assert [pages.ratio(value) for value in (1.145, 2.0, -0.001)] == ["1.15", "2.00", "0.00"]


@pytest.mark.parametrize(
    ("more", "written"),
    [
        ({"threads": 2}, "A processor, 2 threads, torch 2, 2026-01-31"),
        (
            {"threads": 1, "river": "0.26", "seconds": 9},
            "A processor, 1 thread, torch 2, river 0.26, 2026-01-31",
        ),
    ],
)
def test_a_machine_is_described_with_versions_and_date(
    more: dict[str, object], written: str
) -> None:
    machine = {"processor": "A processor", "torch": "2", "date": "2026-01-31"}
    assert pages.described(machine | more) == written


def test_words_go_into_lines_and_none_is_cut() -> None:
    words = " ".join(["off-balance"] * 30)
    lines = pages.paragraph(words).split("\n")
    assert max(map(len, lines)) <= 100
    assert " ".join(lines) == words


CLAIMS = [claim("time", 1.045, 1.05), claim("memory", 2.0, 1.5)]


def test_claims_are_told_with_their_targets_and_whether_they_hold() -> None:
    assert pages.claims(CLAIMS).split("\n")[2:] == [
        "| time | 1.045 | 1.05 | holds |",
        "| memory | 2 | 1.5 | missed |",
    ]


def test_missed_claims_are_named() -> None:
    assert pages.missed(CLAIMS) == "1 of 2 claims are missed:\n\n- memory: 2; the target is 1.5"
    assert pages.missed(CLAIMS[:1]) == "0 of 1 claims are missed."


def test_a_column_that_has_no_cell_is_left_out() -> None:
    rows = [("x", None, 0), ("y", None, None)]
    assert pages.filled(["a", "b", "c"], rows) == pages.table(["a", "c"], [("x", 0), ("y", None)])
