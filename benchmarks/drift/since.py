"""How well a drift alert says since when: distance of the estimate, coverage of the interval.

500 calibration scores and 400 samples are standard Gaussian; then something changes, until the
drift test alarms. Streams that alarm before are left out. Beside the posterior that alerts use
stands what the weights of the test's own bets would say of the same ranks.

    python -m benchmarks.drift.since --json benchmarks/results/drift_since.json
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.drift.bets import EVEN, log_middle_bet, log_power_bet, simple_jumper
from ood_monitor.drift.change import Since, likeliest, since_when
from ood_monitor.drift.e_detector import EDetector

CALIBRATION, BEFORE, LONGEST, ERT = 500, 400, 5_000, 10_000
RUNS, QUICK_RUNS = 200, 10

_Array = NDArray[np.float64]

CHANGES: dict[str, Callable[[np.random.Generator, int], _Array]] = {
    "mean by 2 standard deviations": lambda g, n: g.normal(2, 1, n),
    "mean by 1": lambda g, n: g.normal(1, 1, n),
    "mean by -1": lambda g, n: g.normal(-1, 1, n),
    "mean by 0.5": lambda g, n: g.normal(0.5, 1, n),
    "mean by 0.3": lambda g, n: g.normal(0.3, 1, n),
    "one of ten by 4": lambda g, n: g.normal(4.0 * (g.random(n) < 0.1), 1),
    "variance 2.25": lambda g, n: g.normal(0, 1.5, n),
    "variance 0.25": lambda g, n: g.normal(0, 0.5, n),
}


def ranks_at_alarm(change: str, seed: int) -> tuple[_Array, int] | None:
    """Ranks of all samples, and how many came since the change; None without an alarm after it."""
    generator = np.random.default_rng([seed, list(CHANGES).index(change)])
    detector = EDetector(generator.normal(size=CALIBRATION), ert=ERT, seed=seed)
    after = CHANGES[change](generator, LONGEST)
    ranks = []
    for n, score in enumerate([*generator.normal(size=BEFORE), *after]):
        found = detector.update(score)
        ranks.append(found.p_value)
        if found.alarm:
            return None if n < BEFORE else (np.array(ranks), n - BEFORE)
    return None


def by_bets(ranks: _Array) -> Since:
    """By the mean over the bettors of what each would own had it begun to bet at a sample."""
    weights, rows = EVEN, []
    for p in ranks:
        jump, weights = simple_jumper(weights, p)
        complement = max(1 - p, 1e-12)
        middle = log_middle_bet(p, complement)
        rows.append((log_power_bet(p), log_power_bet(complement), jump, middle))
    return likeliest(np.logaddexp.reduce(np.cumsum(np.array(rows)[::-1], axis=0), axis=1))


def figures(found: list[Since], true: list[int]) -> dict[str, float]:
    inside = [s.latest <= at <= s.earliest for s, at in zip(found, true, strict=True)]
    return {
        "median distance": float(
            np.median([abs(s.estimate - at) for s, at in zip(found, true, strict=True)])
        ),
        "coverage": round(float(np.mean(inside)), 3),
        "median width": float(np.median([s.earliest - s.latest + 1 for s in found])),
    }


def cell(change: str, runs: int) -> dict[str, Any]:
    found = [each for seed in range(runs) if (each := ranks_at_alarm(change, seed))]
    true = [at for _, at in found]
    row: dict[str, Any] = {
        "change": change,
        "streams": len(found),
        "median delay": float(np.median(true)),
        "posterior": figures([since_when(ranks) for ranks, _ in found], true),
        "bets": figures([by_bets(ranks) for ranks, _ in found], true),
    }
    typer.echo(str(row))
    return row


def main(
    quick: Annotated[bool, typer.Option(help="A few runs.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    rows = [cell(change, QUICK_RUNS if quick else RUNS) for change in CHANGES]
    by_name = {row["change"]: row["posterior"] for row in rows}
    least = min(each["coverage"] for each in by_name.values())
    one, half = by_name["mean by 1"], by_name["mean by 0.5"]
    claims = [
        claim("median distance at one standard deviation, samples", one["median distance"], 4),
        claim("median distance at half of one", half["median distance"], 20),
        claim("least coverage, of .8", round(0.8 / least, 3), 1.0),
    ]
    conclude({"machine": machine(), "rows": rows, "claims": claims}, output)


if __name__ == "__main__":
    typer.run(main)
