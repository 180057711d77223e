"""Drift in streams of real images: after how many samples deciders tell, at one false-alarm rate.

The scores are a detector's of a VAE of Fashion-MNIST: its own test images, into which others come
at once, slowly or in bursts. All deciders see the same scores. Ours keeps what it promises; of the
others the one knob is set until they are as rarely wrong as ours was, on normal streams.
alibi-detect's test promises as ours does and has no knob to set. It needs an environment of its own
(`benchmarks/drift/peers.py`): rows of deciders that are not installed stay as they are in the file,
since scores and streams are the same in every run.

    python -m benchmarks.drift.real_streams --data-dir FOLDER \\
        --json benchmarks/results/real_streams.json
    python -m benchmarks.drift.real_streams --data-dir FOLDER --decider 'alibi-detect CVM' \\
        --json benchmarks/results/real_streams.json
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

import ood_monitor as om
from benchmarks.detection import datasets, protocol, zoo
from benchmarks.detection.protocol import Sizes
from benchmarks.drift.e_detector import delay, resampled, run_length
from benchmarks.drift.peers import Start, alibi_cvm, evidently_rule, ours, river
from benchmarks.harness.measurement import claim, reported
from ood_monitor.densities.parts import Method
from ood_monitor.drift import EDetector

Array = NDArray[np.float64]
Row = dict[str, Any]
Share = Callable[[int], float]

ON, MODEL, ERT = "Fashion-MNIST", "VAE", 1000
METHODS: tuple[Method, ...] = ("forward", "gradient_norms")
FOREIGN = ("EMNIST letters", "GTSRB")
CALIBRATION, BEFORE, AFTER = 600, 300, 2000
CAP, SHOWN = 6 * ERT, 200
OURS = "ours"
#: Deciders that take fifty times as long as the others: normal and changed streams of theirs.
SLOW = {"river KSWIN": (6, 12), "alibi-detect CVM": (40, 12)}

#: The share of foreign images, so many samples after the change.
CHANGES: dict[str, Share] = {
    "5 % at once": lambda i: 0.05,
    "10 % at once": lambda i: 0.1,
    "20 % at once": lambda i: 0.2,
    "50 % at once": lambda i: 0.5,
    "slowly, to 50 % after 1 000": lambda i: min(0.5, i / 2000),
    "in bursts, half of 50 in 300": lambda i: 0.5 if i % 300 < 50 else 0.0,
}


@dataclass(frozen=True)
class Runs:
    """How many streams: normal ones of each setting, and those with each change."""

    normal: int = 40
    changed: int = 40
    settings: int = 7

    def of(self, decider: str) -> "Runs":
        """Fewer of one that takes long."""
        normal, changed = SLOW.get(decider, (self.normal, self.changed))
        return replace(self, normal=min(self.normal, normal), changed=min(self.changed, changed))


@dataclass(frozen=True)
class Scores:
    """Of normal images, and of foreign ones by name."""

    normal: Array
    foreign: Mapping[str, Array]

    def stream(self, run: int) -> tuple[Array, np.random.Generator, Array]:
        """Calibration scores, the stream's generator and the scores that it draws from."""
        generator = np.random.default_rng([17, run])
        shuffled = generator.permutation(self.normal)
        return shuffled[:CALIBRATION], generator, shuffled[CALIBRATION:]


#: With one knob each, from many alarms to few. River's know no calibration: they are shown some.
DECIDERS: dict[str, Callable[[float], Start]] = {
    "river ADWIN": lambda knob: river("ADWIN", shown=SHOWN, delta=10**-knob),
    "river KSWIN": lambda knob: river("KSWIN", shown=SHOWN, alpha=10**-knob),
    "river PageHinkley": lambda knob: river("PageHinkley", shown=SHOWN, threshold=10**knob),
    "KS of windows of 100 (Evidently's rule)": lambda knob: evidently_rule(10**-knob),
}


