"""Flows by depth and width, and by the number of images that they were trained on.

Trained here, on Fashion-MNIST at 8x8: small enough that a core trains each in a minute.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import methods, protocol, trained
from benchmarks.detection.methods import live_log_norms
from benchmarks.detection.paper import Case
from benchmarks.detection.protocol import aurocs, with_mean
from benchmarks.detection.statements_norms import TYPICALITY, layers, whole_of
from ood_monitor.densities.baselines import Typicality

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        depths: Steps of each of the flow's two levels.
        widths: Hidden channels of its couplings.
        images: Of training, of the flow of least depth and middle width.
        steps: Of training, of each by depth and width; of each by images.
        factor: By which images are averaged to 8x8.
    """

    depths: tuple[int, ...] = (2, 8, 16)
    widths: tuple[int, ...] = (4, 16, 64)
    images: tuple[int, ...] = (500, 5_000, 50_000)
    steps: tuple[int, int] = (400, 1_500)
    factor: int = 4


QUICK = Plan(depths=(1, 2), widths=(4,), images=(100, 1_000), steps=(20, 20), factor=1)


def rows_of(on: str, images: Tensor, sets: Mapping[str, Tensor], plan: Plan) -> Iterator[Row]:
    """A row for each flow."""
    by_size, by_images = plan.steps
    for depth in plan.depths:
        for width in plan.widths:
            case = flow(on, images, sets, depth, width, by_size, plan.factor)
            yield {"part": "sizes", "varied": "depth and width"} | judged(case, depth, width)
    depth, width = plan.depths[0], plan.widths[len(plan.widths) // 2]
    for count in plan.images:
        case = flow(on, images[:count], sets, depth, width, by_images, plan.factor)
        named = {"part": "sizes", "varied": "training images", "images": count}
        yield named | judged(case, depth, width)


def flow(
    on: str,
    images: Tensor,
    sets: Mapping[str, Tensor],
    depth: int,
    width: int,
    steps: int,
    factor: int,
) -> Case:
    make = functools.partial(
        om.models.Glow, channels=1, size=8, levels=2, steps=depth, hidden=width, log_scale_bound=0.5
    )
    watched = trained.watched_glow(make, steps, factor)
    torch.manual_seed(0)
    module = watched.make()
    trained.train(module, watched, images)
    return Case(on, "Glow", watched, module.eval(), sets)


def judged(case: Case, depth: int, width: int) -> Row:
    """Of single samples: correlation of layers, AUROC of the paper's score and beside it."""
    names = [name for name in case.sets if name != "calibration"]
    found = {name: methods.measured(whole_of(case), case.prepared(name), 1) for name in names}
    _, logs = live_log_norms(found)
    values = {name: m.log_likelihood.sum(1) for name, m in found.items()}
    by_layer = layers(found)
    spaced: dict[str, float] = by_layer["evenly spaced"]
    return {
        "depth": depth,
        "width": width,
        "layers": by_layer["layers"],
        "correlation": by_layer["correlation"],
        "held-out nats": round(-float(values["fit"].mean()), 2),
        TYPICALITY: with_mean(aurocs(protocol.scored(Typicality(), values)))["mean"],
        methods.PAPER: with_mean(aurocs(protocol.scored(om.DiagonalGaussian(), logs)))["mean"],
        "half-shrunk": with_mean(aurocs(protocol.scored(om.ShrunkGaussian(), logs)))["mean"],
        "best alone": by_layer["best alone"],
        "best number": int(max(spaced, key=lambda k: spaced[k])),
    }
