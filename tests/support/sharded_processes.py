"""Run by a test in each of two processes: a model in shards, watched, and what is found of it."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, IterableDataset

from ood_monitor import Detector, LogLikelihood
from support.lightning_cases import Flow, images, loader, trainer, watcher
from support.lightning_processes import fingerprint, found, state, stream
from support.two_processes import failure

__all__ = ["BATCHES", "HELD_OUT"]

#: Batches of sixteen that the two processes have.
BATCHES = (7, 4)

HELD_OUT = 129


class Sharded(Flow):
    """The flow, of which each level and what is left have weights in shards."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self.flow, "reshard"):
            for level in self.flow.levels:
                fully_shard(level, mesh=mesh)
            fully_shard(self.flow, mesh=mesh)
            register_fsdp_forward_method(self.flow, "log_prob")


class Silent(Sharded):
    """Predicts without the model: its processes may have other numbers of batches."""

    broken = False

    def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        handle = self.flow.levels[0].register_forward_hook(self._break)
        try:
            return super().log_prob(x)
        finally:
            handle.remove()

    def _break(self, *given: Any) -> None:
        """Within the pass: after one part has its weights, and before the next."""
        if self.broken:
            raise OSError("no such layer")


class Own(IterableDataset[Tensor]):
    """Batches of this process."""

    def __init__(self, rank: int, failing_after: int | None = None) -> None:
        self._rank, self._failing_after = rank, failing_after

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(BATCHES[self._rank]):
            if self._rank == 1 and index == self._failing_after:
                raise OSError("no such disk")
            yield from images(16, seed=10 + 10 * self._rank + index)


class Shared:
    """What the callback takes as shared out already."""

    num_replicas = 2


class Listed(list[Tensor]):
    """Batches, of which each process has its own."""

    sampler = Shared()


def batches(rank: int, failing_after: int | None = None) -> Any:
    made = DataLoader(Own(rank, failing_after), batch_size=16)
    object.__setattr__(made, "sampler", Shared())
    return made


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("ood_monitor").addHandler(told := Told())
    plain = fitted(None, folder / "plain")
    callback = watcher(watch=["val", "test", "predict"])
    watched = fitted(callback, folder)
    report: dict[str, Any] = {"plain": state_of(plain), "watched": state_of(watched)}
    report["detector"], report["told"] = fingerprint(callback), told.lines
    callback.alerts.clear()
    module = watched.lightning_module
    for stage in ("test", "predict"):
        options = {} if stage == "predict" else {"verbose": False}
        getattr(sharded(callback, folder), stage)(module, stream(), **options)
        report[stage] = found(callback, stage)
    report |= unequal(folder)
    report["loaded"] = loaded(folder)
    rank = watched.global_rank
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def unequal(folder: Path) -> dict[str, Any]:
    """Of processes with seven batches and four, of which one may fail."""
    callback, module = watcher(), Silent()
    run = sharded(callback, folder)
    rank = run.global_rank
    run.predict(module, loader(images(4), batch_size=2))  # which shards the model
    report: dict[str, Any] = {"unwatched": callback.detector is None}
    callback.calibrate(run, module, batches(rank))
    report["seven and four"] = fingerprint(callback)
    run.predict(module, DataLoader(Own(rank), batch_size=16))
    report["uneven"] = found(callback, "predict")
    report["no disk"] = failure(lambda: callback.calibrate(run, module, batches(rank, 3)))
    module.broken = rank == 1
    report["no layer"] = failure(lambda: callback.calibrate(run, module, batches(rank)))
    run.predict(module, DataLoader(Own(rank), batch_size=16))
    report["broken"] = found(callback, "predict") | {"failures": callback.failures}
    module.broken = False
    run.predict(module, DataLoader(Own(rank), batch_size=16))
    report["mended"] = found(callback, "predict")
    report["one sample"] = one_sample(callback, run, module)
    gradients = OODMonitor(method="gradient_norms", progress=False)
    report["gradients"] = failure(lambda: gradients.calibrate(run, module, batches(rank)))
    return report


def one_sample(callback: OODMonitor, run: pl.Trainer, module: Silent) -> dict[str, Any]:
    """Of a process with one sample, of which no two are compared on first use."""
    callback.calibrate(run, module, Listed([images(1 if run.global_rank else 99, seed=5)]))
    return fingerprint(callback)


def loaded(folder: Path) -> dict[str, Any]:
    """Of a detector that was fitted on the whole model, and a monitor of the same in shards."""
    whole = Flow()
    whole.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    detector = Detector(LogLikelihood(whole)).fit([images(HELD_OUT, seed=1)], progress=False)
    detector.save_pretrained(own := folder / f"whole{os.environ['LOCAL_RANK']}")
    run = sharded(callback := watcher(detector=own, calibrate="never"), folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.predict(Sharded(), stream(), ckpt_path=folder / "last.ckpt")
    told = [str(warning.message) for warning in caught]
    return found(callback, "predict") | {"stale": [line for line in told if "tale" in line]}


def sharded(callback: OODMonitor | None, folder: Path) -> pl.Trainer:
    callbacks = [callback] if callback is not None else []
    return trainer(
        *callbacks,
        ModelCheckpoint(folder, save_last=True),
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        devices=2,
        num_sanity_val_steps=0,
    )


def fitted(callback: OODMonitor | None, folder: Path) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    run = sharded(callback, folder)
    held_out = loader(images(HELD_OUT, seed=1), batch_size=16)
    run.fit(Sharded(), loader(images(64), batch_size=8, shuffle=True), held_out)
    return run


def state_of(run: pl.Trainer) -> dict[str, Any]:
    """Of this process: shards, random state and what was validated."""
    module = run.lightning_module
    module.state_dict()  # puts shards in place
    shards = [p.to_local().flatten().tolist() for p in module.parameters()]  # type: ignore[operator]
    return state(run, shards)


class Told(logging.Handler):
    """Keeps what is told in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main_failing(folder: Path, where: str) -> None:
    """End by what the second process meets while both calibrate, or while they predict."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    callback, module = watcher(), Silent()
    run = sharded(callback, folder)
    run.predict(module, loader(images(4), batch_size=2))  # which shards the model
    (folder / f"ready{run.global_rank}").touch()
    if where == "step":
        callback.calibrate(run, module, batches(run.global_rank))
        run.predict(module, batches(run.global_rank, 3))
    module.broken = where == "pass" and run.global_rank == 1
    callback.calibrate(run, module, batches(run.global_rank, 3 if where == "loader" else None))


if __name__ == "__main__":
    (main_failing if sys.argv[2:] else main)(Path(sys.argv[1]), *sys.argv[2:])
