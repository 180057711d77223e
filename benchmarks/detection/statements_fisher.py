r"""The Fisher information metric itself, which the paper's layer norms approximate.

Of n fit gradients G (n, P), F = G^T G / n. By Woodbury's identity a gradient g has

    g^T (F + l I)^-1 g = (|g|^2 - c^T (n l I + G G^T)^-1 c) / l,    c = G g,

which takes the Gram matrix (n, n) in place of a matrix (P, P). Beside it the same of each layer by
itself, and sum_i g_i^2 / (F_ii + l) of each. l is so many times the mean of the eigenvalues that
are not 0. All gradients are kept: 6 GB for a million parameters.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import methods, protocol
from benchmarks.detection.paper import Case
from benchmarks.detection.protocol import Array
from benchmarks.detection.statements_norms import whole_of
from benchmarks.detection.statements_steps import gradient
from ood_monitor.densities.baselines import LowLikelihood, Typicality

Row = dict[str, Any]

DAMPING = (0.01, 1.0, 100.0)

#: A quadratic form below this is rounding.
_TINY = 1e-300


@dataclass(frozen=True)
class Counts:
    """Samples: of "fit", which give F, of "calibration", which fit densities, and of others."""

    fit: int = 500
    held_out: int = 200
    test: int = 300
    foreign: int = 60


@dataclass
class Forms:
    """Quadratic forms of M samples that are not of the fit, as layers add to them.

    Attributes:
        by_layer: By what they are, of each live layer, (M,).
        gram: G G^T, (n, n), and of the samples with the fit, (M, n).
        norm: Squared norms (M,).
        of_diagonal: sum_i g_i^2 / (F_ii + l) over all layers, by damping.
        mass: Estimates of squared Frobenius norms, of F's diagonal and of its blocks by layer.
        seconds: By what was computed.
    """

    n: int
    by_layer: dict[str, list[Tensor]] = field(default_factory=dict)
    gram: Any = 0.0
    cross: Any = 0.0
    norm: Any = 0.0
    of_diagonal: dict[float, Any] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=lambda: {"diagonal": 0.0, "blocks": 0.0})
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("diagonal", "Gram"), 0.0)
    )

    def add(self, layer: Tensor) -> None:
        """Gradients (n + M, P) of one more layer, the fit's first."""
        fit, rest = layer[: self.n].double(), layer[self.n :].double()
        norm = rest.square().sum(1)
        if not float(fit.square().sum()) > 0:
            return
        self.norm = self.norm + norm
        self._keep("norms", norm)
        start = time.perf_counter()
        self._add_diagonal(fit, rest)
        between = time.perf_counter()
        self._add_gram(fit, rest, norm)
        self.seconds["diagonal"] += between - start
        self.seconds["Gram"] += time.perf_counter() - between

    def _add_diagonal(self, fit: Tensor, rest: Tensor) -> None:
        squares = fit.square()
        diagonal = squares.mean(0)
        for times in DAMPING:
            form = (rest.square() / (diagonal + times * diagonal.mean())).sum(1)
            self.of_diagonal[times] = self.of_diagonal.get(times, 0.0) + form
            self._keep(f"diagonal, damping {times:g}", form)
        # Of pairs of different samples, so that it is without bias.
        self.mass["diagonal"] += float(squares.sum(0).square().sum() - squares.square().sum())

    def _add_gram(self, fit: Tensor, rest: Tensor, norm: Tensor) -> None:
        gram, cross = fit @ fit.T, rest @ fit.T
        self.gram, self.cross = self.gram + gram, self.cross + cross
        for times, form in woodbury(gram, cross, norm, fit.shape[1]).items():
            self._keep(f"block, damping {times:g}", form)
        self.mass["blocks"] += of_pairs(gram)

    def _keep(self, name: str, values: Tensor) -> None:
        self.by_layer.setdefault(name, []).append(values.clamp(min=_TINY).log())


def woodbury(gram: Tensor, cross: Tensor, norm: Tensor, parameters: int) -> dict[float, Tensor]:
    """g^T (F + l I)^-1 g of M samples by damping, from (n, n), (M, n) and (M,)."""
    n = len(gram)
    values, axes = torch.linalg.eigh(gram)
    along = (cross @ axes).square()
    mean = gram.trace() / (n * min(n, parameters))
    found = {}
    for times in DAMPING:
        damping = times * mean
        inside = (along / (n * damping + values.clamp(min=0))).sum(1)
        found[times] = (norm - inside) / damping
    return found


