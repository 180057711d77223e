"""Run by a test in each of two processes: a loop that watches loaders of uneven size."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ood_monitor_integrations.accelerate import AcceleratorMonitor, AcceleratorSink, FileTracker
from torch.utils.data import DataLoader, Dataset

import ood_monitor as om
from support.transformers_cases import Texts, collated, llama

__all__ = ["SIZES", "watched"]

#: Samples of the streams: less than a batch, and no multiple of batches or of processes.
SIZES = (5, 43)


def loader(texts: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(texts, batch_size=8, collate_fn=collated)


def watched(accelerator: Accelerator, folder: Path, *, prepares: bool) -> dict[str, Any]:
    model = llama().eval()
    adapter = om.SequenceLikelihood(model, ignore_index=-100)
    torch.manual_seed(accelerator.process_index)
    state = torch.get_rng_state()
    watch = AcceleratorMonitor(
        accelerator,
        accelerator.prepare(model),
        adapter,
        fpr=0.05,
        sinks=[AcceleratorSink(accelerator)],
        progress=False,
    )
    ready = accelerator.prepare if prepares else lambda found: found
    detector = watch.calibrate(ready(loader(Texts(90, 5))))
    found: dict[str, Any] = {"detector": detector.fitted.fingerprint}
    for size in SIZES:
        watch.watch(ready(loader(Texts(size, 6, foreign=True))), stage=str(size))
        recorded = watch.recorded[str(size)]
        found[f"indices {size}"] = recorded.dataset_index.tolist()
        found[f"scores {size}"] = recorded.scores.score.tolist()
    found["alerts"] = [[alert.kind, alert.stream, alert.samples_seen] for alert in watch.alerts]
    assert torch.equal(torch.get_rng_state(), state)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    accelerator = Accelerator(cpu=True, log_with=[FileTracker(folder / "tracked")])
    accelerator.init_trackers("test")
    report = {
        "prepared": watched(accelerator, folder, prepares=True),
        "in turns": watched(accelerator, folder, prepares=False),
    }
    rank = accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
