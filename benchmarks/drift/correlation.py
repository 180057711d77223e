"""How long the drift test runs to an alarm while nothing changes but neighbours are alike.

Scores in control are a stationary Gaussian sequence of first order: each is rho times the one
before plus noise, so that their own law is that of 500 independent calibration scores. Runs are cut
off at twice the promise, so that a mean near it is a lower bound.
`ood_monitor.drift.correlation` holds the table that this gives.

    python -m benchmarks.drift.correlation --json benchmarks/results/drift_correlation.json
"""

import math
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.signal import lfilter

from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.drift.correlation import CORRELATIONS, MEAN_RUN_TIMES, RUN_TIMES
from ood_monitor.drift.e_detector import EDetector

CALIBRATION, RUNS, QUICK_RUNS = 500, 100, 5


def stream(correlation: float, length: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """(length,), each standard Gaussian."""
    noise = generator.normal(size=length) * math.sqrt(1 - correlation**2)
    noise[0] = generator.normal()
    found: NDArray[np.float64] = lfilter([1.0], [1.0, -correlation], noise)
    return found


def run_length(correlation: float, ert: int, seed: int) -> int:
    """Samples to the first alarm, or twice the promise."""
    generator = np.random.default_rng([seed, ert, round(100 * correlation)])
    detector = EDetector(generator.normal(size=CALIBRATION), ert=ert, seed=seed)
    scores = stream(correlation, 2 * ert, generator)
    alarms = (n for n, score in enumerate(scores, 1) if detector.update(score).alarm)
    return next(alarms, 2 * ert)


def cell(ert: int, correlation: float, runs: int) -> dict[str, Any]:
    lengths = [run_length(correlation, ert, seed) for seed in range(runs)]
    row = {
        "promised": ert,
        "correlation": correlation,
        "mean run length, at least": round(float(np.mean(lengths))),
        "standard error": round(float(np.std(lengths, ddof=1)) / math.sqrt(runs)),
        "runs": runs,
    }
    typer.echo(str(row))
    return row


def main(
    quick: Annotated[bool, typer.Option(help="The shortest promise, a few runs.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    promised, runs = (RUN_TIMES[:1], QUICK_RUNS) if quick else (RUN_TIMES, RUNS)
    rows = [cell(ert, rho, runs) for ert, rho in product(promised, CORRELATIONS)]
    told = np.array(MEAN_RUN_TIMES[: len(promised)], dtype=float).reshape(-1)
    found = np.array([row["mean run length, at least"] for row in rows])
    text = "mean run length beside the table that alerts quote, times, worst"
    worst = float(np.exp(np.abs(np.log(found / told)).max()))
    claims = [claim(text, round(worst, 2), 2.0 if not quick else 10.0)]
    conclude({"machine": machine(), "rows": rows, "claims": claims}, output)


if __name__ == "__main__":
    typer.run(main)