def of_pairs(gram: Tensor) -> float:
    """Sum of squares off the diagonal: n (n - 1) times an unbiased estimate of |F|^2."""
    return float(gram.square().sum() - gram.diagonal().square().sum())


def rows_of(case: Case, counts: Counts) -> Iterator[Row]:
    """A row for each quadratic form, and one on the structure of F."""
    adapter, many = whole_of(case), counts_of(case, counts)
    x = {name: case.prepared(name)[:count] for name, count in many.items()}
    start = time.perf_counter()
    by_layer = gradients(adapter, torch.cat(list(x.values())))
    taken = (time.perf_counter() - start) / len(by_layer[0])
    forms = Forms(len(x["fit"]))
    for layer in by_layer:
        forms.add(layer)
    ends = np.cumsum([len(v) for name, v in x.items() if name != "fit"])
    names = ["fit", *[name for name in x if name not in ("fit", "calibration")]]
    parts = dict(zip(names, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    scores = dict(scored(forms, parts, sum(layer.shape[1] for layer in by_layer)))
    for name, found in scores.items():
        yield {"part": "fisher", "form": name} | protocol.with_mean(protocol.aurocs(found))
    yield structure(forms, scores, taken) | {
        "norms, seconds a sample": cost_of_norms(adapter, x["test"]),
        "gradients, MB": round(sum(layer.nbytes for layer in by_layer) / 1e6),
    }


def counts_of(case: Case, counts: Counts) -> dict[str, int]:
    """Of each set, "fit", "calibration" and "test" first."""
    named = {"fit": counts.fit, "calibration": counts.held_out, "test": counts.test}
    return {name: named.get(name, counts.foreign) for name in case.sets}


def gradients(adapter: om.Adapter, x: Tensor) -> list[Tensor]:
    """Of each layer those of all samples, (N, P)."""
    parameters = list(adapter.module.parameters())
    found = [torch.empty(len(x), p.numel()) for p in parameters]
    for i, sample in enumerate(x.split(1)):
        for rows, g in zip(found, gradient(adapter, parameters, sample), strict=True):
            rows[i] = g.flatten()
    return found


def scored(
    forms: Forms, parts: Mapping[str, Array], parameters: int
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Scores by form: of the parts "fit", which fits densities, "test" and other sets."""
    totals = {"total norm": forms.norm}
    totals |= {f"diagonal, damping {k:g}": v for k, v in forms.of_diagonal.items()}
    whole = woodbury(forms.gram, forms.cross, forms.norm, parameters)
    totals |= {f"full, damping {k:g}": v for k, v in whole.items()}
    for name, form in totals.items():
        logs = form.clamp(min=_TINY).log().numpy()
        view = {of: logs[at] for of, at in parts.items()}
        larger = {of: -values for of, values in view.items()}
        yield name, protocol.scored(LowLikelihood(), larger)
        yield f"{name}, two-sided", protocol.scored(Typicality(), view)
    for name, columns in forms.by_layer.items():
        table = torch.stack(columns, 1).numpy()
        table = table[:, np.ptp(table[parts["fit"]], axis=0) > 0]
        view = {of: table[at] for of, at in parts.items()}
        yield f"{name} by layer", protocol.scored(om.DiagonalGaussian(), view)
        yield f"{name} by layer, joint", protocol.scored(om.ShrunkGaussian(), view)


def structure(forms: Forms, scores: Mapping[str, Mapping[str, Array]], taken: float) -> Row:
    """How much of F lies on its diagonal and in its blocks, if forms agree, and what they cost."""
    whole, samples = of_pairs(forms.gram), len(forms.norm)
    ours, full = scores["norms by layer"], scores["full, damping 1, two-sided"]
    return {
        "part": "fisher structure",
        "of the squared Frobenius norm": {k: round(v / whole, 4) for k, v in forms.mass.items()},
        "rank correlation with norms by layer": {
            name: round(float(spearmanr(ours[name], full[name]).statistic), 3) for name in full
        },
        "seconds a sample": {
            "gradients": round(taken, 5),
            **{name: round(value / samples, 5) for name, value in forms.seconds.items()},
        },
    }


def cost_of_norms(adapter: om.Adapter, x: Tensor) -> float:
    x = x[: methods.CHUNK]
    methods.measured(adapter, x, 1)  # which is checked on first use
    start = time.perf_counter()
    methods.measured(adapter, x, 1)
    return round((time.perf_counter() - start) / len(x), 5)
