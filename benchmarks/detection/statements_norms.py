"""Norms by layer beside the paper's statements: what is larger, which density, which layers.

One pass over all sets at each size of groups, of the whole likelihood's gradient; a diffusion
model's is that of its loss at the least noise, as in the paper, and so is its typicality.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ood_monitor as om
from benchmarks.detection import methods, protocol
from benchmarks.detection.evidence import GROUPS
from benchmarks.detection.forward import fitted
from benchmarks.detection.layers import correlation
from benchmarks.detection.methods import PAPER, live_log_norms
from benchmarks.detection.paper import Case
from benchmarks.detection.protocol import Array, View, aurocs, others_of, with_mean
from ood_monitor.adapters.base import term_values
from ood_monitor.densities import FisherCombination, StudentT
from ood_monitor.densities.baselines import ChiSquare, OneClassSVM, TotalNorm, Typicality
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.plan import planned

Row = dict[str, Any]
Found = Mapping[str, Measurements]

TYPICALITY = "typicality"

#: Of log norms by layer; the degrees of freedom of the second chi-square are numbers of parameters.
DENSITIES: dict[str, Callable[[Sequence[int]], protocol.Method]] = {
    PAPER: lambda _: om.DiagonalGaussian(),
    "joint Gaussian, half-shrunk": lambda _: om.ShrunkGaussian(),
    "joint Gaussian, Ledoit-Wolf": lambda _: om.ShrunkGaussian("ledoit_wolf"),
    "Student-t": lambda _: StudentT(),
    "chi-square of fitted degrees": lambda _: ChiSquare(),
    "chi-square of all parameters": ChiSquare,
    "Fisher's method": lambda _: FisherCombination(),
    "one-class SVM": lambda _: OneClassSVM(),
    "total norm": lambda _: TotalNorm(),
}

#: Rows whose layer alone detects so well count as carrying the AUROC.
CARRIES = 0.9


def rows_of(case: Case) -> Iterator[Row]:
    """All rows of a model."""
    names = [name for name in case.sets if name != "calibration"]
    x = {name: case.prepared(name) for name in names}
    whole = whole_of(case)
    for group in GROUPS:
        found = {name: methods.measured(whole, images, group) for name, images in x.items()}
        yield from table(case, x, found, group)
        if group == 1:
            yield larger(found)
            yield layers(found)


def whole_of(case: Case) -> om.Adapter:
    """What the paper differentiates, of the model."""
    return methods.whole(methods.adapter_of(case.watched, case.module))


# One table.


def table(case: Case, x: Mapping[str, Any], found: Found, group: int) -> Iterator[Row]:
    """A row for each density of the same norms, for typicality and for our methods."""
    names, logs = live_log_norms(found)
    sizes = [p.numel() for p in parameters_of(case, names)]
    for method, make in DENSITIES.items():
        yield row(group, method, protocol.scored(make(sizes), logs))
    values = {name: m.log_likelihood.sum(1) for name, m in found.items()}
    yield row(group, TYPICALITY, protocol.scored(Typicality(), values))
    if not has_levels(case):
        yield row(group, "gradient_norms", norms_scores(case, x, found, group))
    yield row(group, "forward", forward_scores(case, x, group))


def has_levels(case: Case) -> bool:
    """Whether terms are levels of noise: `benchmarks.detection.evidence` has their default."""
    return isinstance(methods.adapter_of(case.watched, case.module), om.DenoisingBound)


def row(group: int, method: str, scores: Mapping[str, Array]) -> Row:
    return {"part": "table", "group": group, "method": method} | with_mean(aurocs(scores))


def parameters_of(case: Case, features: Sequence[str]) -> list[torch.nn.Parameter]:
    """Of features "term/parameter"."""
    parameters = dict(case.module.named_parameters())
    return [parameters[name.split("/", 1)[1]] for name in features]


def norms_scores(case: Case, x: Mapping[str, Any], found: Found, group: int) -> Mapping[str, Array]:
    """Of the method `gradient_norms`, whose default density sees the values of all terms too.

    A detector has no groups, so that its density is fitted on what it would have measured.
    """
    adapter = methods.adapter_of(case.watched, case.module)
    seen = {name: with_values(adapter, x[name], m, group) for name, m in found.items()}
    return protocol.scored(methods.default(seen["fit"]), methods.default_view(seen))


def with_values(adapter: om.Adapter, x: Any, whole: Measurements, group: int) -> Measurements:
    """Norms of the whole, and the values of each term."""
    parts = [term_values(adapter, part) for part in x.split(methods.CHUNK)]
    columns = [
        protocol.grouped(torch.cat([part[term] for part in parts]).tolist(), group)
        for term in parts[0]
    ]
    values = np.nan_to_num(np.stack(columns, 1), nan=-1e30, neginf=-1e30, posinf=1e30)
    return Measurements.of_norms(tuple(parts[0]), values, whole.features, whole.norms)


def forward_scores(case: Case, x: Mapping[str, Any], group: int) -> Mapping[str, Array]:
    """Of the method `forward`; a group's is the mean of its samples'."""
    detector = om.Detector(
        methods.adapter_of(case.watched, case.module), method="forward", chunk_size=methods.CHUNK
    )
    found = {name: detector.measure(images) for name, images in x.items()}
    joined = fitted(planned(found["fit"].sample, "forward", None, None), found["fit"])
    return {
        name: protocol.grouped(joined.score(m), group) for name, m in found.items() if name != "fit"
    }


# Larger on foreign data?


def larger(found: Found) -> Row:
    """The share of layers whose norm is larger on each other set than on the test images."""
    _, logs = live_log_norms(found)
    others = others_of(logs)
    medians = {name: np.median(logs[name], 0) - np.median(logs["test"], 0) for name in others}
    means = {name: logs[name].mean(0) - logs["test"].mean(0) for name in others}
    return {
        "part": "larger",
        "layers": logs["fit"].shape[1],
        "median": {name: round(float((it > 0).mean()), 3) for name, it in medians.items()},
        "mean of log": {name: round(float((it > 0).mean()), 3) for name, it in means.items()},
        "times": {name: round(float(np.exp(np.median(it))), 3) for name, it in medians.items()},
    }


# Which layers.


def layers(found: Found) -> Row:
    """AUROC of single layers, of parts of the network, and of so many layers evenly spaced."""
    names, logs = live_log_norms(found)
    single = single_layers(logs)
    order = np.argsort(-single)
    every = np.arange(len(names))
    thirds = zip(
        ("first third", "middle third", "last third"), np.array_split(every, 3), strict=True
    )
    weights = np.array([name.endswith("weight") for name in names])
    parts = dict(thirds) | {"weights": every[weights], "others": every[~weights]}
    return {
        "part": "layers",
        "layers": len(names),
        "correlation": round(correlation(logs["fit"]), 3),
        "orders of magnitude": round(orders(logs["fit"]), 2),
        "best": names[order[0]].split("/", 1)[1],
        "best alone": round(float(single[order[0]]), 4),
        "median alone": round(float(np.median(single)), 4),
        "carry": round(float((single >= CARRIES).mean()), 3),
        "parts": {name: mean_of(logs, at) for name, at in parts.items() if len(at)},
        "evenly spaced": {
            str(k): mean_of(logs, spaced(len(names), k)) for k in numbers(len(names))
        },
        "best by hindsight": {str(k): mean_of(logs, order[:k]) for k in numbers(len(names))},
    }


def orders(logs: Array) -> float:
    """Powers of ten between the median norms of layers, without the least and largest twentieth."""
    low, high = np.quantile(np.median(logs, 0), (0.05, 0.95))
    return float((high - low) / np.log(10))


def single_layers(logs: View) -> Array:
    """The mean AUROC (L,) of each layer by itself, by its distance from its mean."""
    fit = logs["fit"]
    away = {name: np.abs(values - fit.mean(0)) for name, values in logs.items()}
    others = others_of(logs)
    each = [
        [protocol.auroc(away["test"][:, i], away[name][:, i]) for name in others]
        for i in range(fit.shape[1])
    ]
    return np.asarray(np.mean(each, axis=1))


def mean_of(logs: View, columns: NDArray[np.int_]) -> float:
    """The paper's score of some layers: the mean over the other sets."""
    chosen = {name: values[:, columns] for name, values in logs.items()}
    found: float = with_mean(aurocs(protocol.scored(om.DiagonalGaussian(), chosen)))["mean"]
    return found


def numbers(count: int) -> list[int]:
    """Powers of two, then all."""
    return [2**i for i in range(count.bit_length()) if 2**i < count] + [count]


def spaced(count: int, chosen: int) -> NDArray[np.int_]:
    """Indices in the middle of so many equal parts."""
    return np.asarray(((np.arange(chosen) + 0.5) * count / chosen).astype(int))
