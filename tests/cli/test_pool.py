"""Several watches of one detector, and what they see together."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.cli.state import StateFile

ERT = 1000.0


def images(n: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def detector(seed: int = 0) -> om.Detector:
    flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
    held_out = images(400, seed).split(50)
    return om.Detector(om.LogLikelihood(flow)).fit(held_out, progress=False)


def written(path: Path, *batches: Tensor, of: om.Detector | None = None, ert: float = ERT) -> Path:
    """The state of a watch that has seen these."""
    watch = om.Monitor(of or detector(), ert=ert)
    for batch in batches:
        watch.update(batch)
    watch.close()
    with StateFile.locked(path) as state:
        state.write({"monitor": watch.state_dict(), "files": {}})
    return path


def pooled(*states: Path) -> Result:
    return CliRunner().invoke(app, ["pool", *map(str, states), "--json"])


def facts(*states: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pooled(*states).stdout)
    return found


def test_what_none_sees_alone_all_see_together(tmp_path: Path) -> None:
    """As many samples of a change as leave each below its alarm."""
    replicas = []
    for seed in range(6):
        for n in range(1, 200):
            watch = om.Monitor(detector(), ert=1e9)
            watch.update(images(n, 10 + seed, 0.8))
            if watch.log_e_value >= math.log(ERT) - 1:
                break
        replicas.append(written(tmp_path / f"{seed}.json", images(n - 1, 10 + seed, 0.8)))
    alone = [facts(path) for path in replicas]
    assert all(each["log_e_value"] < math.log(ERT) for each in alone)
    together = facts(*replicas)
    mean = sum(math.exp(each["log_e_value"]) for each in alone) / 6
    assert together["log_e_value"] == pytest.approx(math.log(mean))
    assert together["samples_seen"] == sum(each["samples_seen"] for each in alone)


def test_the_verdict_is_the_exit_code(tmp_path: Path) -> None:
    quiet = [written(tmp_path / f"quiet-{i}.json", images(1, 3)) for i in range(2)]
    drifted = [written(tmp_path / f"drift-{i}.json", images(200, 4 + i, 0.5)) for i in range(2)]
    for states, status, code in [
        (quiet, "OK", 0),
        ([quiet[0], drifted[0]], "WARN", 3),
        (drifted, "ALERT", 4),
    ]:
        result = pooled(*states)
        assert result.exit_code == code, result.output
        found = json.loads(result.stdout)
        assert found["status"] == status
        assert [Path(each["state"]) for each in found["replicas"]] == states
    text = CliRunner().invoke(app, ["pool", *map(str, drifted)]).stdout
    assert "ALERT" in text
    assert "drift-1.json" in text


@pytest.mark.parametrize("what", ["ert", "calibration", "twice", "nothing", "damaged"])
def test_what_cannot_be_pooled_is_refused(what: str, tmp_path: Path) -> None:
    one = written(tmp_path / "1.json", images(5, 1))
    other, told = tmp_path / "2.json", "Expected states of one detector and one ert"
    if what == "ert":
        written(other, images(5, 2), ert=2 * ERT)
    elif what == "calibration":
        written(other, images(5, 2), of=detector(1))
    elif what == "twice":
        other, told = one, "Expected each state once"
    elif what == "nothing":
        told = "No such file"
    else:
        other.write_bytes(one.read_bytes().replace(b'"quiet": ', b'"quiet":  '))
        told = "Expected the state of a watch in"
    result = pooled(one, other)
    assert result.exit_code == 1
    assert told in result.stderr
