"""How long the drift test runs to a false alarm once its history has stopped growing.

The theorem asks for a history that grows with the stream. Here it is frozen from the start, the
worst case: scores are independent and in control, ranked against the same few hundred or thousand
for ever. Runs are cut off, so that a mean is a lower bound. The recursion is that of
`ood_monitor.EDetector`, for all runs at once; a run checks first that it gives what the detector
does.

    python -m benchmarks.drift.history --json benchmarks/results/drift_history.json
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from tqdm.auto import tqdm

from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.drift.bets import JUMP
from ood_monitor.drift.e_detector import EDetector

#: History, promised run time, runs, and where they are cut off.
CELLS = [
    (100, 1_000, 400, 20_000),
    (500, 1_000, 400, 20_000),
    (5_000, 1_000, 400, 20_000),
    (500, 10_000, 200, 60_000),
    (5_000, 10_000, 200, 60_000),
]
QUICK = [(100, 100, 20, 1_000)]
BLOCK = 1_000


class Runs:
    """The four sums of many runs at once, (4, R), and the Simple Jumper's shares, (3, R)."""

    def __init__(self, runs: int) -> None:
        self.log1p_sums, self.weights = np.zeros((4, runs)), np.full((3, runs), 1 / 3)

    def step(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log of the average sum after p-values (R,), (R,)."""
        weights = (1 - JUMP) * self.weights + JUMP / 3
        weights[0] *= 1.5 - p
        weights[2] *= 0.5 + p
        jumper = weights.sum(0)
        self.weights = weights / jumper
        powers = [0.5 / np.sqrt(p), 0.5 / np.sqrt(1 - p)]
        log_sums = self.log1p_sums + np.log([*powers, jumper, 6 * p * (1 - p)])
        self.log1p_sums = np.logaddexp(0, log_sums)
        return np.logaddexp.reduce(log_sums) - math.log(4)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        self.log1p_sums, self.weights = self.log1p_sums[:, chosen], self.weights[:, chosen]


def run_lengths(history: int, ert: float, runs: int, cap: int) -> NDArray[np.float64]:
    """Samples to the first alarm of each run; the cap if there is none."""
    generator = np.random.default_rng([history, int(ert)])
    known = np.sort(generator.random((runs, history)), axis=1)
    lengths, alive, state = np.full(runs, float(cap)), np.arange(runs), Runs(runs)
    for start in tqdm(range(0, cap, BLOCK), desc=f"history {history}, ert {ert}", leave=False):
        p = ranks(known[alive], generator)
        alarmed = np.zeros(len(alive), dtype=bool)
        for t, column in enumerate(p.T, start + 1):
            new = (state.step(column) >= math.log(ert)) & ~alarmed
            lengths[alive[new]] = t
            alarmed |= new
        state.keep(~alarmed)
        alive = alive[~alarmed]
        if not len(alive):
            break
    return lengths


def ranks(known: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Smoothed ranks of new scores among those known, (R, BLOCK)."""
    scores, u = generator.random((2, len(known), BLOCK))
    pairs = zip(known, scores, strict=True)
    less = np.stack([np.searchsorted(mine, new) for mine, new in pairs])
    return (known.shape[1] - less + 1 - u) / (known.shape[1] + 1)


def check() -> None:
    """Refuse to measure anything but what the detector does.

    Raises:
        AssertionError: The recursion gives other numbers.
    """
    generator = np.random.default_rng(0)
    detector, runs = EDetector(generator.random(100), ert=1_000), Runs(1)
    for evidence in detector.update_many(generator.random(200)):
        found = runs.step(np.array([evidence.p_value]))[0]
        np.testing.assert_allclose(found, evidence.log_e_value, rtol=1e-9, atol=1e-9)


def cell(history: int, ert: int, runs: int, cap: int) -> dict[str, Any]:
    lengths = run_lengths(history, ert, runs, cap)
    error = lengths.std(ddof=1) / math.sqrt(runs)
    row = {
        "history": history,
        "promised": ert,
        "mean run length, at least": round(float(lengths.mean())),
        "standard error": round(float(error)),
        "cut off": round(float((lengths == cap).mean()), 4),
        "runs": runs,
    }
    typer.echo(str(row))
    return row


def main(
    quick: Annotated[bool, typer.Option(help="A few short runs.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    check()
    rows = [cell(*numbers) for numbers in (QUICK if quick else CELLS)]
    short = max(
        (row["promised"] - row["mean run length, at least"]) / row["standard error"]
        for row in rows
        if row["history"] >= 500 or quick
    )
    text = "history of 500 and more: mean run length below the promise, standard errors, worst"
    claims = [claim(text, round(short, 2), 3.0)]
    conclude({"machine": machine(), "rows": rows, "claims": claims}, output)


if __name__ == "__main__":
    typer.run(main)
