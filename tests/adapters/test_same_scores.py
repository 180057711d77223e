"""A sample's score is its own: alone, in any batch and order, in any process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fitted_cases import ADAPTERS, adapter_of, batch_of, fitted

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors, pieces

TESTS = Path(__file__).parents[1]


def backwards(batch: Batch) -> Batch:
    return map_tensors(lambda tensor: tensor.flip(0), batch)


@pytest.fixture(scope="module")
def detectors() -> dict[str, om.Detector]:
    with torch.random.fork_rng():
        return {name: fitted(name) for name in ADAPTERS}


@pytest.mark.parametrize("name", ADAPTERS)
def test_score_is_the_same_alone_and_in_another_order(
    name: str, detectors: dict[str, om.Detector]
) -> None:
    detector, batch = detectors[name], batch_of(name, 6, seed=2)
    together = detector.score(batch).score
    alone = torch.cat([detector.score(one).score for one in pieces(batch, 1)])
    reordered = detector.score(backwards(batch)).score.flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reordered, together, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_score_is_the_same_after_a_restart(
    detectors: dict[str, om.Detector], tmp_path: Path
) -> None:
    for name, detector in detectors.items():
        detector.save_pretrained(tmp_path / name)
    program = f"import test_same_scores as t; t.print_scores({str(tmp_path)!r})"
    path = os.pathsep.join(map(str, (Path(__file__).parent, TESTS)))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    elsewhere = json.loads(done.stdout.splitlines()[-1])
    for name, detector in detectors.items():
        here = detector.score(batch_of(name, 6, seed=2)).score
        there = torch.tensor(elsewhere[name], dtype=here.dtype)
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def print_scores(folder: str) -> None:
    """What a process that starts anew makes of saved detectors, on batches of another size."""
    torch.set_num_threads(1)
    scores = {}
    for name in ADAPTERS:
        detector = om.Detector.from_pretrained(Path(folder) / name, adapter_of(name))
        parts = pieces(backwards(batch_of(name, 6, seed=2)), 4)
        scores[name] = torch.cat([detector.score(part).score for part in parts]).flip(0).tolist()
    print(json.dumps(scores))