#: Without a knob: they promise a mean run length of ERT.
PROMISING: dict[str, Callable[[], Start]] = {
    OURS: lambda: ours(ERT),
    "alibi-detect CVM": functools.lru_cache(lambda: alibi_cvm(10_000)),
}


def installed() -> list[str]:
    """Deciders that can be run here."""
    packages = {"river": "river", "alibi-detect": "alibi_detect"}
    names = [*PROMISING, *DECIDERS]
    return [n for n in names if find_spec(packages.get(n.split()[0], "scipy")) is not None]


def mean_run(start: Start, scores: Scores, runs: int) -> float:
    """Samples of normal streams to the first alarm."""
    return statistics.mean(
        run_length(start(calibration, run), resampled(normal), generator, CAP)
        for run in range(runs)
        for calibration, generator, normal in [scores.stream(run)]
    )


def set_to(make: Callable[[float], Start], scores: Scores, target: float, runs: Runs) -> float:
    """The knob of a decider whose mean run length is the target's, by halving."""
    low, high = 0.5, 8.0
    for _ in range(runs.settings):
        middle = (low + high) / 2
        is_rare = mean_run(make(middle), scores, runs.normal) >= target
        low, high = (low, middle) if is_rare else (middle, high)
    return high


# Streams that change.


def changed(scores: Scores, name: str, share: Share, run: int) -> tuple[Array, Array]:
    """Calibration scores, and a stream of `BEFORE` normal samples and `AFTER` of the change."""
    calibration, generator, normal = scores.stream(10_000 + run)
    stream = generator.choice(normal, BEFORE + AFTER)
    is_foreign = generator.random(AFTER) < [share(i) for i in range(AFTER)]
    others = generator.choice(scores.foreign[name], AFTER)
    stream[BEFORE:] = np.where(is_foreign, others, stream[BEFORE:])
    return calibration, stream


def delays(start: Start, scores: Scores, name: str, share: Share, runs: Runs) -> Row:
    """Samples from the change to the first alarm after it; alarms before it are gone over."""
    found = []
    for run in range(runs.changed):
        calibration, stream = changed(scores, name, share, run)
        before, after = stream[:BEFORE].tolist(), stream[BEFORE:].tolist()
        found.append(delay(start(calibration, run), before, after)[1])
    median = statistics.median(found)
    return {
        "median delay": None if math.isinf(median) else median,
        "undetected": round(statistics.mean(map(math.isinf, found)), 3),
    }


def since(scores: Scores, name: str, share: Share, runs: Runs) -> Row:
    """How far from the change the evidence is said to begin, and how often its interval has it."""
    errors, inside = [], []
    for run in range(runs.changed):
        calibration, stream = changed(scores, name, share, run)
        detector = EDetector(calibration, ert=ERT, seed=run)
        for i, score in enumerate(stream.tolist(), 1):
            if detector.update(score).alarm:
                if i > BEFORE:
                    said = detector.since()
                    back = i - (BEFORE + 1)
                    errors.append(abs(said.estimate - back))
                    inside.append(said.latest <= back <= said.earliest)
                    break
                detector.restart()
    return {
        "median distance": statistics.median(errors) if errors else None,
        "coverage": round(statistics.mean(inside), 3) if inside else None,
    }


# The whole.


def compared(scores: Scores, runs: Runs, names: list[str]) -> Iterator[Row]:
    """A row for each decider."""
    own = mean_run(ours(ERT), scores, runs.normal)
    for name in names:
        its = runs.of(name)
        knob = set_to(DECIDERS[name], scores, own, its) if name in DECIDERS else None
        start = PROMISING[name]() if knob is None else DECIDERS[name](knob)
        yield {
            "decider": name,
            "knob": None if knob is None else round(knob, 3),
            "streams": its.changed,
            "mean run length": round(mean_run(start, scores, its.normal), 1),
            "changes": {
                f"{foreign}, {change}": delays(start, scores, foreign, share, its)
                | (since(scores, foreign, share, its) if name == OURS else {})
                for foreign in scores.foreign
                for change, share in CHANGES.items()
            },
        }


