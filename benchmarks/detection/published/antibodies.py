"""Published antibody language models, and what they do not know.

The two GPTs of `iglm` 0.1.0 (1.4 and 12.9 million weights) and the BERT of `antiberty` 0.1.3 (26
million), told that all they see are heavy chains of human (once: of mouse), on sequences that real
laboratories sequenced. Nothing was trained here and nothing chosen by these sets but, earlier, that
sequences are judged by values and expected norms (on two of these models).

`make published` brings models and sequences into an environment of their own; a run takes
twenty minutes on one core, goes on where it was interrupted, and keeps what it measured in
`runs/published/measured`, which is to be removed when a model or the library has changed.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.covariance import LedoitWolf

import ood_monitor as om
from benchmarks.detection import forward
from benchmarks.detection.known_data import surprise
from benchmarks.detection.protocol import auroc
from benchmarks.detection.published import foreign_sets, models, sequences
from benchmarks.detection.published.foreign_sets import SEEDS, Given, Split
from benchmarks.detection.published.models import Language
from benchmarks.detection.published.sequences import RESIDUES, Pools, words_of
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.calibration import ConformalPValue
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.plan import planned

Row = dict[str, Any]
Array = np.ndarray
#: Scores of all sequences of each set, after a fit to some of "known".
Scored = Callable[[Array], Mapping[str, Array]]

#: What is compared, by name: arguments of a detector.
COMPARED: dict[str, dict[str, Any]] = {
    "forward": {"method": "forward"},
    "gradient_norms": {"method": "gradient_norms"},
    "both": {"method": "both"},
    "values": {"parts": ["values"]},
    "expected_norms": {"parts": ["expected_norms"]},
    "- log p": {"parts": ["log_likelihood"]},
    "forward, low - log p too": {"parts": ["values", "expected_norms", "log_likelihood"]},
    "paper": {"method": "gradient_norms", "density": om.DiagonalGaussian()},
}
WITH_GRADIENTS = ("gradient_norms", "both", "paper")

#: A near copy has so many of its 3-mers in one sequence that fits.
COPY = 0.8
RATE, TEMPERATURES, BATCH = 0.05, (0.5, 0.8, 1.0, 1.2, 1.5), 50
KNOWN = "known"


@dataclass(frozen=True)
class Sizes:
    """Sequences of a real set, changed ones a split, generated ones, and known ones."""

    real: int = 120
    changed: int = 45
    generated: int = 100
    known: int = 735


@dataclass(frozen=True)
class Case:
    """A model and what it is to know.

    Attributes:
        name: Of the model.
        make: Gives it.
        species: Of the known heavy chains.
        gradients: Whether norms are taken, which cost most.
        every: Whether all sets are measured, or `foreign_sets.FEW`.
        sizes: How many sequences.
    """

    name: str
    make: Callable[[], Language]
    species: str = "human"
    gradients: bool = True
    every: bool = True
    sizes: Sizes = Sizes()

    def takes(self, name: str) -> bool:
        """Whether a set is measured."""
        return self.every or name in foreign_sets.FEW

    @property
    def key(self) -> str:
        return f"{self.name} of {self.species}".replace(" ", "-")


#: Of the largest model.
FEWER = Sizes(real=60, changed=25, known=360)

CASES = (
    Case("IgLM-S", lambda: models.iglm("IgLM-S")),
    Case("IgLM-S", lambda: models.iglm("IgLM-S", "MOUSE"), "mouse"),
    Case("IgLM", lambda: models.iglm("IgLM"), gradients=False, every=False),
    Case("AntiBERTy", models.antiberty, gradients=False, every=False, sizes=FEWER),
)


def sets_of(case: Case, pools: Pools, language: Language) -> dict[str, Given]:
    """The known sequences, then the others."""
    sizes = case.sizes
    keys = [f"natural {case.species} IGHV", f"paired {case.species} IGHV"]
    known = list(dict.fromkeys(each for key in keys for each in pools.get(key, [])))
    known = [known[i] for i in np.random.default_rng(0).permutation(len(known))[: sizes.known]]
    found = foreign_sets.real(pools, case.species, sizes.real)
    found |= foreign_sets.changed(pools, known, case.species, sizes.changed)
    found = {name: it for name, it in found.items() if case.takes(name)}
    for i, temperature in enumerate(TEMPERATURES):
        name = f"generated at {temperature:g}"
        if language.causal and case.takes(name):
            own = language.generated(sizes.generated, temperature, seed=i)
            found[name] = Given([each for each in own if len(each) > 20], [])
    return {KNOWN: Given(known, [])} | {name: it for name, it in found.items() if it.sequences}


def measured(
    case: Case, language: Language, sets: Mapping[str, Given], folder: Path | None
) -> dict[str, Measurements]:
    """All that the methods take, of each set; kept in a folder, if any, as soon as it is known."""
    kinds = ["values", "expected_norms", "log_likelihood"]
    kinds += ["gradient_norms"] if case.gradients else []
    detector = om.Detector(language.adapter, parts=kinds, chunk_size=BATCH)
    found = {}
    for name, given in sets.items():
        file = None if folder is None else folder / named(case, kinds, given.sequences)
        if file is not None and file.exists():
            found[name] = Measurements.parse(file.read_bytes())
            continue
        starts = range(0, len(given.sequences), BATCH)
        parts = [detector.measure(language.tokens(given.sequences[i : i + BATCH])) for i in starts]
        found[name] = Measurements.together(parts)
        if file is not None:
            file.write_bytes(found[name].dump())
        typer.echo(f"measured {case.key}: {name}, {len(given.sequences)}")
    return found


def named(case: Case, kinds: list[str], these: list[str]) -> str:
    """A file's name, another one for whatever else is measured."""
    digest = hashlib.blake2b("\n".join([*kinds, *these]).encode(), digest_size=8)
    return f"{case.key}-{digest.hexdigest()}.measured"


