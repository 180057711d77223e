"""Run by a test in each of two processes: models in shards by `fully_shard`, without a Trainer."""

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ood_monitor import Adapter, DenoisingBound, Detector, LogLikelihood, gradient_norms
from ood_monitor.models import Glow
from ood_monitor.modules import is_shard
from ood_monitor.monitor.staleness import Weights
from support.two_processes import failure

__all__ = ["CASES"]


class Denoiser(nn.Module):
    """Three convolutions, of which only some may be sharded on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x) + 0.001 * timestep.view(-1, 1, 1, 1)
        return self.last(self.second(h.relu()).relu())


@dataclass(frozen=True)
class Case:
    """A model, which of its parts have shards of their own, and whether the rest has."""

    make: Callable[[], nn.Module]
    parts: Callable[[Any], list[nn.Module]]
    adapter: Callable[[nn.Module], Adapter]
    rest: bool = True


def glow() -> Glow:
    return Glow(channels=1, size=8, levels=2, steps=1, hidden=4)


def bound(module: nn.Module) -> DenoisingBound:
    return DenoisingBound(module, torch.linspace(0.9999, 0.01, 1000))


CASES = {
    "flow": Case(glow, lambda m: list(m.levels), LogLikelihood),
    "flow as one": Case(glow, lambda m: [], LogLikelihood),
    "denoiser": Case(Denoiser, lambda m: [m.second], bound),
    "denoiser without rest": Case(Denoiser, lambda m: [m.first, m.second, m.last], bound),
    "denoiser by layer": Case(Denoiser, lambda m: [m.first, m.second, m.last], bound, rest=False),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    try:
        report = {name: found(case) for name, case in CASES.items()}
        report["wrapper"] = {"refused": failure(lambda: wrapped(glow()))}
    finally:
        rank = dist.get_rank()
        dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def found(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    whole = case.make()
    shards, plain = sharded(case, whole), sharded(case, whole)
    held_out, batch = images(80, 1), images(6, 2 + dist.get_rank())
    detectors = [
        detector(case, module).fit([held_out], progress=False) for module in (whole, shards)
    ]
    report: dict[str, Any] = {"weights": [each.fitted.model for each in detectors]}
    scores = [each.score(batch) for each in detectors]
    report["scores"] = [each.score.tolist() for each in scores]
    report["p_values"] = [each.p_value.tolist() for each in scores]
    fewer = detector(case, shards).measure(images(1 + 5 * dist.get_rank(), 4))
    report["fewer"] = len(fewer)  # of one sample, passes of no two are compared on first use
    report["are shards"] = all(map(is_shard, shards.parameters()))
    for of, on in zip(detectors, (shards, whole), strict=True):  # of which no warning is told
        Detector.from_state_dict(of.state_dict(), case.adapter(on))
    report["failed"] = failure(lambda: failing(case, shards, batch))
    report["again"] = detectors[1].score(batch).score.tolist()
    report["within"] = failure(lambda: within(case, shards, detectors[1], batch))
    report["gradients"] = failure(lambda: gradient_norms(case.adapter(shards), batch))
    watched = Weights(shards, detectors[1].fitted.model)
    with torch.no_grad():
        loss_of(case, shards.eval(), batch)  # after which FSDP leaves weights whole
    before = [detectors[1].is_stale, watched.are_stale()]
    shards.train()
    scored, unscored = trained(case, shards, detectors[1]), trained(case, plain, None)
    report["same training"] = scored == unscored
    report["stale"] = [before, [detectors[1].is_stale, watched.are_stale()]]
    return report


def sharded(case: Case, whole: nn.Module) -> nn.Module:
    module, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
    for part in case.parts(module):
        fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh) if case.rest else module  # type: ignore[return-value]


def detector(case: Case, module: nn.Module) -> Detector:
    return Detector(case.adapter(module), explain=0)


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def failing(case: Case, module: nn.Module, batch: Tensor) -> None:
    """Score while a layer in the midst of the model fails."""
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    handle = layers[1].register_forward_hook(_fail)
    try:
        Detector(case.adapter(module), method="forward").measure(batch)
    finally:
        handle.remove()


def within(case: Case, module: nn.Module, scorer: Detector, batch: Tensor) -> None:
    """Score within a forward pass, which goes on where it was."""
    told: list[str] = []
    layer = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    hook = layer.register_forward_hook(
        lambda *given: told.append(failure(lambda: scorer.score(batch))),
        prepend=True,
    )
    with hook, torch.no_grad():
        loss_of(case, module.eval(), batch)
    raise ValueError(told[0])


def _fail(*given: Any) -> None:
    raise OSError("no such layer")


def trained(case: Case, module: nn.Module, scorer: Detector | None) -> list[Any]:
    """This process's shards after two steps, with a batch scored before, between and after."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    batch = images(4, 20 + dist.get_rank())
    for _ in range(2):
        score = (lambda: None) if scorer is None else (lambda: scorer.score(batch))
        score()
        loss = loss_of(case, module, batch)
        score()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        score()
    module.state_dict()  # puts shards in place
    return [p.to_local().flatten().tolist() for p in module.parameters()]  # type: ignore[operator]


def loss_of(case: Case, module: nn.Module, batch: Tensor) -> Tensor:
    if case.make is Denoiser:
        t = torch.full((len(batch),), 10.0)
        return module(batch, t).square().mean()  # type: ignore[no-any-return]
    return module(batch).mean()  # type: ignore[no-any-return]


def wrapped(module: nn.Module) -> None:
    wrapper = FullyShardedDataParallel(
        Denoiser(), device_id=torch.device("cpu"), use_orig_params=True
    )
    Detector(bound(wrapper), explain=0).fit([images(80, 1)], progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
