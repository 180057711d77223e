"""The paper's thirty statements, each with what was found of it; nothing is measured here."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from benchmarks.detection import answers, answers_experiments, answers_theory
from benchmarks.detection.answers import (
    COULD_NOT,
    EQUAL,
    Answer,
    Results,
    Statement,
    between,
    counts,
    gains,
    mean_of,
    slashed,
    table_of,
    where,
)
from benchmarks.detection.datasets import RESERVED
from benchmarks.detection.methods import LOG_P, PAPER
from benchmarks.detection.statements_norms import TYPICALITY
from benchmarks.harness import pages
from benchmarks.harness.pages import auroc, percent, table

STATEMENTS = answers_theory.STATEMENTS | answers_experiments.STATEMENTS

#: As they are told of reserved sets.
RESERVED_METHODS = {
    "`forward`": "forward",
    "`gradient_norms`": "gradient_norms",
    "`both`": "both",
    "the paper": PAPER,
    "typicality": "typicality",
    "- log p": LOG_P,
}

INTRODUCTION = """\
# The paper, statement by statement

This library implements [Dauncey et al., 2024](https://arxiv.org/abs/2403.01485). Here is what holds
of thirty statements of it on our models: small ones of Fashion-MNIST and MNIST (Glow, VAE, UNet,
PixelCNN) against five other sets each, 40 pairs; and a Glow of CIFAR-10. The command
`python -m benchmarks.detection.statements` is written `statements`; `make evidence` runs all.
Figures are AUROC of single samples where nothing else is said; [evidence](evidence.md) has more.

A verdict is computed from the figures. Cases are models or pairs of sets: *holds* is in nine of
ten, *in part* in a quarter, else *does not hold here*. AUROC within .005 count as equal. A UNet's
typicality is of the loss that its score is of."""


def rendered(results: Path) -> str:
    """The page of the results in a folder."""
    found = answers.loaded(results)
    blocks = [INTRODUCTION, statements(found), *disagreements(found), *sets(found)]
    return "\n\n".join(blocks) + "\n"


def statements(found: Results) -> str:
    lines = []
    for number, statement in STATEMENTS.items():
        answer = answered(statement, found)
        commands = ", ".join(f"`{name}`" for name in statement.needs)
        lines.append((number, statement.words, f"*{answer.verdict}*", answer.figure, commands))
    return table(["", "statement", "verdict", "what was found", "command"], lines)


def answered(statement: Statement, found: Results) -> Answer:
    """Its answer, or which result is not there."""
    absent = [f"`{name}`" for name in statement.needs if name not in found]
    if absent:
        return Answer(f"{COULD_NOT}, because {', '.join(absent)} is not measured yet", "")
    return statement.answer(found)


def disagreements(found: Results) -> Iterator[str]:
    """The three largest, with the probable cause."""
    if {"paper", "statements"} <= found.keys():
        yield "## Where we disagree most"
        items = (no_better(found), total_tells(found), no_diagonal(found))
        yield "\n\n".join(pages.paragraph(f"{i}. {item}") for i, item in enumerate(items, 1))


def no_better(found: Results) -> str:
    single = counts(table_of(found, PAPER), table_of(found, TYPICALITY))
    five = counts(table_of(found, PAPER, 5), table_of(found, TYPICALITY, 5))
    return (
        f"**Better than typicality on most pairs.** Here {slashed(single)} (better, equal, worse), "
        f"and {slashed(five)} for five samples. Probably since half of our pairs are easy for "
        "both, where the paper has natural images; and since the score counts correlated layers "
        "as independent: densities that know of the correlation lose less."
    )


def total_tells(found: Results) -> str:
    lead = gains(table_of(found, "total norm"), table_of(found, PAPER))
    flow = where(table_of(found, "total norm"), on="Fashion-MNIST", model="Glow")
    return (
        "**Layers tell more jointly than by their total.** The total norm is above the joint "
        f"score on {sum(value > EQUAL for value in lead)} of {len(lead)} models, by up to "
        f"{auroc(max(lead))}; the Glow of Fashion-MNIST, where it has {auroc(mean_of(flow))}, "
        "makes the mean. Probably since layers' norms mostly rise together: a total takes that one "
        "factor one-sided, the joint score two-sided and once for each layer."
    )


def no_diagonal(found: Results) -> str:
    degrees = [row["effective_dof_of_parameters"] for row in where(found["paper"], shown="law")]
    rows = where(found["statements"], part="fisher structure")
    mass = between((row["of the squared Frobenius norm"]["diagonal"] for row in rows), percent)
    return (
        "**Chi-square norms and a diagonal F.** A layer's norm varies as if it had "
        f"{between(degrees, percent)} of its parameters as degrees of freedom, and {mass} of F's "
        "squared norm is on its diagonal. Probably since all gradients of an image share its "
        "residual, one scale for all; weak correlations add up over many weights."
    )


def sets(found: Results) -> Iterator[str]:
    """Which sets chose nothing, and which are reserved."""
    yield "## Sets by which nothing was chosen"
    yield pages.paragraph(
        "The 40 pairs are a development set: rules of `forward` were chosen on models of "
        "Fashion-MNIST against these very sets, and one scale was mended on those of MNIST. "
        + " ".join(unseen(found))
    )
    names = " and ".join(RESERVED)
    yield pages.paragraph(
        f"Reserved are {names}, as foreign to a model of the other classes (`RESERVED` in "
        f"`benchmarks/detection/datasets.py`): no choice may look at them. {of_reserved(found)}"
    )


def of_reserved(found: Results) -> str:
    """What was measured of them, once."""
    if "reserved" not in found:
        return "No figure of them is told yet."
    told = ", ".join(
        f"{words} {auroc(mean_of(where(found['reserved'], method=name)))}"
        for words, name in RESERVED_METHODS.items()
    )
    return (
        f"Measured once, with the defaults, mean AUROC: {told} "
        "(`reserved`; [by set](evidence/unseen.md))."
    )


def unseen(found: Results) -> Iterator[str]:
    """What is found on sets that no rule was made by."""
    if "denoisers" in found:
        rows = [row for row in found["denoisers"] if "CIFAR-100" in row.get("auroc", {})]
        by_method = {
            name: mean(row["auroc"]["CIFAR-100"] for row in where(rows, method=name))
            for name in ("without noise", "gradient_norms", PAPER)
        }
        told = ", ".join(f"`{name}` {auroc(value)}" for name, value in by_method.items())
        yield f"CIFAR-100 was not among them; denoisers tell it by {told} (`denoisers`)."
    if "tables" in found:
        rows = where(found["tables"], table="diabetes")
        told = ", ".join(
            f"{name} {auroc(mean(row['mean'] for row in where(rows, method=name)))}"
            for name in ("forward", "- log p", PAPER)
        )
        yield f"Nor was the table of diabetes: {told} (`tables`)."


def main(
    results: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path(
        "benchmarks/results"
    ),
    page: Annotated[Path, typer.Option(help="What to write.")] = Path("docs/paper.md"),
) -> None:
    page.write_text(rendered(results))


if __name__ == "__main__":
    typer.run(main)
