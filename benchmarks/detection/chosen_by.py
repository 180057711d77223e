"""What it costs that the validation data which calibrate a detector also chose the checkpoint.

An autoregressive flow of rows is trained on a thousand of them, until it overfits; 50 checkpoints
are kept, and the one with the best mean log-likelihood of a validation set is taken. A detector
of it is calibrated on that very set, and beside it on another of the same size, which has chosen
nothing. What is counted is the share of fresh rows flagged at fpr .01. Rows are drawn from a law,
as many as are needed: validation sets are disjoint, so that repetitions are independent given the
trainings; standard errors are of the trainings' means.

Scores are "- log p", the worst case, since it is what the choice was made by, where the whole set
calibrates; and those of a detector as it is by default, of which one half of the set fits the
density and the other calibrates. A full run takes eight minutes on one core.

    python -m benchmarks.detection.chosen_by --json benchmarks/results/chosen_by.json
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import zuko
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

import ood_monitor as om
from benchmarks.harness.measurement import claim, reported
from ood_monitor.calibration import ConformalPValue

Array = NDArray[np.float64]
Row = dict[str, Any]

FPR, WIDTH, TRAINED_ON, CHECKPOINTS, EVERY = 0.01, 6, 1_000, 50, 12


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        trainings: Each from its own rows and seed.
        sizes: Of validation sets.
        pool: Rows of which the validation sets of a training are cut.
        fresh: Rows that are flagged or not.
        fits: Validation sets by which the default detector is measured, for each training.
    """

    trainings: int
    sizes: tuple[int, ...]
    pool: int
    fresh: int
    fits: int


FULL = Plan(10, (300, 1_000, 5_000), 100_000, 200_000, 8)
QUICK = Plan(2, (300,), 1_200, 10_000, 2)

#: Fresh rows for each detector.
FOR_EACH = 5_000


def rows(count: int, *seed: int) -> Tensor:
    """Of a law with bends and unlike scales, (count, WIDTH)."""
    z = torch.as_tensor(np.random.default_rng(seed).normal(size=(count, WIDTH))).float()
    bent = z + 0.7 * torch.roll(z, 1, dims=1).square() - 0.5 * torch.sin(2 * torch.roll(z, 2, 1))
    return bent / bent.new_tensor([1.0, 1.5, 2.0, 1.0, 1.5, 2.0])


