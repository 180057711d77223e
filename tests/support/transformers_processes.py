"""Run by a test in each of two processes: trains, watches, and writes what this process found."""

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ood_monitor_integrations.transformers import OODCallback
from torch import Tensor

from support.transformers_cases import Texts, callback, gpt2, outcome, trainer

__all__ = ["STREAM"]

#: Samples of the stream: no multiple of processes or batches.
STREAM = 71


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    plain = trainer(gpt2(), folder / "plain", **options)
    plain.train()
    report: dict[str, Any] = {"plain": _told(outcome(plain))}
    heard: list[Any] = []
    watcher = callback(
        watch=["train", "predict"], calibrate="every checkpoint", sinks=[heard.append]
    )
    online = callback(
        watch=["eval"], held_out=Texts(64, 5), calibrate_every_n_evaluations=1, name="online"
    )
    run = trainer(gpt2(), folder / "watched", watcher, online, **options)
    run.train()
    report["watched"] = _told(outcome(run))
    report["failures"] = {**watcher._failures.counts, **online._failures.counts}
    report["detector"] = watcher.detector.fitted.fingerprint if watcher.detector else None
    metrics = run.predict(Texts(STREAM, 8, foreign=True)).metrics or {}
    report["predict"] = found(watcher) | {
        "metrics": {name: value for name, value in metrics.items() if "_ood_" in name},
        "heard": len(heard),
    }
    rank = dist.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def found(watcher: OODCallback) -> dict[str, Any]:
    recorded = watcher.recorded("predict")
    return {
        "scores": recorded.scores.score.tolist(),
        "indices": recorded.dataset_index.tolist(),
        "alerts": [[alert.kind, alert.samples_seen] for alert in watcher.alerts],
        "fingerprint": watcher.detector.fitted.fingerprint if watcher.detector else None,
    }


def _told(left: dict[str, Iterable[Any]]) -> dict[str, str]:
    return {name: _digest(values) for name, values in left.items()}


def _digest(values: Iterable[Any]) -> str:
    state = hashlib.sha256()
    for value in values:
        is_tensor = isinstance(value, Tensor)
        state.update(value.numpy().tobytes() if is_tensor else repr(value).encode())
    return state.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