def methods_of(case: Case, found: Mapping[str, Measurements]) -> dict[str, Scored]:
    """Detectors of the parts that were measured."""

    def scored(options: Mapping[str, Any]) -> Scored:
        def score(fit: Array) -> dict[str, Array]:
            method, density, parts = (options.get(k) for k in ("method", "density", "parts"))
            plan = planned("sequence", method, density, parts)
            joined = forward.fitted(plan, found[KNOWN].take(fit))
            return {name: joined.score(it) for name, it in found.items()}

        return score

    return {
        name: scored(options)
        for name, options in COMPARED.items()
        if case.gradients or name not in WITH_GRADIENTS
    }


def controls(sets: Mapping[str, Given]) -> dict[str, Scored]:
    """What needs no model."""
    counts = {
        name: np.array(
            [[*(s.count(r) / len(s) for r in RESIDUES), np.log(len(s))] for s in it.sequences]
        )
        for name, it in sets.items()
    }
    similarities = {name: similarity(it.sequences, sets) for name, it in sets.items()}

    def residues(fit: Array) -> dict[str, Array]:
        density = LedoitWolf().fit(counts[KNOWN][fit])
        return {name: density.mahalanobis(values) for name, values in counts.items()}

    def neighbours(fit: Array) -> dict[str, Array]:
        return {name: 1 - values[:, fit].max(1) for name, values in similarities.items()}

    return {"residue counts, no model": residues, "3-mer neighbour, no model": neighbours}


def similarity(of: list[str], sets: Mapping[str, Given]) -> Array:
    """The share of each sequence's 3-mers that each known sequence has, (N, known)."""
    known = [words_of(each) for each in sets[KNOWN].sequences]
    own = [words_of(each) for each in of]
    return np.array([[len(a & b) / max(len(a), 1) for b in known] for a in own])


def rows_of(case: Case, pools: Pools, folder: Path | None) -> Iterator[Row]:
    """A row for each method, with near copies of what fits and without."""
    language = case.make()
    sets = sets_of(case, pools, language)
    found = measured(case, language, sets, folder)
    copies = {name: similarity(it.sequences, sets) for name, it in sets.items()}
    splits = foreign_sets.splits(sets[KNOWN].sequences)
    costs = costs_of(case, language, sets)
    for method, scored in (methods_of(case, found) | controls(sets)).items():
        scores = [scored(split.fit) for split in splits]
        for near in (True, False):
            yield {
                "model": case.name,
                "known": case.species,
                "method": method,
                "near copies": near,
                "counts": {name: len(it.sequences) for name, it in sets.items()},
                "forwards": costs.get(method),
                **surprise(found[KNOWN]),
            } | judged(scores, splits, sets, None if near else copies)


def judged(
    scores: list[Mapping[str, Array]],
    splits: list[Split],
    sets: Mapping[str, Given],
    copies: Mapping[str, Array] | None,
) -> Row:
    """AUROC by set, a mean of the splits that have enough; what is found and what is flagged."""
    each: dict[str, list[float]] = {name: [] for name in sets if name != KNOWN}
    found: list[float] = []
    flagged, left = [], []
    for its, split in zip(scores, splits, strict=True):
        p_value = ConformalPValue.fit(its[KNOWN][split.calibration]).p_value
        test = kept(split.test, KNOWN, split, copies)
        left.append(len(test) / len(split.test))
        flagged.append(float(np.mean(p_value(its[KNOWN][split.test]) <= RATE)))
        for name in each:
            chosen = kept(sets[name].of(set(split.test.tolist())), name, split, copies)
            if min(len(chosen), len(test)) >= 10:
                each[name].append(auroc(its[KNOWN][test], its[name][chosen]))
                found.append(float(np.mean(p_value(its[name][chosen]) <= RATE)))
    means = {name: round(statistics.mean(of), 4) for name, of in each.items() if of}
    return {
        "auroc": means,
        "mean": round(statistics.mean(means.values()), 4),
        "by split": [
            round(statistics.mean(of[i] for of in each.values() if len(of) == len(splits)), 4)
            for i in range(len(splits))
        ],
        f"found at {RATE:g}": round(statistics.mean(found), 4),
        f"flagged at {RATE:g}": round(statistics.mean(flagged), 4),
        "share of the test set": round(statistics.mean(left), 4),
    }


