"""What is fitted in a process that ends with `fit` is handed over to the one that launched it."""

import copy
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ood_monitor_integrations.lightning.handover import Handover
from support import spawning_process
from support.lightning_cases import QUIET, trainer

pytestmark = QUIET

STATE = {"config": "{}", "tensors": bytes(range(256)), "training": {"0": {"location": [1.5, None]}}}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_the_parent_has_the_detector_that_was_fitted(tmp_path: Path, strategy: str) -> None:
    command = [sys.executable, spawning_process.__file__, str(tmp_path), strategy]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=paths, stderr=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["object"]
    assert len(report["told"]) == 1
    assert "`Detector.from_state_dict(callback.state_dict(), adapter)`" in report["told"][0]
    assert report["samples"] == 128
    assert report["scored"] == 8
    first, second = report["fingerprints"]
    assert first == second


class Launched:
    """A Trainer in a process that a strategy has launched, as far as it is looked at."""

    def __init__(self, local_rank: int = 0) -> None:
        self.strategy = trainer(strategy="ddp_fork", devices=2).strategy
        self.strategy._configure_launcher()
        self.local_rank = local_rank


def in_child(handover: Handover, run: Any) -> None:
    child = multiprocessing.get_context("fork").Process(target=handover.give, args=(run, STATE))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_it_is_taken_once_and_goes_with_its_owner() -> None:
    handover = Handover()
    assert handover.take() is None
    in_child(handover, Launched())
    mode = stat.S_IMODE(handover._folder.stat().st_mode)
    assert mode == 0o700
    assert handover.take() == STATE
    assert handover.take() is None
    assert handover.has_taken
    in_child(handover, Launched())  # another fit
    assert handover.take() == STATE
    folder = handover._folder
    del handover
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "run", [trainer(), Launched(local_rank=1)], ids=["not launched", "another process of the node"]
)
def test_others_hand_nothing_over(run: Any) -> None:
    in_child(handover := Handover(), run)
    assert handover.take() is None


def test_who_has_made_it_hands_nothing_over() -> None:
    handover = Handover()
    handover.give(Launched(), STATE)  # type: ignore[arg-type]
    assert handover.take() is None


def test_a_copy_is_handed_over_to_apart() -> None:
    handover = Handover()
    assert copy.deepcopy(handover)._folder != handover._folder
