"""What makes a comparison of detectors fair, and what is reported of each.

Images that fit, that calibrate and that test are disjoint, and none was trained on. A method is
fitted on the first alone: nothing in this module can hand it an image of another set. Sets are
harmonised (see `datasets.harmonised`), draws are seeded, and beside AUROC with its interval there
is what an operator sees: what is flagged and what is found at a nominal rate by the detector's own
p-values, what is flagged where 95 % are to be found, and the samples to a drift alarm.
"""

import hashlib
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, rankdata
from sklearn.metrics import roc_curve
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import datasets, trained, zoo
from ood_monitor.calibration import ConformalPValue

Array = NDArray[np.float64]
#: What a method sees of each set of images, by name: (N,) or (N, F).
View = Mapping[str, Array]

#: Nominal false-positive rate, and average run length to a false drift alarm.
FPR, ERT = 0.01, 10_000
#: True-positive rate that a threshold is put for, where a false-positive rate is told of it.
TPR = 0.95
IN_DISTRIBUTION = ("fit", "calibration", "test")
#: What a score that is no number counts as.
_HUGE = 1e300


class Method(Protocol):
    """A density or a baseline; higher scores are more anomalous."""

    def fit(self, features: Array) -> object: ...

    def score(self, features: Array) -> Array: ...


@dataclass(frozen=True)
class Sizes:
    """Images of each set."""

    fit: int = 600
    calibration: int = 600
    test: int = 600
    ood: int = 300


def sets(directory: Path, name: str, sizes: Sizes) -> dict[str, Tensor]:
    """Images in distribution, by `IN_DISTRIBUTION`, then of every other set: (N, 1, 32, 32)."""

    def tested(of: str) -> Tensor:
        return datasets.harmonised(datasets.read(directory, of, "test"))

    seen, held_out = zoo.training_images(directory, name)
    others = {other: tested(other) for other in datasets.SOURCES if other != name}
    return split(seen, held_out, tested(name), others, sizes)


