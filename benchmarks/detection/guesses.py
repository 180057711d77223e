"""Guesses that are wrong, each beside what committed results say; nothing is measured here.

Of each the figures come from the JSON that its command writes. A guess whose results are not there
is left out of the page.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import pages
from benchmarks.harness.pages import auroc, percent, table

Row = dict[str, Any]


@dataclass(frozen=True)
class Guess:
    """One.

    Attributes:
        guess: In words.
        command: Under `benchmarks`.
        measured: What its results say, of their rows.
        results: Their name, where it is not the command's.
    """

    guess: str
    command: str
    measured: Callable[[Sequence[Row]], str]
    results: str = ""

    @property
    def file(self) -> str:
        return f"{self.results or self.command.rpartition('.')[2]}.json"


INTRODUCTION = pages.paragraph(
    "What we, or the literature, guessed, and what was measured instead. Each line is made of a "
    "committed result (`benchmarks/results`), and its command measures it again."
)


def rendered(results: Path) -> str:
    lines = []
    for each in GUESSES:
        file = results / each.file
        if file.exists():
            told = each.measured(json.loads(file.read_text())["rows"])
            lines.append([each.guess, told, f"`python -m benchmarks.{each.command}`"])
    blocks = ["# Guesses that are wrong", INTRODUCTION]
    return "\n\n".join([*blocks, table(["guess", "measured", "by"], lines)]) + "\n"


def only(rows: Sequence[Row], **values: object) -> Row:
    """The one row of these values."""
    [found] = such(rows, **values)
    return found


def such(rows: Sequence[Row], **values: object) -> list[Row]:
    return [row for row in rows if all(row.get(k) == v for k, v in values.items())]


def mean(rows: Sequence[Row], method: str) -> float:
    """Of single images of all models."""
    found = [row for row in rows if row.get("method") == method and "auroc" in row]
    return statistics.mean(row["mean"] for row in found if row.get("group", 1) == 1)


def total_norm(rows: Sequence[Row]) -> str:
    found = such(rows, method="total norm", group=1, model="Glow", on="Fashion-MNIST")
    worst, value = min(found[0]["auroc"].items(), key=lambda item: item[1])
    return (
        f"Foreign images have *smaller* ones in a Glow: AUROC {auroc(value)} against {worst}. "
        f"Mean of all models {auroc(mean(rows, 'total norm'))}; by layer, the paper's, "
        f"{auroc(mean(rows, 'paper'))}."
    )


def expected(rows: Sequence[Row]) -> str:
    pixel = {"model": "PixelCNN", "on": "Fashion-MNIST"}
    came, law = (
        next(row for row in such(rows, method=name, **pixel) if "auroc" in row)["mean"]
        for name in ("gradient_norms", "expected_norms")
    )
    return (
        "What the model expects of the norm, from a forward pass, detects more than the norm that "
        f"came: {auroc(mean(rows, 'expected_norms'))} and {auroc(mean(rows, 'gradient_norms'))} "
        f"of six models, {auroc(law)} and {auroc(came)} of the PixelCNN of Fashion-MNIST."
    )


def backward(rows: Sequence[Row]) -> str:
    cost = {
        name: max(max(r["forwards"].values()) for r in such(rows, method=name) if "forwards" in r)
        for name in ("both", "forward")
    }
    return (
        f"It takes a little: {auroc(mean(rows, 'both'))} with it, "
        f"{auroc(mean(rows, 'forward'))} without, for at most {cost['both']:.1f} and "
        f"{cost['forward']:.1f} forward passes."
    )


def parts(rows: Sequence[Row]) -> str:
    found = {row["method"]: row["mean"] for row in such(rows, model="normflows spline")}
    return (
        f"Of a coupling spline values alone have {auroc(found['values'])}, joined with expected "
        f"norms ({auroc(found['expected_norms'])} alone) {auroc(found['forward'])}."
    )


def more_samples(rows: Sequence[Row]) -> str:
    found = such(rows, question="fit size", model="PixelCNN")
    few, many = found[0], found[-1]
    return (
        f"More samples, less shrinkage, worse detection: a Ledoit-Wolf covariance of the "
        f"PixelCNN's norms has {auroc(few['Ledoit-Wolf'])} with {few['samples']} samples and "
        f"{auroc(many['Ledoit-Wolf'])} with {many['samples']}."
    )


def training(rows: Sequence[Row]) -> str:
    found = such(rows, question="undertraining", model="PixelCNN")
    first, last = found[0], found[-1]
    return (
        f"A PixelCNN of {first['steps']} steps detects by typicality "
        f"{auroc(first['typicality'])}, of {last['steps']} steps {auroc(last['typicality'])}."
    )


def noise(rows: Sequence[Row]) -> str:
    names = ("without noise", "gradient_norms", "MSMA, 10 levels")
    ours, norms, msma = (mean(rows, name) for name in names)
    return (
        f"Two passes without any noise: {auroc(ours)} of all denoisers, where gradient norms of "
        f"the noisy bound have {auroc(norms)} for three times the cost, and ten noisy levels "
        f"(MSMA) {auroc(msma)}."
    )


def levels(rows: Sequence[Row]) -> str:
    v = {row["method"]: row["mean"] for row in such(rows, model="latent, v") if "auroc" in row}
    return (
        f"Of latents that predict v two levels of MSMA have {auroc(v['MSMA, 2 levels'])}, ten "
        f"{auroc(v['MSMA, 10 levels'])}."
    )


def independent(rows: Sequence[Row]) -> str:
    glow = only(rows, shown="fisher", model="Glow", on="Fashion-MNIST")
    return (
        f"In a Glow the Fisher information's diagonal is {glow['diagonal_over_off_diagonal']:g} "
        f"times its other elements, and the mean correlation between layers "
        f"{auroc(glow['between_layers'])}; independent ones would show "
        f"{auroc(glow['if_independent'])}."
    )


def representation(rows: Sequence[Row]) -> str:
    change = "RGB to HSV"
    told = only(rows, shown="invariance", change=change)
    before, after = (
        only(rows, shown="representation", change=each, method="log-likelihood")["auroc"]["GTSRB"]
        for each in ("as they are", change)
    )
    bits = " to ".join(f"{value:.2f}" for value in told["bits_per_dimension"])
    return (
        f"The same Glow, told its colours as HSV, goes from {bits} bits per dimension, and its "
        f"likelihood finds traffic signs by {auroc(after)} in place of {auroc(before)}; gradient "
        f"norms differ by {told['norms_relative_difference']:.0e}."
    )


def complexity(rows: Sequence[Row]) -> str:
    found = [r for r in such(rows, method="likelihood + complexity") if "auroc" in r]
    low = min(found, key=lambda row: row["mean"])
    high = max(found, key=lambda row: row["mean"])
    return (
        f"Of a {high['model']} of {high['on']} yes, {auroc(high['mean'])}; of a {low['model']} of "
        f"{low['on']} {auroc(low['mean'])}, far worse than chance."
    )


def text(rows: Sequence[Row]) -> str:
    low = only(rows, method="-log p", features="none")["mean"]
    norms = only(rows, method="gradient_norms", features="detector")["mean"]
    return f"Not of text: - log p has {auroc(low)}, gradient norms {auroc(norms)}."


def two_sided(rows: Sequence[Row]) -> str:
    low, both = mean(rows, "- log p"), mean(rows, "values, expected_norms")
    return (
        f"Rows have no paradox: one-sided - log p has {auroc(low)}, the parts that are best for "
        f"images {auroc(both)}, the paper {auroc(mean(rows, 'paper'))}."
    )


def no_pytorch(rows: Sequence[Row]) -> str:
    low, gaussian = (only(rows, method=m)["mean"] for m in ("- log p", "Gaussian, no model"))
    return (
        f"A flow in JAX gives one number a galaxy, and that has {auroc(low)} where a Gaussian of "
        f"the same columns has {auroc(gaussian)}."
    )


def larger(rows: Sequence[Row]) -> str:
    """On the sets that both were shown."""
    near = {"near copies": True, "known": "human"}
    names = list(only(rows, model="IgLM", method="forward", **near)["auroc"])

    def means(method: str) -> list[str]:
        found = (only(rows, model=m, method=method, **near)["auroc"] for m in ("IgLM-S", "IgLM"))
        return [auroc(statistics.mean(each[name] for name in names)) for each in found]

    ours, low = (" and ".join(means(method)) for method in ("forward", "- log p"))
    return (
        f"Hardly: an antibody model and one of nine times the weights have {ours} on the same "
        f"{len(names)} sets, and by - log p alone {low}."
    )


def chosen(rows: Sequence[Row]) -> str:
    found = only(rows, score="- log p", **{"validation samples": 300})
    return (
        f"{percent(found['promised'])} were promised; calibrated by 300 samples that chose the "
        f"checkpoint - log p flags {100 * found['flagged, by data that chose']:.2f} %, by others "
        f"{100 * found['flagged, by data that chose nothing']:.2f} %."
    )


def repeated(rows: Sequence[Row]) -> str:
    found = next(row for row in rows if row["method"].startswith("KS p"))
    alarms = next(iter(found["changes"].values()))["false alarms in 1 000 before"]
    return (
        f"Asked every hundred samples it raises {alarms:g} false alarms in a thousand samples, and "
        f"one within ten thousand in {percent(found['in control']['alarm within 10000'])} of "
        f"streams."
    )


def listed() -> Iterator[Guess]:
    yield Guess(
        "A large gradient norm marks what was not learned", "detection.evidence", total_norm
    )
    yield Guess("A norm that came says more than one expected", "detection.forward", expected)
    yield Guess("A backward pass can only add", "detection.forward", backward)
    yield Guess("One more part does no harm", "detection.no_law", parts)
    yield Guess("More held-out samples detect better", "detection.questions", more_samples)
    yield Guess("A better trained model detects better", "detection.questions", training)
    yield Guess("A denoiser has to be shown noise", "detection.denoisers", noise)
    yield Guess("More noise levels detect more", "detection.denoisers", levels)
    yield Guess("Layers are nearly independent", "detection.paper", independent)
    yield Guess(
        "How images are stored is no matter to a likelihood",
        "detection.colour_glow",
        representation,
    )
    yield Guess("A compressor's size mends the likelihood", "detection.forward", complexity)
    yield Guess("Likelihood misleads everywhere", "detection.text", text)
    yield Guess("What mends images mends tables", "detection.tables", two_sided)
    yield Guess(
        "One number of a model is not worth having", "detection.published.galaxies", no_pytorch
    )
    yield Guess("A larger model detects better", "detection.published.antibodies", larger)
    yield Guess(
        "Validation data that chose a checkpoint calibrate as well", "detection.chosen_by", chosen
    )
    yield Guess(
        "p < .05 is a 5 % false-alarm rate of a stream", "drift.e_detector", repeated, "drift"
    )


GUESSES = tuple(listed())
