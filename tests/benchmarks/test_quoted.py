"""Figures that pages quote by hand are those of the committed results, as far as they are written.

A line of a table is known by the words of its first cells.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.detection import summary

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
#: Page, first cells of a line, values of the others; None where the page has none.
Quote = tuple[str, Sequence[str], Sequence[float | None]]


def report(name: str) -> Row:
    found: Row = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def rows(name: str, **columns: object) -> list[Row]:
    found = report(name)["rows"]
    return [row for row in found if all(row.get(k) == v for k, v in columns.items())]


def parsed(cell: str) -> tuple[float, float]:
    """A number as it is written, ".98", "1 134" or "93 %", and half a unit of its last digit."""
    text = cell.replace("*", "").replace(" ", "")
    scale = 0.01 if text.endswith("%") else 1.0
    digits = text.removesuffix("%")
    decimals = len(digits.partition(".")[2])
    return scale * float(digits), scale * 0.5 * 10**-decimals


def line(page: str, first: Sequence[str]) -> list[str]:
    """The cells after these."""
    start = "| " + " | ".join(first) + " |"
    [found] = [one for one in (ROOT / page).read_text().splitlines() if one.startswith(start)]
    return [cell.strip() for cell in found.removeprefix(start).strip().strip("|").split("|")]


def first_screen() -> Iterator[Quote]:
    names = {
        '`"forward"`, the default': "`forward`, the default",
        '`"gradient_norms"`, the paper\'s idea': "`gradient_norms`",
        "the paper's own score": "paper",
        "typicality test": "typicality",
        "- log-likelihood": "- log-likelihood",
        "likelihood less complexity": "likelihood less complexity",
    }
    found = summary.found_of({name: report(name) for name in ("forward", "denoisers", "evidence")})
    for words, title in names.items():
        its = found[title]
        every = [value for values in its.by_model.values() for value in values]
        caught = mean(its.found) if its.found else None
        yield "README.md", [words], [mean(every), min(every), caught, max(its.costs.values())]


def own_calls() -> Iterator[Quote]:
    faults = {
        "10 or 5 steps, not 20": ["10 steps", "5 steps"],
        "guidance 4 or 7.5, not 2": ["guidance 4", "guidance 7.5"],
        "a LoRA of digits": ["a LoRA of digits"],
        "weights with 10 % of noise": ["weights disturbed by 10%"],
        "weights with 3 %": ["weights disturbed by 3%"],
        "nothing changed": ["none"],
    }
    methods = ("own calls", "default", "default and own calls", "gradient norms")
    for words, names in faults.items():
        chosen = [row for row in rows("own_calls") if row["fault"] in names]
        yield "docs/choosing.md", [words], [mean(r["auroc"][m] for r in chosen) for m in methods]


def costs_of_layers() -> Iterator[Quote]:
    models = {
        "DDPM-CIFAR-10 UNet, 35.7 M parameters, B = 8": "DDPM-CIFAR-10 UNet, B = 8",
        "small UNet, 1.1 M parameters, B = 32": "small UNet, B = 32",
    }
    names = ("ours", "up blocks and output", "last up block and output")
    for words, model in models.items():
        found = report("gradient_norms")["rows"][model]
        yield "docs/choosing.md", [words], [found[name]["time"] for name in names]


def layers() -> Iterator[Quote]:
    """AUROC "for" forward passes, by the levels that are taken."""
    names = {"output layers": "", "all layers": ""} | {
        f"{name} and output layers": name for name in ("last up block", "up blocks")
    }
    for words, name in names.items():
        found = rows("questions", question="layers", layers=name or words)
        by_levels = {row["levels"]: row for row in found}
        chosen = [by_levels[levels] for levels in ("500", "50, 500", "20, 100, 300, 500")]
        values = [value for row in chosen for value in (row["mean"], row["forwards"])]
        yield "docs/choosing.md", [words], values


def levels() -> Iterator[Quote]:
    chosen = ("0.015", "0.33", "1.0", "3.4", "two levels")
    by_level = {name: [r for r in rows("one_level") if str(r["level"]) == name] for name in chosen}
    every = {
        column: [[v for row in found for v in row[column].values()] for found in by_level.values()]
        for column in ("auroc", "found")
    }
    yield "docs/choosing.md", ["mean of all pairs"], [mean(values) for values in every["auroc"]]
    yield "docs/choosing.md", ["worst pair"], [min(values) for values in every["auroc"]]
    yield "docs/choosing.md", ["found at `fpr=0.01`"], [mean(values) for values in every["found"]]


def granularities() -> Iterator[Quote]:
    for granularity in ("tensor", "row"):
        found = rows("densities", granularity=granularity, method="TermsAndNorms")
        means = {row["model"]: row["mean"] for row in found}
        values = [means[model] for model in ("UNet", "VAE", "Glow")]
        yield "docs/choosing.md", [f"{granularity}s"], values


def drift() -> Iterator[Quote]:
    changes = ("mean + 0.5 sd", "too typical (mean - 1 sd)", "10 % at + 3 sd", "variance x 2.25")
    names = (*changes, "less spread (sd x 0.5)")
    for words, ert in (("`ert=10_000`", 10_000), ("`ert=1_000`", 1_000)):
        [row] = rows("drift", method=f"ours, ert {ert}")
        delays = [row["changes"][name]["median delay"] for name in names]
        yield "docs/choosing.md", [words], [row["in control"]["alarm within 10000"], *delays]


def beginnings() -> Iterator[Quote]:
    for row in rows("drift_since"):
        own, bets = row["posterior"], row["bets"]
        if row["change"] != "mean by -1":
            yield (
                "docs/promises.md",
                [row["change"]],
                [
                    *(row["median delay"], own["median distance"], own["coverage"]),
                    *(own["median width"], bets["median distance"], bets["coverage"]),
                ],
            )


def correlations() -> Iterator[Quote]:
    for ert in (1_000, 10_000, 100_000):
        found = rows("drift_correlation", promised=ert)
        values = [row["mean run length, at least"] for row in found]
        yield "docs/promises.md", [f"`ert={ert:_}`"], values


def choosers() -> Iterator[Quote]:
    words = {"- log p": "- log p, all calibrate", "default": "default, half calibrate"}
    for row in rows("chosen_by"):
        yield (
            "docs/promises.md",
            [f"{row['validation samples']:,}".replace(",", " "), words[row["score"]]],
            [
                *(row["promised"], row["flagged, by data that chose"], row["standard error"]),
                *(row["flagged, by data that chose nothing"], row["its standard error"]),
            ],
        )


QUOTES = [
    *(first_screen, own_calls, costs_of_layers, levels),
    *(granularities, drift, beginnings, correlations, choosers, layers),
]


@pytest.mark.parametrize("quotes", QUOTES, ids=lambda it: it.__name__)
def test_a_line_of_a_table_is_of_its_result(quotes: Any) -> None:
    found = list(quotes())
    assert found
    for page, first, values in found:
        cells = line(page, first)
        numbers = [number for cell in cells for number in re.split("±| for ", cell)]
        assert len(numbers) == len(values), first
        for cell, value in zip(numbers, values, strict=True):
            assert bool(cell) == (value is not None), first
            if value is not None:
                written, half = parsed(cell)
                assert abs(written - value) <= half * (1 + 1e-6), (page, first, cell, value)


@pytest.mark.parametrize(("cell", "number", "half"), [(".98", 0.98, 0.005), ("93 %", 0.93, 0.005)])
def test_a_number_is_read_with_its_last_digit(cell: str, number: float, half: float) -> None:
    assert parsed(cell) == pytest.approx((number, half))
    assert parsed("**1 134**") == (1134.0, 0.5)


def told() -> Iterator[tuple[str, str]]:
    """A page, and words of it with figures."""
    for row in rows("drift_history"):
        if row["history"] < 5_000:
            length, error = row["mean run length, at least"], row["standard error"]
            yield "docs/promises.md", f"{length:,} ± {error}".replace(",", " ")
    own, others = (report("chosen_weights")["rows"][name] for name in ("validation", "others"))
    shares = [f"{100 * it['flagged, mean']:.2f} %" for it in (own, others)]
    error = f"{100 * others['its error']:.2f}".removeprefix("0")
    yield "docs/promises.md", f"flagged {shares[0]} of new digits"
    yield "docs/promises.md", f"and {shares[1]} ({error})"
    for row in rows("diffusers_detection", detection="AUROC"):
        decimals = 4 if row["seed"] == 240301485 and len(row["levels"]) == 4 else 3
        yield "docs/choosing.md", f"{row['MNIST']:.{decimals}f}".removeprefix("0")


@pytest.mark.parametrize("page", ["docs/promises.md", "docs/choosing.md"])
def test_a_sentence_is_of_its_result(page: str) -> None:
    words = " ".join((ROOT / page).read_text().split())
    found = [fragment for of, fragment in told() if of == page]
    assert found
    assert [fragment for fragment in found if fragment not in words] == []