def split(
    seen: Tensor, held_out: Tensor, test: Tensor, others: Mapping[str, Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    """Draws from what was not trained on, without what was: `IN_DISTRIBUTION`, then the others."""
    test = unlike(test, seen, held_out)
    held_out = trained.drawn(unlike(held_out, seen), sizes.fit + sizes.calibration)
    found = {
        "fit": held_out[: sizes.fit],
        "calibration": held_out[sizes.fit :],
        "test": trained.drawn(test, sizes.test),
    }
    check_disjoint({"training": seen, **found})
    return found | {name: trained.drawn(images, sizes.ood) for name, images in others.items()}


def digits(count: int = 120) -> dict[str, Tensor]:
    """The same of scikit-learn's digits, so many of each, and what is trained on: a quick run's."""
    images = trained.digits(fit=2 * count, test=100, ood=40)
    found = {name: each[:count] if name != "fit" else each for name, each in images.sets.items()}
    fit = found.pop("fit")
    return {"train": images.train, "fit": fit[:count], "calibration": fit[count:], **found}


def unlike(images: Tensor, *others: Tensor) -> Tensor:
    """Those images that are in none of the others: some sets hold an image twice."""
    seen = {digest for other in others for digest in digests(other)}
    kept = [i for i, digest in enumerate(digests(images)) if digest not in seen]
    return images[kept]


def digests(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.numpy()]


def check_disjoint(named: Mapping[str, Tensor]) -> None:
    """Refuses sets that share an image.

    Raises:
        ValueError: Two that do.
    """
    seen: dict[bytes, str] = {}
    for name, images in named.items():
        for digest in set(digests(images)):
            if (other := seen.setdefault(digest, name)) != name:
                raise ValueError(f"Expected disjoint sets, got an image in {other} and in {name}.")


def auroc(normal: Array, odd: Array) -> float:
    """How often an odd sample scores higher than a normal one, ties half: (N,) and (M,)."""
    # By ranks, since the bootstrap takes it 200 times, and scikit-learn's checks take longer.
    ranks = rankdata(np.concatenate([normal, odd]))[len(normal) :]
    return float((ranks.mean() - (len(odd) + 1) / 2) / len(normal))


def interval(normal: Array, odd: Array, resamples: int = 200) -> tuple[float, float]:
    """Bootstrap interval of the AUROC, 95 %, over the samples of both sets."""
    found = bootstrap(
        (normal, odd), auroc, vectorized=False, n_resamples=resamples, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def scored(method: Method, view: View) -> dict[str, Array]:
    """Scores of every set but the one that the method is fitted on."""
    method.fit(view["fit"])
    return {name: method.score(values) for name, values in view.items() if name != "fit"}


def others_of(found: Mapping[str, Any]) -> list[str]:
    """Names of the sets that are not of the training distribution."""
    return [name for name in found if name not in IN_DISTRIBUTION]


def numbers(scores: Mapping[str, Array]) -> dict[str, Array]:
    """Scores without a number as the highest there can be: a monitor alerts of such a sample."""
    return {name: np.nan_to_num(each, nan=_HUGE, posinf=_HUGE) for name, each in scores.items()}


def aurocs(scores: Mapping[str, Array]) -> dict[str, float]:
    """Of each other set against the test images, with four decimals."""
    scores = numbers(scores)
    return {name: round(auroc(scores["test"], scores[name]), 4) for name in others_of(scores)}


def with_mean(each: Mapping[str, float]) -> dict[str, Any]:
    """As columns of a row."""
    return {"auroc": dict(each), "mean": round(statistics.mean(each.values()), 4)}


def judged(scores: Mapping[str, Array], resamples: int = 200) -> dict[str, Any]:
    """What is reported of a method's scores of `calibration`, `test` and the other sets."""
    scores = numbers(scores)
    odd = {name: scores[name] for name in others_of(scores)}
    normal = scores["test"]
    return with_mean(aurocs(scores)) | {
        "interval": {
            name: [round(end, 4) for end in interval(normal, values, resamples)]
            for name, values in odd.items()
        },
        **flagged(scores["calibration"], normal),
        "tested": len(normal),
        "found": caught(scores),
        "fpr_at_95_tpr": fprs(scores),
        "delay": {name: delay(scores["calibration"], normal, v) for name, v in odd.items()},
    }


def caught(scores: Mapping[str, Array]) -> dict[str, float]:
    """The share of each other set that has a p-value of at most FPR; empty where none can."""
    if not can_flag(scores["calibration"]):
        return {}
    p_value = ConformalPValue.fit(scores["calibration"]).p_value
    return {
        name: round(float(np.mean(p_value(scores[name]) <= FPR)), 4) for name in others_of(scores)
    }


def fprs(scores: Mapping[str, Array]) -> dict[str, float]:
    """Of each other set against the test samples: `fpr_at_tpr`, with four decimals."""
    normal = scores["test"]
    return {name: round(fpr_at_tpr(normal, scores[name]), 4) for name in others_of(scores)}


def fpr_at_tpr(normal: Array, odd: Array) -> float:
    """The share of normal samples, (N,), above the highest threshold that finds TPR of the odd.

    The threshold is set with the odd samples, (M,), in hand, which nobody has before they come:
    what could be reached, beside what is by `caught`.
    """
    is_odd = np.repeat([0, 1], [len(normal), len(odd)])
    # Points between others on a line count: without them the rate would be that of a lower one.
    rates = roc_curve(is_odd, np.concatenate([normal, odd]), drop_intermediate=False)
    return float(rates[0][np.argmax(rates[1] >= TPR)])


def can_flag(calibration: Array) -> bool:
    """Whether there are so many that a p-value can be as small as FPR."""
    return len(calibration) >= 1 / FPR - 1


def flagged(calibration: Array, test: Array) -> dict[str, Any]:
    """The share of test samples with p <= FPR, and whether that rate is in its 95 % interval."""
    if not can_flag(calibration):
        return {"flagged": None, "flagged_interval": None, "nominal_within": None}
    count = int((ConformalPValue.fit(calibration).p_value(test) <= FPR).sum())
    ends = binomtest(count, len(test)).proportion_ci(method="exact")
    return {
        "flagged": round(count / len(test), 4),
        "flagged_interval": [round(float(ends.low), 4), round(float(ends.high), 4)],
        "nominal_within": bool(ends.low <= FPR <= ends.high),
    }


def delay(
    calibration: Array, normal: Array, odd: Array, *, share: float = 0.2, runs: int = 11
) -> float:
    """Median samples to the drift alarm from the start of streams with a share of odd samples.

    A stream is as long as there are normal samples; one without an alarm counts as one longer.
    """
    found = [alarm(calibration, *mixed(normal, odd, share, run)) for run in range(runs)]
    return float(np.median(found))


def mixed(normal: Array, odd: Array, share: float, seed: int) -> tuple[Array, int]:
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(normal)
    replaced = generator.random(len(shuffled)) < share
    return np.where(replaced, generator.choice(odd, len(shuffled)), shuffled), seed


def alarm(calibration: Array, stream: Array, seed: int) -> int:
    drift = om.EDetector(calibration, ert=ERT, seed=seed)
    for i, score in enumerate(stream, start=1):
        if drift.update(float(score)).alarm:
            return i
    return len(stream) + 1


def grouped(values: Iterable[float], size: int) -> Array:
    """Means of consecutive groups, an incomplete last one left out."""
    array = np.asarray(list(values), dtype=np.float64)
    return np.asarray(array[: len(array) // size * size].reshape(-1, size).mean(1))
