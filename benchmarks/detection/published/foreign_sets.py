"""Sets of sequences that a model of heavy chains is shown, beside what it knows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.detection.published.sequences import RESIDUES, Pools, clones, loop, tail

#: Three splits of what is known, by clone: shares that fit and that calibrate; the rest tests.
SEEDS, FIT, CALIBRATION = (0, 1, 2), 0.6, 0.2

Change = Callable[[str, np.random.Generator], str]


@dataclass(frozen=True)
class Given:
    """One set.

    Attributes:
        sequences: N of them.
        parents: Of each the index of the known sequence that it was made of; none of real ones.
    """

    sequences: list[str]
    parents: list[int]

    def of(self, test: set[int]) -> np.ndarray:
        """Which are shown beside a test set: real ones, or changes of its own sequences."""
        if not self.parents:
            return np.arange(len(self.sequences))
        return np.array([i for i, parent in enumerate(self.parents) if parent in test], dtype=int)


@dataclass(frozen=True)
class Split:
    """Indices of known sequences."""

    fit: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def splits(known: list[str]) -> list[Split]:
    """No clone is in two parts of one."""
    owner = np.array(clones(known))
    found = []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(np.unique(owner))
        rank = {clone: i for i, clone in enumerate(order)}
        by_rank = np.argsort([rank[each] for each in owner], kind="stable")
        ends = [clean_end(owner[by_rank], share) for share in (FIT, FIT + CALIBRATION)]
        found.append(Split(*np.split(by_rank, ends)))
    return found


def clean_end(owner: np.ndarray, share: float) -> int:
    """Where a share ends, behind the clone that it falls into."""
    end = int(share * len(owner))
    while end < len(owner) and owner[end] == owner[end - 1]:
        end += 1
    return end


def real(pools: Pools, known: str, count: int) -> dict[str, Given]:
    """Sets that were sequenced, at most so many of each."""
    other = "mouse" if known == "human" else "human"
    named = {
        f"{other} heavy": [f"natural {other} IGHV"],
        "neither species": ["natural neither IGHV"],
        f"{known} kappa": [f"natural {known} IGKV", f"paired {known} IGKV"],
        f"{known} lambda": [f"natural {known} IGLV", f"paired {known} IGLV"],
        "T-cell receptors": [f"receptor neither IG{kind}V" for kind in "HKL"],
        "other proteins": ["proteins"],
        "therapeutic": [f"therapeutic {known} IGHV"],
    }
    if known == "human":
        named |= {"neutralising HIV": ["neutralising"], "reads without a beginning": ["reads"]}
    generator = np.random.default_rng(0)
    found = {}
    for name, keys in named.items():
        every = [each for key in keys for each in pools.get(key, [])]
        chosen = generator.permutation(len(every))[:count]
        found[name] = Given([every[i] for i in chosen], [])
    return found


def changed(pools: Pools, known: list[str], species: str, per_split: int) -> dict[str, Given]:
    """Changes of known sequences that test in some split, so many of each split."""
    generator = np.random.default_rng(1)
    chosen = {
        int(i) for split in splits(known) for i in generator.permutation(split.test)[:per_split]
    }
    parents = sorted(i for i in chosen if tail(known[i]))
    changes = CHANGES | {
        f"{name} V gene": grafted(pools[f"{name} V genes"])
        for name in dict.fromkeys((species, "macaque"))
    }
    changes["loop of another"] = with_loop([loop(known[i]) for i in parents])
    return {
        name: Given([change(known[i], generator) for i in parents], parents)
        for name, change in changes.items()
    }


def mutated(count: int) -> Change:
    """So many residues replaced by any others."""

    def change(sequence: str, generator: np.random.Generator) -> str:
        letters = list(sequence)
        for i in generator.permutation(len(letters))[:count]:
            others = [each for each in RESIDUES if each != letters[i]]
            letters[i] = others[generator.integers(len(others))]
        return "".join(letters)

    return change


def swapped(sequence: str, generator: np.random.Generator) -> str:
    """Two blocks of ten residues that follow each other."""
    i = int(generator.integers(len(sequence) - 20))
    return sequence[:i] + sequence[i + 10 : i + 20] + sequence[i : i + 10] + sequence[i + 20 :]


def shuffled(sequence: str, generator: np.random.Generator) -> str:
    return "".join(generator.permutation(list(sequence)))


def grafted(genes: list[str]) -> Change:
    """A germline V gene, unmutated, with the third loop and the end of a known sequence."""

    def change(sequence: str, generator: np.random.Generator) -> str:
        gene = genes[generator.integers(len(genes))]
        return gene[: gene.rindex("C") + 1] + (tail(sequence) or "")

    return change


def with_loop(loops: list[str]) -> Change:
    def change(sequence: str, generator: np.random.Generator) -> str:
        own, other = loop(sequence), loops[generator.integers(len(loops))]
        at = sequence.rindex(own)
        return sequence[:at] + other + sequence[at + len(own) :]

    return change


CHANGES: dict[str, Change] = {
    "1 mutation": mutated(1),
    "3 mutations": mutated(3),
    "10 mutations": mutated(10),
    "blocks swapped": swapped,
    "shuffled": shuffled,
    "reversed": lambda sequence, _: sequence[::-1],
    "first 20 cut": lambda sequence, _: sequence[20:],
    "last 15 cut": lambda sequence, _: sequence[:-15],
}

#: Those that are measured of the larger models, whose passes cost most.
FEW = (
    *("mouse heavy", "neither species", "human kappa", "T-cell receptors", "therapeutic"),
    *("1 mutation", "10 mutations", "blocks swapped", "first 20 cut", "human V gene"),
    *("generated at 0.5", "generated at 1", "generated at 1.5"),
)