def checkpoints(seed: int) -> Iterator[nn.Module]:
    """A flow as it is every few steps of a training."""
    torch.manual_seed(seed)
    flow = zuko.flows.MAF(WIDTH, transforms=2, hidden_features=(32, 32))
    data = rows(TRAINED_ON, seed, 0)
    optimiser = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(CHECKPOINTS):
        for _ in range(EVERY):
            batch = data[torch.randint(len(data), (128,))]
            optimiser.zero_grad()
            loss = -flow().log_prob(batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        yield copy.deepcopy(flow).eval()


class Training:
    """A training's checkpoints, and the validation and the fresh rows that they are asked about.

    Attributes:
        validation: (pool, WIDTH).
        fresh: (fresh, WIDTH).
        scores: - log p by each checkpoint, (CHECKPOINTS, pool).
    """

    def __init__(self, index: int, plan: Plan) -> None:
        self.flows = list(checkpoints(index))
        self.validation = rows(plan.pool, index, 1)
        self.fresh = rows(plan.fresh, index, 2)
        self.scores = np.stack([scores(flow, self.validation) for flow in self.flows])
        self._of_fresh: dict[int, Array] = {}

    def of_fresh(self, checkpoint: int) -> Array:
        """- log p of the fresh rows, (fresh,)."""
        if checkpoint not in self._of_fresh:
            self._of_fresh[checkpoint] = scores(self.flows[checkpoint], self.fresh)
        return self._of_fresh[checkpoint]

    def sets(self, size: int) -> Iterator[tuple[int, slice, slice]]:
        """The checkpoint that each validation set chooses, the set, and another."""
        count = self.scores.shape[1] // size
        for i in range(count):
            own, other = (slice(j * size, (j + 1) * size) for j in (i, (i + 1) % count))
            yield int(self.scores[:, own].mean(1).argmin()), own, other


@torch.no_grad()
def scores(flow: Any, x: Tensor) -> Array:
    return np.concatenate([-flow().log_prob(part).double().numpy() for part in x.split(10_000)])


def by_likelihood(training: Training, size: int) -> Iterator[tuple[float, float, int]]:
    """Shares flagged, by the set that chose and by the other, and the checkpoint."""
    for chosen, *sets in training.sets(size):
        found = training.of_fresh(chosen)
        shares = [
            float((ConformalPValue.fit(training.scores[chosen, s]).p_value(found) <= FPR).mean())
            for s in sets
        ]
        yield shares[0], shares[1], chosen


def by_default(training: Training, size: int, fits: int) -> Iterator[tuple[float, float, int]]:
    """As there, by detectors as they are by default, of other fresh rows each time."""
    groups = training.fresh.split(FOR_EACH)[:fits]
    for fresh, (chosen, *sets) in zip(groups, training.sets(size), strict=False):
        shares = []
        for one in sets:
            adapter = om.LogLikelihood(training.flows[chosen], lambda flow, x: flow().log_prob(x))
            held_out = training.validation[one].split(1_000)
            detector = om.Detector(adapter, explain=0).fit(held_out, progress=False)
            p_values = torch.cat([detector.score(part).p_value for part in fresh.split(1_000)])
            shares.append(float((p_values <= FPR).double().mean()))
        yield shares[0], shares[1], chosen


def row(
    score: str, size: int, calibrating: int, found: list[list[tuple[float, float, int]]]
) -> Row:
    # A mean for each training: its repetitions share checkpoints and fresh rows.
    chose, other, _ = np.array([np.mean(each, axis=0) for each in found]).T
    excess = chose - other
    return {
        "score": score,
        "validation samples": size,
        "trainings": len(found),
        "repetitions": sum(map(len, found)),
        "promised": round(math.floor(FPR * (calibrating + 1)) / (calibrating + 1), 5),
        "flagged, by data that chose": round(float(chose.mean()), 5),
        "standard error": error(chose),
        "flagged, by data that chose nothing": round(float(other.mean()), 5),
        "its standard error": error(other),
        "excess": round(float(excess.mean()), 5),
        "excess's standard error": error(excess),
        "checkpoints chosen": float(np.mean([len({c for *_, c in each}) for each in found])),
    }


def error(values: Array) -> float:
    return round(float(values.std(ddof=1) / math.sqrt(len(values))), 5)


def measured(plan: Plan) -> Iterator[Row]:
    trainings = [Training(i, plan) for i in tqdm(range(plan.trainings), desc="trainings")]
    for size in plan.sizes:
        yield row("- log p", size, size, [list(by_likelihood(t, size)) for t in trainings])
    for size in plan.sizes:
        found = [list(by_default(t, size, plan.fits)) for t in trainings]
        yield row("default", size, size // 2, found)


def claims(told: list[Row]) -> list[Row]:
    off = max(
        abs(each["flagged, by data that chose nothing"] - each["promised"])
        / max(each["its standard error"], 1e-9)
        for each in told
    )
    errors = max(max(each["standard error"], each["its standard error"]) for each in told)
    excess = max(each["excess"] for each in told)
    return [
        claim(
            "by data that chose nothing: off the promise, standard errors, worst",
            round(off, 2),
            3.5,
        ),
        claim("standard error of a flagged share, worst", errors, 0.001),
        claim("more flagged by data that chose the checkpoint, share, worst", excess, 0.002),
    ]


def line(each: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in each.items())


def main(
    quick: Annotated[bool, typer.Option(help="Two trainings, one size.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    reported(measured(QUICK if quick else FULL), line, claims, output)


if __name__ == "__main__":
    typer.run(main)
