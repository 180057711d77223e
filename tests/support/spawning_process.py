"""Run by a test: fits in a process that Lightning launches, and says what its parent has then."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ood_monitor import Detector, LogLikelihood
from support.lightning_cases import Flow, images, loader, trainer, watcher


def main(folder: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    callback, module = watcher(), Flow()
    run = trainer(callback, strategy=strategy, devices=1, num_sanity_val_steps=0)
    run.fit(module, loader(images(64)), loader(images(128, seed=1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report: dict[str, Any] = {"object": callback.detector is not None}
        # Of the weights that Lightning brought back, or "stale" is told.
        detector = Detector.from_state_dict(callback.state_dict(), LogLikelihood(module))
    report["told"] = [str(warning.message) for warning in caught]
    report["samples"] = detector.fitted.fit_count + len(detector.fitted.calibration.scores)
    alone = trainer(callback)
    alone.predict(module, loader(images(8, seed=2)))  # here
    report["scored"] = len(callback.recorded("predict"))
    report["fingerprints"] = [
        found.fitted.fingerprint for found in (detector, callback.detector) if found is not None
    ]
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
