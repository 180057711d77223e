"""Run by a test in each of two processes: trains, watches, and writes what this process found."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ood_monitor import Alert
from support.lightning_cases import Flow, images, loader, trainer, watcher

__all__ = [
    "SIZES",
    "STREAM",
    "TURNS",
    "calibration",
    "described",
    "fingerprint",
    "found",
    "state",
    "stream",
    "turns",
]

#: Sizes of the batches that each process has, and of those that they share out.
SIZES, TURNS = ((9, 1, 16, 20), (4, 20, 7, 13, 3)), [5, 31, 2, 40, 17, 60, 3, 53]

#: Samples of the stream, the latter half of them foreign: no multiple of processes or batches.
STREAM = 131


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    heard: list[Alert] = []
    plain = fitted(None, folder / "plain")
    callback = watcher(
        watch=["train", "val", "test", "predict"],
        sinks=[heard.append],
        scores_dir=folder,
    )
    watched = fitted(callback, folder)
    callback.alerts.clear()
    report: dict[str, Any] = {"plain": state(plain), "watched": state(watched)}
    report["detector"] = fingerprint(callback)
    run, module = ddp(callback, folder), watched.lightning_module
    (metrics,) = run.test(module, stream(), verbose=False)
    report["test"] = found(callback, "test") | {"metrics": metrics}
    heard.clear()
    run.predict(module, stream())
    report["predict"] = found(callback, "predict")
    report["heard"] = [described(alert) for alert in heard]
    run.predict(module, DataLoader(Uneven(run.global_rank), batch_size=16))
    report["uneven"] = found(callback, "predict")
    varying = DataLoader(Varying(SIZES[run.global_rank]), batch_size=None)
    run.validate(module, varying, verbose=False)
    report["varying"] = found(callback, "val")
    callback.calibrate(run, module, turns())
    report["turns"] = calibration(callback)
    callback.calibrate(run, module, [images(128, seed=1)])
    report["one batch"] = fingerprint(callback)
    report["failure"] = failure(callback, run, module)
    report["apart"] = apart(callback, run, module)
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(report))


class Uneven(IterableDataset[Tensor]):
    """Of which the second process has no sample."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __iter__(self) -> Iterator[Tensor]:
        yield from images(20 if self._rank == 0 else 0, seed=2)


class Varying(IterableDataset[Tensor]):
    """Batches of several sizes."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes

    def __iter__(self) -> Iterator[Tensor]:
        for index, size in enumerate(self._sizes):
            yield images(size, seed=100 * len(self._sizes) + index)


def turns() -> list[Tensor]:
    """Batches of several sizes, of which the processes take one in turn."""
    return list(images(sum(TURNS), seed=1).split(TURNS))


def ddp(callback: OODMonitor | None, folder: Path) -> pl.Trainer:
    callbacks = [callback] if callback is not None else []
    return trainer(
        *callbacks,
        ModelCheckpoint(folder, save_last=True),
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
    )


def fitted(callback: OODMonitor | None, folder: Path) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    run = ddp(callback, folder)
    # The sampler pads 129 samples to 130.
    held_out = loader(images(129, seed=1), batch_size=16)
    run.fit(initialised(), loader(images(64), batch_size=8, shuffle=True), held_out)
    return run


def initialised() -> Flow:
    """A flow that no process sets from its own first batch."""
    module = Flow()
    module.flow.log_prob(images(8))
    return module


def state(run: pl.Trainer, weights: list[Any] | None = None) -> dict[str, Any]:
    whole = run.lightning_module.parameters() if weights is None else ()
    return {
        "weights": weights or [p.flatten().tolist() for p in whole],
        "rng": torch.get_rng_state().tolist(),
        "val/nll": float(run.callback_metrics["val/nll"]),
    }


def stream() -> Any:
    data = torch.cat([images(64, seed=2), images(STREAM - 64, seed=3) / 4])
    data[40] *= 4  # flagged alone, before the drift
    return loader(data, batch_size=16)


def fingerprint(callback: OODMonitor) -> dict[str, Any]:
    assert callback.detector is not None
    fitted = callback.detector.fitted
    samples = fitted.fit_count + len(fitted.calibration.scores)
    return {"fingerprint": fitted.fingerprint, "samples": samples}


def calibration(callback: OODMonitor) -> list[float]:
    assert callback.detector is not None
    scores: list[float] = callback.detector.fitted.calibration.scores.tolist()
    return scores


def found(callback: OODMonitor, stage: Any) -> dict[str, Any]:
    recorded, alerts = callback.recorded(stage), list(callback.alerts)
    callback.alerts.clear()
    assert callback.monitor is not None
    return {
        "score": recorded.scores.score.tolist(),
        "p_value": recorded.scores.p_value.tolist(),
        "dataset_index": recorded.dataset_index.tolist(),
        "status": callback.monitor.status,
        "alerts": [described(alert) for alert in alerts],
    }


def described(alert: Alert) -> dict[str, Any]:
    """What does not hang on rounding."""
    layers = [layer.layer for layer in alert.top_layers[:1]]
    return {"kind": alert.kind, "samples_seen": alert.samples_seen, "layers": layers}


def failure(callback: OODMonitor, run: pl.Trainer, module: Any) -> str:
    """What this process hears when the second one cannot read its data."""
    try:
        callback.calibrate(run, module, unreadable(run.global_rank))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def apart(callback: OODMonitor, run: pl.Trainer, module: Any) -> str:
    """What this process hears when the second one has other weights."""
    with torch.no_grad():
        next(module.parameters()).add_(run.global_rank)
    try:
        callback.calibrate(run, module, [images(64, seed=1), images(64, seed=2)])
    except ValueError as error:
        return str(error)
    return "none"


def unreadable(rank: int) -> Iterator[Tensor]:
    yield images(64, seed=1)
    if rank == 1:
        raise OSError("no such disk")
    yield images(64, seed=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
