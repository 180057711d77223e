"""What a step on one sample changes, and how flat the likelihood is in the parameters.

Both in double precision: what one step changes of others is far below the rounding of their
likelihood in single.
"""

import contextlib
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import ood_monitor as om
from benchmarks.detection.paper import Case
from benchmarks.detection.protocol import Array, aurocs
from benchmarks.detection.statements_norms import whole_of
from ood_monitor.adapters.base import checked_terms

Row = dict[str, Any]

#: What the median sample in distribution gains by the step on it, to first order, in nats.
GAIN = 0.1

#: Of a disturbance, in root mean squares of each tensor.
RELATIVE_SIZES = (0.001, 0.003, 0.01)

#: What a change that is no number counts as, in nats: a flow overflows.
_HUGE = 1e30


@dataclass(frozen=True)
class Counts:
    """Samples.

    Attributes:
        known: In distribution, each of which is stepped on.
        foreign: Likewise, of each other set.
        others: In distribution, whose change is seen.
        draws: Of a disturbance of the parameters.
    """

    known: int = 100
    foreign: int = 30
    others: int = 30
    draws: int = 10


def doubled(case: Case) -> Case:
    return replace(case, module=copy.deepcopy(case.module).double())


def inputs(case: Case, counts: Counts) -> dict[str, Tensor]:
    """What is measured of each set: "test", then the foreign ones."""
    names = [name for name in case.sets if name not in ("fit", "calibration")]
    many = {name: counts.known if name == "test" else counts.foreign for name in names}
    return {name: double(case.prepared(name)[:count]) for name, count in many.items()}


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def total(adapter: om.Adapter, x: Tensor) -> Tensor:
    """The log-likelihood (B,), nats."""
    return torch.stack([value for _, value in checked_terms(adapter, x)]).sum(0)


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Adds to parameters, and puts back what was there."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, change in zip(parameters, by, strict=True):
            p.add_(change)
        try:
            yield
        finally:
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


# Influence.


def influence(case: Case, counts: Counts) -> Iterator[Row]:
    """Rank correlation of a sample's norm with what a step of plain gradient ascent on it does."""
    case = doubled(case)
    adapter, x = whole_of(case), inputs(case, counts)
    others = double(case.prepared("calibration")[: counts.others])
    parameters = list(case.module.parameters())
    norms = {name: squared_norms(adapter, parameters, images) for name, images in x.items()}
    rate = GAIN / float(np.median(norms["test"]))
    with torch.no_grad():
        before = total(adapter, others)
    found = {
        name: np.array(
            [stepped(adapter, parameters, s, others, before, rate) for s in images.split(1)]
        )
        for name, images in x.items()
    }
    columns = {"own": 0, "others": 1, "others, signed": 2}
    ranks = {
        what: by_kind(norms, {k: v[:, i] for k, v in found.items()}) for what, i in columns.items()
    }
    changed = {name: values[:, 1] for name, values in found.items()}
    yield {
        "part": "influence",
        "rate": rate,
        "rank correlation": ranks,
        "median change of others": {k: float(np.median(v)) for k, v in changed.items()},
        "auroc": aurocs(changed),
        "auroc of the norm": aurocs(norms),
    }


def gradient(adapter: om.Adapter, parameters: Sequence[Tensor], sample: Tensor) -> list[Tensor]:
    """Of one sample's log-likelihood; zeros where there is none."""
    found = torch.autograd.grad(total(adapter, sample).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def squared_norms(adapter: om.Adapter, parameters: Sequence[Tensor], x: Tensor) -> Array:
    """Over all parameters, (N,)."""
    each = [
        sum(float(g.square().sum()) for g in gradient(adapter, parameters, sample))
        for sample in x.split(1)
    ]
    return np.nan_to_num(np.array(each), nan=_HUGE, posinf=_HUGE)


def stepped(
    adapter: om.Adapter,
    parameters: Sequence[Tensor],
    sample: Tensor,
    others: Tensor,
    before: Tensor,
    rate: float,
) -> tuple[float, ...]:
    """What a step on a sample changes of its own log-likelihood, of others' in size and sign."""
    with torch.no_grad():
        own = total(adapter, sample)
    step = [rate * g for g in gradient(adapter, parameters, sample)]
    with moved(parameters, step):
        own = total(adapter, sample) - own
        change = total(adapter, others) - before
    told = (own.sum(), change.abs().mean(), change.mean())
    return tuple(
        float(np.nan_to_num(float(v), nan=_HUGE, posinf=_HUGE, neginf=-_HUGE)) for v in told
    )


def by_kind(norms: Mapping[str, Array], changes: Mapping[str, Array]) -> dict[str, float]:
    """Rank correlation over samples in distribution, over foreign ones, and over all."""
    foreign = [name for name in norms if name != "test"]
    kinds = {"in distribution": ["test"], "foreign": foreign, "all": list(norms)}
    return {
        kind: round(
            float(
                spearmanr(
                    np.concatenate([norms[name] for name in names]),
                    np.concatenate([changes[name] for name in names]),
                ).statistic
            ),
            3,
        )
        for kind, names in kinds.items()
    }


# Flatness.


def flatness(case: Case, counts: Counts) -> Iterator[Row]:
    """What a random disturbance of all parameters, each in its own scale, changes of each set.

    A change is a sample's root mean square over draws, and a set's the median over samples.
    """
    case = doubled(case)
    adapter, x = whole_of(case), inputs(case, counts)
    parameters = list(case.module.parameters())
    with torch.no_grad():
        before = {name: total(adapter, images) for name, images in x.items()}
    spread = float(before["test"].std())
    for size in RELATIVE_SIZES:
        drawn = [disturbed(adapter, parameters, x, size, seed) for seed in range(counts.draws)]
        change = {
            name: statistics.median(rms([d[name] - before[name] for d in drawn])) for name in x
        }
        known = change["test"]
        yield {
            "part": "flatness",
            "size": size,
            "change": {name: round(value, 4) for name, value in change.items()},
            "of the spread": round(known / spread, 4),
            "foreign to known": {k: round(v / known, 3) for k, v in change.items() if k != "test"},
        }


def disturbed(
    adapter: om.Adapter,
    parameters: Sequence[Tensor],
    x: Mapping[str, Tensor],
    size: float,
    seed: int,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = [
        size
        * p.detach().square().mean().sqrt()
        * torch.randn(p.shape, generator=generator).double()
        for p in parameters
    ]
    with moved(parameters, noise):
        return {name: total(adapter, images) for name, images in x.items()}


def rms(changes: Sequence[Tensor]) -> list[float]:
    """Of each sample over draws."""
    found = torch.stack(list(changes)).square().mean(0).sqrt()
    values: list[float] = torch.nan_to_num(found, nan=_HUGE, posinf=_HUGE).tolist()
    return values