def kept(indices: Array, name: str, split: Split, copies: Mapping[str, Array] | None) -> Array:
    """Those that are no near copies of what fits; all if these may stay."""
    if copies is None or not len(indices):
        return indices
    return indices[copies[name][np.ix_(indices, split.fit)].max(1) < COPY]


def costs_of(case: Case, language: Language, sets: Mapping[str, Given]) -> dict[str, float]:
    """In plain forward passes of so many sequences at once, of the methods that are words."""
    tokens = language.tokens(sets[KNOWN].sequences[:16])
    return {
        name: forward.costs(om.Detector(language.adapter, **options), tokens)["B = 8"]
        for name, options in COMPARED.items()
        if name == options.get("method") and (case.gradients or name not in WITH_GRADIENTS)
    }


def others(output: Path | None, cases: tuple[Case, ...]) -> list[Row]:
    """Rows of a report that these models have no part in, which stay."""
    if output is None or not output.exists():
        return []
    names = [case.name for case in cases]
    return [r for r in json.loads(output.read_text())["rows"] if r["model"] not in names]


def line(row: Row) -> str:
    head = f"{row['model']:10}{row['known']:6}{row['method']:28}{'' if row['near copies'] else '-'}"
    rest = f"  found {row['found at 0.05']:.2f}  flagged {row['flagged at 0.05']:.3f}"
    return f"{head:46}mean {row['mean']:.4f}{rest}"


def claims(rows: list[Row]) -> list[Row]:
    """What `forward` was to reach, of the causal models, and what finds more than it."""
    found = []
    for case in dict.fromkeys((row["model"], row["known"]) for row in rows):
        of = {
            (row["method"], row["near copies"]): row
            for row in rows
            if (row["model"], row["known"]) == case
        }
        for near in (True, False):
            ours = of["forward", near]["mean"]
            rest = f"{' of '.join(case)}{'' if near else ', without near copies'}"
            found.append(claim(f"1 - mean AUROC of forward, {rest}", round(1 - ours, 4), 0.06))
            for other in ("gradient_norms", "3-mer neighbour, no model"):
                if (other, near) in of:
                    less = round(of[other, near]["mean"] - ours, 4)
                    found.append(claim(f"mean AUROC of {other} less forward's, {rest}", less, 0.0))
        words = f"share of known sequences flagged at {RATE:g} by forward, {' of '.join(case)}"
        found.append(claim(words, of["forward", True][f"flagged at {RATE:g}"], 0.08))
    return found


def made_up(count: int = 120) -> Pools:
    """Sequences that look a little like heavy chains, for a quick run."""
    generator = np.random.default_rng(0)
    letters = np.array(list(RESIDUES))

    def drawn(length: int) -> str:
        return "".join(generator.choice(letters, length))

    start, end = drawn(92) + "YYC", "WGQGTLVTVSS"
    change = foreign_sets.mutated(12)
    human = [change(start[:-1], generator) + "C" + drawn(8) + end for _ in range(count)]
    pools = {
        f"{name} V genes": [change(start[:-1], generator) + "C"] for name in ("human", "macaque")
    }
    other = [drawn(110) for _ in range(count)]
    return pools | {"natural human IGHV": human, "natural mouse IGHV": other, "proteins": other}


def main(
    quick: Annotated[bool, typer.Option(help="A tiny model and made-up sequences.")] = False,
    sources: Annotated[Path, typer.Option(help="Folder of the source distributions.")] = Path(
        "runs/published"
    ),
    model: Annotated[
        list[str] | None, typer.Option(help="A model; all if none. Rows of others stay.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    if quick:
        few = Sizes(real=30, changed=20, generated=12)
        cases, pools, folder = (Case("tiny", models.tiny, sizes=few),), made_up(), None
    else:
        pools, folder = sequences.read(sources), sources / "measured"
        folder.mkdir(exist_ok=True)
        cases = tuple(case for case in CASES if model is None or case.name in model)
    rows = others(output, cases) if model else []
    for case in cases:
        for row in rows_of(case, pools, folder):
            typer.echo(line(row))
            rows.append(row)
    report = {
        "machine": machine(),
        "command": "python -m benchmarks.detection.published.antibodies",
        "splits": len(SEEDS),
        "rows": rows,
        "claims": claims(rows),
    }
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
