"""Which weights a module has, without a wait: in a thread, in a forked child, at exit."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from ood_monitor.saving import digest, states
from ood_monitor.saving.states import KnownWeights


def model() -> nn.Linear:
    return nn.Linear(100, 100)


def written_unseen(module: nn.Linear, by: float = 1.0) -> None:
    """Write to an element that no look sees."""
    with torch.no_grad():
        module.weight.flatten()[1] += by


def test_other_elements_tell_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    known, before = KnownWeights.of(module), digest(module)
    assert known.differ(known.state(module), before) is None
    assert known.digest(module) == before
    assert known.differ(known.state(module), before) is False
    monkeypatch.setattr(states, "digest_of_tensors", pytest.fail)
    with torch.no_grad():
        module.weight.mul_(2)
    assert known.differ(known.state(module), before) is True


def test_what_is_written_past_autograd_is_seen() -> None:
    module = model()
    known, before = KnownWeights.of(module), KnownWeights.of(module).digest(module)
    module.weight.data += 1
    assert known.differ(known.state(module), before) is True


def test_unseen_writes_are_read_in_a_thread_that_ends() -> None:
    module = model()
    known, before, said = KnownWeights.of(module), digest(module), list[str]()
    known.digest(module)
    written_unseen(module)
    state = known.state(module)
    assert known.differ(state, before) is None
    known.read_later(module, lambda: said.append(threading.current_thread().name))
    assert known.flush(30)
    assert said == ["ood-monitor-weights"]
    assert known.differ(state, before) is True
    assert not any(thread.name == said[0] for thread in threading.enumerate())


def test_weights_that_are_written_while_they_are_read_are_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, read, times = model(), states.digest_of_tensors, list[int]()
    known, before = KnownWeights.of(module), digest(module)
    known.digest(module)
    written_unseen(module)
    torn = known.state(module)

    def reading(named: object) -> str:
        found = read(named)  # type: ignore[arg-type]
        if not times:
            written_unseen(module)
        times.append(1)
        return found

    monkeypatch.setattr(states, "digest_of_tensors", reading)
    known.read_later(module, lambda: None)
    assert known.flush(30)
    assert len(times) == 2
    assert known.differ(torn, before) is None
    assert known.differ(known.state(module), digest(module)) is False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module, go, read = model(), threading.Event(), states.digest_of_tensors
    known = KnownWeights.of(module)

    def waiting(named: object) -> str:
        assert go.wait(30)
        return read(named)  # type: ignore[arg-type]

    monkeypatch.setattr(states, "digest_of_tensors", waiting)
    known.read_later(module, lambda: None)
    child = os.fork()
    if child == 0:
        go.set()
        said = list[int]()
        known.read_later(module, lambda: said.append(1))
        os._exit(0 if known.flush(30) and said == [1] else 1)
    _, status = os.waitpid(child, 0)
    go.set()
    assert known.flush(30)
    assert os.waitstatus_to_exitcode(status) == 0


ENDING = """
import torch
from ood_monitor.saving.states import KnownWeights
module = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(100)))
KnownWeights.of(module).read_later(module, lambda: print("read"))
"""


def test_nothing_is_left_running_at_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
