"""How long the drift test runs to a false alarm, and how soon it finds a change, beside peers'.

In control: samples to the first false alarm against the promised run length, by the number of
calibration scores, for standard normal scores and for the scores that the default detector gives
held-out digits under a small Glow (both resampled with replacement: many ties). Runs are cut off,
so that a mean is a lower bound.

Out of control: 500 calibration scores, 1 000 normal ones, then 2 000 changed ones, alike for all
methods. A false alarm before the change starts the method anew; the delay is to the first alarm
after it. A method with a short run length owes some of its speed to false alarms.

A full run takes about 10 minutes of one core; `benchmarks/drift/peers.py` says how to install the
peers.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import torch
import typer
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

import ood_monitor as om
from benchmarks.drift.figures import MISSED, Row, figure, table
from benchmarks.drift.peers import Array, Method, Step, ours, peers
from benchmarks.harness.measurement import claim, conclude, machine

Draw: TypeAlias = Callable[[np.random.Generator, int], Array]

WITHIN = 10_000
CALIBRATION, AFTER = 500, MISSED
BLOCK = 250
LEVELS, TRAIN, FIT = 16, 800, 500  # the digits' grey levels, and how many are used for what
PACKAGES = ["river", "alibi-detect", "numpy", "scipy"]


@dataclass(frozen=True)
class Size:
    """Of a run.

    Attributes:
        runs: Streams in control by the run length promised.
        calibration: Numbers of calibration scores.
        epochs: Of the Glow.
        share: Of the streams of each method.
        passes: Of 1 000 updates, each timed.
    """

    runs: dict[int, int]
    calibration: tuple[int, ...]
    epochs: int
    share: float
    passes: int


FULL = Size({500: 400, 1000: 400, 10_000: 240}, (100, 500, 2000), 18, 1.0, 6)
QUICK = Size({500: 20}, (100, 500), 1, 0.01, 2)


def contaminated(generator: np.random.Generator, n: int) -> Array:
    return generator.normal(size=n) + 3.0 * (generator.random(n) < 0.1)


def normal(mean: float = 0.0, sd: float = 1.0) -> Draw:
    return lambda generator, n: generator.normal(mean, sd, n)


CHANGES: dict[str, Draw] = {
    "mean + 0.5 sd": normal(0.5),
    "mean + 1 sd": normal(1.0),
    "10 % at + 3 sd": contaminated,
    "variance x 2.25": normal(sd=1.5),
    "too typical (mean - 1 sd)": normal(-1.0),
    "less spread (sd x 0.5)": normal(sd=0.5),
}
CONTAMINATION = "10 % at + 3 sd"


def digit_scores(epochs: int) -> Array:
    """Scores of held-out digits, by a detector fitted on others of a Glow trained on yet others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor(load_digits().images / LEVELS, dtype=torch.float32).unsqueeze(1)
    images = images[torch.randperm(len(images), generator=generator)]
    train, fit, held_out = images.tensor_split([TRAIN, TRAIN + FIT])
    torch.manual_seed(0)
    flow = om.models.Glow(channels=1, size=8, levels=2, steps=4, hidden=64)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc="training the Glow", unit="epoch"):
        for x in train[torch.randperm(TRAIN, generator=generator)].tensor_split(TRAIN // 50):
            noisy = (x * LEVELS + torch.rand(x.shape, generator=generator)) / (LEVELS + 1)
            optimizer.zero_grad()
            (-flow.log_prob(noisy).mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    detector = om.Detector(om.LogLikelihood(flow.eval(), bins=LEVELS + 1))
    detector.fit(fit.tensor_split(FIT // 50), progress=False)
    return detector.score(held_out).score.double().numpy()


def resampled(scores: Array) -> Draw:
    return lambda generator, n: generator.choice(scores, n)


def streams(kind: int, run: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Of calibration scores and of a stream: the same for every method."""
    calibration, stream = np.random.SeedSequence([kind, run]).spawn(2)
    return np.random.default_rng(calibration), np.random.default_rng(stream)


def run_length(step: Step, draw: Draw, generator: np.random.Generator, cap: int) -> int:
    """Samples to the first alarm; cap + 1 if none."""
    for start in range(0, cap, BLOCK):
        for i, score in enumerate(draw(generator, min(BLOCK, cap - start)).tolist(), start + 1):
            if step(score):
                return i
    return cap + 1


def in_control(method: Method, draw: Draw, n_calibration: int, what: str) -> Row:
    """Run lengths over streams, and calibration sets, without a change."""
    found = []
    for run in tqdm(range(method.in_control), desc=f"{method.name}, {what}", leave=False):
        calibration, stream = streams(0, run)
        step = method.start(draw(calibration, n_calibration), run)
        found.append(run_length(step, draw, stream, method.cap))
    cut = np.minimum(found, method.cap)
    return {
        "promised": method.ert,
        "mean run length, at least": round(float(cut.mean()), 1),
        "standard error": round(float(cut.std(ddof=1)) / math.sqrt(len(cut)), 1),
        "cut off": round(float(np.mean(np.array(found) > method.cap)), 4),
        "cap": method.cap,
        f"alarm within {WITHIN}": round(float(np.mean(np.array(found) <= WITHIN)), 4),
        "runs": len(found),
    }


def delay(step: Step, before: Iterable[float], after: Iterable[float]) -> tuple[int, float]:
    """False alarms before the change, and samples from it to the next alarm, inf if there is none.

    Every sample before the change is seen, since a step starts anew by itself.
    """
    false_alarms = sum(step(score) for score in before)
    hits = (i for i, score in enumerate(after, 1) if step(score))
    return false_alarms, next(hits, math.inf)


def out_of_control(method: Method, name: str) -> Row:
    """Delays over streams that change."""
    false_alarms, delays = [], []
    for run in tqdm(range(method.changed), desc=f"{method.name}, {name}", leave=False):
        calibration, stream = streams(1, run)
        step = method.start(calibration.normal(size=CALIBRATION), run)
        before = stream.normal(size=1000)[-method.lead :]
        early, late = delay(step, before.tolist(), CHANGES[name](stream, AFTER).tolist())
        false_alarms.append(early)
        delays.append(late)
    median = statistics.median(delays)
    return {
        "median delay": None if math.isinf(median) else median,
        "undetected": round(sum(map(math.isinf, delays)) / len(delays), 4),
        "false alarms in 1 000 before": round(statistics.mean(false_alarms) / method.lead * 1e3, 2),
        "streams": len(delays),
    }


def microseconds(method: Method, passes: int) -> float:
    """Processor time of one update, so that other load counts little; the median pass of 1 000."""
    generator = np.random.default_rng(0)
    step = method.start(generator.normal(size=CALIBRATION), 0)
    step(0.0)
    taken = []
    for _ in range(passes):
        scores = generator.normal(size=1000).tolist()
        start = time.process_time()
        for score in scores:
            step(score)
        taken.append((time.process_time() - start) * 1e3)
    return round(statistics.median(taken), 2)


def compared(methods: list[Method], size: Size) -> list[Row]:
    """A row for each method: all on the same normal streams."""
    return [
        {
            "method": method.name,
            "in control": in_control(method, normal(), CALIBRATION, "in control"),
            "changes": {name: out_of_control(method, name) for name in CHANGES},
            "microseconds": microseconds(method, size.passes),
        }
        for method in tqdm([scaled(method, size.share) for method in methods], desc="methods")
    ]


def scaled(method: Method, share: float) -> Method:
    """Fewer streams."""
    few = max(3, round(share * method.in_control)), max(3, round(share * method.changed))
    return replace(method, in_control=few[0], changed=few[1])


def promises(size: Size, scores: dict[str, Draw]) -> list[Row]:
    """A row for each law, number of calibration scores and promised run length."""
    return [
        {"scores": law, "calibration": n} | in_control(own(ert, runs), draw, n, f"{law}, {n}")
        for law, draw in scores.items()
        for n in size.calibration
        for ert, runs in size.runs.items()
    ]


def own(ert: int, runs: int = 240) -> Method:
    return Method(f"ours, ert {ert}", ours(ert), ert, in_control=runs, cap=max(6 * ert, WITHIN))


def shortfall(row: Row) -> float:
    """By how many standard errors a mean is below the promise; below 0 if it is above."""
    return float((row["promised"] - row["mean run length, at least"]) / row["standard error"])


def claims(promised: list[Row], rows: list[Row]) -> list[Row]:
    last = next(row for row in rows if row["method"] == "ours, ert 10000")
    median = last["changes"][CONTAMINATION]["median delay"]
    worst = max(shortfall(row) for row in promised)
    return [
        claim(
            "mean run length below the promise, standard errors, the worst cell (below 0: above)",
            round(worst, 2),
            3.0,
        ),
        claim(
            f"ert 10 000, {CONTAMINATION}: median delay, samples",
            AFTER + 1 if median is None else median,
            70,
        ),
        claim("ert 10 000: processor microseconds an update", last["microseconds"], 20),
    ]


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def measured(quick: bool) -> Row:
    started, size = time.monotonic(), QUICK if quick else FULL
    scores = {"normal": normal(), "digits": resampled(digit_scores(size.epochs))}
    others, skipped = peers(quick)
    promised = promises(size, scores)
    rows = compared([own(1000), own(10_000), *others], size)
    return {
        "machine": machine() | versions() | {"seconds": round(time.monotonic() - started)},
        "rows": rows,
        "promises": promised,
        "skipped": skipped,
        "claims": claims(promised, rows),
    }


def main(
    quick: Annotated[bool, typer.Option(help="A few short streams.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
    figure_path: Annotated[
        Path | None, typer.Option("--figure", help="Where to draw delays and run lengths.")
    ] = None,
) -> None:
    torch.set_num_threads(1)
    report = measured(quick)
    typer.echo(table(report["promises"], report["rows"]))
    for line in report["skipped"]:
        typer.echo(line)
    conclude(report, output)
    if figure_path is not None:
        figure(report["rows"]).savefig(figure_path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
