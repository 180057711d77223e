"""What the evidence compares: every method on the same model, images and split."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import protocol, trained
from benchmarks.detection.densities import png_bytes
from benchmarks.detection.protocol import Method, View
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import ratios
from ood_monitor.adapters.base import checked_terms
from ood_monitor.densities import GaussianMixture, StudentT
from ood_monitor.densities.baselines import (
    ComplexityCorrected,
    DensityOfStates,
    LowLikelihood,
    OneClassSVM,
    TotalNorm,
    Typicality,
)
from ood_monitor.densities.features import LogNorms, TermValues, table
from ood_monitor.densities.measurements import Measurements
from ood_monitor.gradients import terms_and_norms
from ood_monitor.modules import device_of

Array = NDArray[np.float64]

#: What a likelihood or a norm that is no number counts as.
_HUGE = 1e30

#: Images a pass: on a GPU more, which has more to do at once.
CHUNK, CHUNK_ON_GPU = 50, 100

#: How often a cost is measured, of which the median counts.
ROUNDS = 5

#: Noise levels of MSMA, ten as there, evenly spaced in their index.
MSMA_LEVELS = tuple(round(level) for level in np.linspace(1, 900, 10))


class WithComplexity:
    """`ComplexityCorrected`, of log-likelihoods in nats and bits side by side, (N, 2)."""

    def fit(self, values: Array) -> Self:
        return self

    def score(self, values: Array) -> Array:
        return ComplexityCorrected().score(*values.T)


class Whole(om.Adapter):
    """An adapter's terms as one, as the paper takes the likelihood's gradient."""

    def __init__(self, adapter: om.Adapter) -> None:
        self.module, self._adapter = adapter.module, adapter

    def log_likelihood(self, batch: Tensor) -> Any:
        yield "log_likelihood", sum(value for _, value in checked_terms(self._adapter, batch))


@dataclass(frozen=True)
class Seen:
    """What a model's passes give of a set of images.

    Attributes:
        terms: Norms and values by term, as the default detector sees them.
        whole: Those of the paper: of the whole likelihood's gradient, or for a diffusion model of
            the loss at the least noise.
        rows: As `terms`, by row; none where there would be too many.
        bits: Of the PNG file of what the model is shown, (N,).
        scores: Norms of a diffusion model's score by level, (N, 10), of single images; else none.
    """

    terms: Measurements
    whole: Measurements
    rows: Measurements | None
    bits: Array
    scores: Array | None


def measured(
    adapter: om.Adapter, x: Tensor, group: int, granularity: Any = "tensor"
) -> Measurements:
    """As `Detector.measure`, also of groups of samples, whose gradient is that of their sum."""
    chunk = CHUNK_ON_GPU if device_of(adapter.module).type == "cuda" else CHUNK
    found = terms_and_norms(adapter, x, group=group, granularity=granularity, chunk_size=chunk)
    values = [protocol.grouped(v.tolist(), group) for v in found.log_likelihood.values()]
    names, norms = table(found.norms)
    # A flow overflows on an image far from all that it knows: as unlikely as can be.
    values = [np.nan_to_num(v, nan=-_HUGE, neginf=-_HUGE, posinf=_HUGE) for v in values]
    norms = np.nan_to_num(norms, nan=_HUGE, posinf=_HUGE)
    return Measurements.of_norms(tuple(found.log_likelihood), np.stack(values, 1), names, norms)


def seen(watched: Watched, module: Any, images: Tensor, group: int) -> Seen:
    """Every pass over a set of images, of groups of them."""
    adapter, x = adapter_of(watched, module), watched.prepare(images)
    return passes(adapter, x, 8 * png_bytes(shown(watched, images)), group)


def passes(adapter: om.Adapter, x: Tensor, bits: Array, group: int = 1) -> Seen:
    """The same, of what the model takes, and the bits (N,) of its PNG files."""
    x = x[: len(x) // group * group]
    diffusion = isinstance(adapter, om.DenoisingBound)
    return Seen(
        measured(adapter, x, group),
        measured(whole(adapter), x, group),
        measured(adapter, x, group, "row") if isinstance(adapter, om.ELBO) else None,
        protocol.grouped(bits, group),
        score_norms(adapter, x) if diffusion and group == 1 else None,
    )


@functools.lru_cache(maxsize=2)
def adapter_of(watched: Watched, module: nn.Module) -> om.Adapter:
    """One for all sets: it is checked when it is new, on images that the model knows."""
    return watched.adapter(module)


@functools.lru_cache(maxsize=2)
def whole(adapter: om.Adapter) -> om.Adapter:
    """What the paper differentiates: all terms, or a diffusion model's loss at the least noise."""
    return adapter.with_levels((0,)) if isinstance(adapter, om.DenoisingBound) else Whole(adapter)


