"""Run by a test in each of two processes: predicts under DDP, and writes what was returned."""

import json
import sys
import warnings
from pathlib import Path

import torch

import ood_monitor as om
from support.lightning_cases import Flow, images, loader, trainer, watcher


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, data = Flow(), images(40, seed=2)
    adapter = om.LogLikelihood(module)
    detector = om.Detector(adapter).fit([images(128, seed=1)], progress=False)
    callback = watcher(detector=detector, calibrate="never", watch=["predict"], with_scores=True)
    run = trainer(callback, strategy="ddp", devices=2)
    found = run.predict(module, loader(data, batch_size=8))
    assert found is not None
    returned = torch.cat([batch["ood/score"] for batch in found])
    expected = detector.score(data[run.global_rank :: 2]).score
    report = {
        "is equal": torch.allclose(returned, expected, rtol=1e-4, atol=1e-4),
        "samples": sum(len(batch["prediction"]) for batch in found),
        "is restored": "predict_step" not in vars(module),
    }
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
