"""Run by a test in each of two processes: both predict, and the second one fails or is late."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from support.lightning_cases import Flow, images, loader, trainer, watcher
from support.sharded_processes import Sharded
from support.two_processes import failure

__all__ = ["BATCHES", "LIMIT"]

#: Batches of sixteen that the two processes have.
BATCHES = (7, 4)

#: Seconds that a process waits for another: more than their starts are apart on a busy machine.
LIMIT = 20


class Own(IterableDataset[Tensor]):
    """Batches of this process."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(BATCHES[self._rank]):
            yield from images(16, seed=10 + 10 * self._rank + index)


class Failing:
    """Predicts without the model; `what` comes in between in the third batch, if anything."""

    what: Any = None

    def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
        if self.what is not None and index == 2:
            self.what()
        return x


class Whole(Failing, Flow):
    """One copy in each process."""


class Shards(Failing, Sharded):
    """Shards in each process."""


def fail() -> None:
    raise OSError("no such disk")


def main(folder: Path, strategy: str, what: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    callback = watcher()
    module: Any = Whole() if strategy == "ddp" else Shards()
    run = made(strategy, callback)
    run.predict(module, loader(images(4), batch_size=2))  # which shards the model
    callback.calibrate(run, module, [images(64, seed=1), images(64, seed=2)])
    rank = run.global_rank
    (folder / f"ready{rank}").touch()
    if rank == 1:
        module.what = fail if what == "fails" else lambda: wait_for(folder / "rank0.json")
    report = predicted(run, module, callback)
    if what == "fails":  # one goes on at once, and meets the other in the next run
        module.what = None
        report["again"] = predicted(run, module, callback)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def predicted(run: pl.Trainer, module: nn.Module, callback: OODMonitor) -> dict[str, Any]:
    """Of the last batches of both, in a prediction."""
    batches = DataLoader(Own(run.global_rank), batch_size=16)
    before = callback.failures
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        heard = failure(lambda: run.predict(module, batches))  # type: ignore[arg-type]
    told = [str(warning.message) for warning in caught]
    report = {"heard": heard, "told": told, "failures": callback.failures - before}
    callback.alerts.clear()
    found = failure(lambda: callback.recorded("predict"))
    scored = len(callback.recorded("predict")) if found == "none" else 0
    return report | {"scored": scored}


def made(strategy: str, callback: OODMonitor) -> pl.Trainer:
    limit = timedelta(seconds=LIMIT)
    parallel: Strategy = DDPStrategy(timeout=limit)
    if strategy == "shards":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        parallel = ModelParallelStrategy(**sizes, timeout=limit)  # type: ignore[arg-type]
    return trainer(callback, strategy=parallel, devices=2, num_sanity_val_steps=0)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