def shown(watched: Watched, images: Tensor) -> Tensor:
    """The images, in the size that the model sees, uint8 (N, C, S, S)."""
    size = watched.prepare(images[:1]).shape[-1]
    return trained.pooled(images, images.shape[-1] // size).mul(255).round().byte()


@torch.no_grad()
def score_norms(adapter: Any, x: Tensor) -> Array:
    """Norms of the score of an image at each of ten noise levels, (N, 10): a forward pass a level.

    References:
        Multiscale Score Matching for Out-of-Distribution Detection (Mahmood et al., 2021),
        https://arxiv.org/abs/2010.13132
    """
    alphas, columns = trained.SCHEDULE.alphas_cumprod, []
    x = x.to(device_of(adapter.module))
    for level in MSMA_LEVELS:
        scaled, t = alphas[level].sqrt() * x, torch.full((len(x),), level, device=x.device)
        pairs = zip(scaled.split(50), t.split(50), strict=True)
        noise = torch.cat([adapter.module(a, b).sample for a, b in pairs])
        norm = noise.flatten(1).norm(dim=1) / (1 - alphas[level]).sqrt()
        columns.append(norm.double().cpu().numpy())
    return np.stack(columns, 1)


def views(found: Mapping[str, Seen]) -> dict[str, View]:
    """What methods are fitted on, from what the passes gave of each set."""
    bits = {name: s.bits for name, s in found.items()}
    sums = {name: s.terms.log_likelihood.sum(1) for name, s in found.items()}
    result: dict[str, View] = {
        "likelihood": sums,
        "bits": bits,
        "complexity": {name: np.stack([sums[name], bits[name]], 1) for name in found},
        "values": varying_only({name: s.terms.log_likelihood for name, s in found.items()}),
        "whole": log_norms({name: s.whole for name, s in found.items()}),
        "norms": log_norms({name: s.terms for name, s in found.items()}),
        "default": default_view({name: s.terms for name, s in found.items()}),
    }
    rows = {name: s.rows for name, s in found.items() if s.rows is not None}
    if rows:
        result["rows"] = default_view(rows)
    scores = {name: np.log(s.scores) for name, s in found.items() if s.scores is not None}
    if scores:
        result["scores"] = scores
    if found["fit"].terms.terms[0].startswith("t="):
        result["least noise"] = {name: s.whole.log_likelihood.sum(1) for name, s in found.items()}
    return result


def varying_only(view: View) -> View:
    """Without the columns that are constant, as the log-determinant of a flow without scales."""
    kept = np.ptp(view["fit"], axis=0) > 0
    return {name: values[:, kept] for name, values in view.items()}


def log_norms(found: Mapping[str, Measurements]) -> View:
    return live_log_norms(found)[1]


def live_log_norms(found: Mapping[str, Measurements]) -> tuple[tuple[str, ...], View]:
    """Names of the L layers whose norm is alive, and of each set log norms (N, L)."""
    fit = found["fit"]
    logs = LogNorms.fit(fit.features, fit.norms, torch.finfo(torch.float32).eps)
    return logs.live_names, {name: logs(m.norms) for name, m in found.items()}


def default_view(found: Mapping[str, Measurements]) -> View:
    """Values of the terms, then logs of the norms: what a detector hands its default density."""
    values, logs = term_values(found), log_norms(found)
    return {name: np.hstack([values[name], logs[name]]) for name in found}


def term_values(found: Mapping[str, Measurements]) -> View:
    kept = varying(found["fit"])
    return {name: kept(m.log_likelihood) for name, m in found.items()}


def varying(fit: Measurements) -> TermValues:
    """The terms whose values the default density takes."""
    return TermValues.fit(fit.terms, fit.log_likelihood, torch.finfo(torch.float32).eps)


def default(fit: Measurements) -> om.TermsAndNorms:
    """The default density, unfitted, for `default_view`."""
    return om.TermsAndNorms(len(varying(fit).live_names))


@dataclass(frozen=True)
class Compared:
    """A method of the table.

    Attributes:
        view: The name of what it sees.
        make: Gives it, unfitted; of what the fit samples measured.
        passes: What a sample costs it: "forward", "level" (one pass of a diffusion model), "whole"
            or "terms" (with gradients), "scores", or "none".
    """

    view: str
    make: Callable[[Measurements], Method]
    passes: str


DEFAULT, PAPER, LOG_P = "default", "paper", "log-likelihood"

METHODS: dict[str, Compared] = {
    "PNG size": Compared("bits", lambda _: Typicality(), "none"),
    LOG_P: Compared("likelihood", lambda _: LowLikelihood(), "forward"),
    "typicality": Compared("likelihood", lambda _: Typicality(), "forward"),
    "log-likelihood, T = 1": Compared("least noise", lambda _: LowLikelihood(), "level"),
    "typicality, T = 1": Compared("least noise", lambda _: Typicality(), "level"),
    "likelihood + complexity": Compared("complexity", lambda _: WithComplexity(), "forward"),
    "terms' values, mixture": Compared("values", lambda _: GaussianMixture(), "forward"),
    "terms' values, kernels": Compared("values", lambda _: DensityOfStates(), "forward"),
    "MSMA": Compared("scores", lambda _: GaussianMixture(), "scores"),
    "total norm": Compared("whole", lambda _: TotalNorm(), "whole"),
    PAPER: Compared("whole", lambda _: om.DiagonalGaussian(), "whole"),
    "paper, Student-t": Compared("whole", lambda _: StudentT(), "whole"),
    "paper, one-class SVM": Compared("whole", lambda _: OneClassSVM(), "whole"),
    "paper, half-shrunk": Compared("whole", lambda _: om.ShrunkGaussian(), "whole"),
    "norms by term, diagonal": Compared("norms", lambda _: om.DiagonalGaussian(), "terms"),
    "norms by term, half-shrunk": Compared("norms", lambda _: om.ShrunkGaussian(), "terms"),
    "norms by term, Ledoit-Wolf": Compared(
        "norms", lambda _: om.ShrunkGaussian("ledoit_wolf"), "terms"
    ),
    DEFAULT: Compared("default", default, "terms"),
    "default, rows": Compared("rows", default, "terms"),
}


def costs(watched: Watched, module: Any, images: Tensor) -> dict[str, float]:
    """Time of each kind of passes, in units of one plain forward pass without gradients."""
    adapter, x = watched.adapter(module), watched.prepare(images).to(device_of(module))
    one = whole(adapter)  # an adapter is checked once, when it is new
    terms = len(measured(adapter, x[:2], 1).terms)
    diffusion = isinstance(adapter, om.DenoisingBound)

    def forward() -> None:
        with torch.no_grad():
            list(Whole(adapter).log_likelihood(x))

    runs: dict[str, Callable[[], object]] = {
        "whole": lambda: measured(one, x, 1),
        "terms": lambda: measured(adapter, x, 1),
    }
    if diffusion:
        runs["scores"] = lambda: score_norms(adapter, x)
    for run in runs.values():
        run()
    found = ratios(forward, runs, ROUNDS)
    # A diffusion model's bound passes the network once for each of its levels.
    unit = terms if diffusion else 1
    return {
        "none": 0.0,
        "level": 1.0,
        "forward": float(unit),
        **{name: round(unit * value, 2) for name, value in found.items()},
    }


def cached(file: Path, make: Callable[[], Seen]) -> Seen:
    """What a folder holds, else what is measured, kept there."""
    if not file.exists():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, **as_arrays(found))
        part.rename(file)
    with np.load(file) as arrays:
        return of_arrays(dict(arrays))


def as_arrays(found: Seen) -> dict[str, Any]:
    passes = {"terms": found.terms, "whole": found.whole, "rows": found.rows}
    dumped = {
        name: np.frombuffer(m.dump(), np.uint8) for name, m in passes.items() if m is not None
    }
    scores = {} if found.scores is None else {"scores": found.scores}
    return {"bits": found.bits, **dumped, **scores}


def of_arrays(arrays: Mapping[str, Any]) -> Seen:
    passes = {
        name: Measurements.parse(arrays[name].tobytes())
        for name in ("terms", "whole", "rows")
        if name in arrays
    }
    return Seen(
        passes["terms"], passes["whole"], passes.get("rows"), arrays["bits"], arrays.get("scores")
    )