def scored(data: Path, method: Method) -> Scores:
    """A detector's of real images, fitted on images that no stream has."""
    sets = protocol.sets(data, ON, Sizes(calibration=CALIBRATION, test=2000, ood=1000))
    watched = zoo.zoo()[MODEL]
    module, _ = zoo.load(watched, zoo.weights_file(ON, MODEL))
    x = {name: watched.prepare(images) for name, images in sets.items()}
    detector = om.Detector(watched.adapter(module), method=method, explain=0)
    detector.fit(x.pop("fit").split(50), progress=False)

    def of(name: str) -> Array:
        found = [detector.score(part).score for part in x[name].split(50)]
        return np.asarray(torch.cat(found).double().numpy())

    normal = np.concatenate([of("calibration"), of("test")])
    return Scores(normal, {name: of(name) for name in FOREIGN})


def drawn() -> Scores:
    """For a quick run, without files."""
    generator = np.random.default_rng(0)
    return Scores(generator.normal(size=1500), {"shifted": generator.normal(2, 1, 300)})


def claims(rows: list[Row]) -> list[Row]:
    """Against the best of the others that are as rarely wrong, change by change."""
    found = []
    for method in dict.fromkeys(row["scores"] for row in rows):
        own, *others = [row for row in rows if row["scores"] == method]
        rare = [row for row in others if row["mean run length"] >= own["mean run length"]]
        ratios = []
        for change, its in own["changes"].items():
            peers = [row["changes"][change]["median delay"] or math.inf for row in rare]
            ratios.append((its["median delay"] or AFTER) / min([*peers, AFTER]))
        text = (
            f"{method}: median delay over the best other's that is as rarely wrong, geometric mean "
            "of the changes"
        )
        found.append(claim(text, round(statistics.geometric_mean(ratios), 3), 1.0))
        short = round(ERT - own["mean run length"], 1)
        found.append(claim(f"{method}: mean run length below the promised", short, 0.0))
    return found


def full(data: Path, runs: Runs, names: list[str], known: list[Row]) -> Iterator[Row]:
    """Rows of these deciders, among those that were measured before and are not of these."""
    for method in METHODS:
        measured = [{"scores": method} | r for r in compared(scored(data, method), runs, names)]
        yield from joined([row for row in known if row["scores"] == method], measured)


def joined(known: list[Row], measured: list[Row]) -> list[Row]:
    """A row for each decider, the later one, in the order of deciders."""
    rows = {row["decider"]: row for row in (*known, *measured)}
    return [rows[name] for name in (*PROMISING, *DECIDERS) if name in rows]


def quick_rows(runs: Runs, names: list[str]) -> Iterator[Row]:
    # alibi-detect's takes 14 s to set up.
    for row in compared(drawn(), runs, [name for name in names if "alibi" not in name]):
        yield {"scores": "drawn"} | row


def before(output: Path | None) -> list[Row]:
    """What the file has."""
    if output is None or not output.exists():
        return []
    rows: list[Row] = json.loads(output.read_text())["rows"]
    return rows


def line(row: Row) -> str:
    return f"{row['scores']}  {row['decider']}  mean run {row['mean run length']}"


def main(
    quick: Annotated[bool, typer.Option(help="Drawn scores; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    decider: Annotated[list[str] | None, typer.Option(help="One; all that are installed.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    names = [name for name in installed() if name in (decider or installed())]
    if quick:
        reported(quick_rows(Runs(1, 1, 1), names), line, claims, output)
        return
    datasets.require(data_dir, datasets.SOURCES)
    reported(full(data_dir, Runs(), names, before(output)), line, claims, output)


if __name__ == "__main__":
    typer.run(main)
