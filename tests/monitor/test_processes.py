"""Monitors in other processes: forked ones go on and deliver, spawned ones are told."""

import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch

import ood_monitor as om

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")

#: A monitor of a stream that has left its data, in a process without other threads.
PRELUDE = """
import multiprocessing, os, sys, threading, time
import torch
import ood_monitor as om
torch.set_num_threads(1)
torch.manual_seed(0)
fork = multiprocessing.get_context("fork")
flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
held_out = torch.rand(400, 1, 4, 4).split(50)
detector = om.Detector(om.LogLikelihood(flow)).fit(held_out, progress=False)
class Slow:
    def __call__(self, alert):
        time.sleep(0.2)
        os.write(1, f"{alert.kind}\\n".encode())
monitor = om.Monitor(detector, ert=1000, sinks=[Slow()])
foreign = torch.rand(60, 1, 4, 4) / 2
"""


def output(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_worker_delivers_what_it_has_raised() -> None:
    script = """
process = fork.Process(target=monitor.update, args=(foreign,))
process.start()
process.join()
def work():
    om.Monitor(detector, ert=1000, sinks=[Slow()]).update(foreign)
process = fork.Process(target=work)
process.start()
process.join()
"""
    assert output(script) == ["drift", "drift"]


@pytest.mark.slow
def test_a_data_loaders_workers_deliver_when_the_loader_ends() -> None:
    script = """
class Watched(torch.utils.data.Dataset):
    def __len__(self):
        return 60
    def __getitem__(self, index):
        if index in (29, 59):  # the last of each worker
            monitor.update(foreign)
        return foreign[index]
options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
loader = torch.utils.data.DataLoader(Watched(), batch_size=30, **options)
assert sum(len(batch) for batch in loader) == 60
del loader
"""
    assert output(script) == ["drift", "drift"]


@pytest.mark.slow
def test_a_fork_while_another_thread_scores_leaves_the_child_whole() -> None:
    script = """
stop = False
def score():
    while not stop:
        monitor.update(foreign)
thread = threading.Thread(target=score, daemon=True)
thread.start()
for _ in range(20):
    time.sleep(0.01)
    process = fork.Process(target=monitor.update, args=(foreign,))
    process.start()
    process.join(30)
    print("ended", process.exitcode, flush=True)
    process.kill()
os._exit(0)
"""
    said = output(script)
    assert [word for word in said if word in ("ended", "0")] == ["ended", "0"] * 20


def fitted() -> om.Detector:
    flow = om.models.Glow(channels=1, size=4, levels=2, steps=1, hidden=4)
    held_out = torch.rand(400, 1, 4, 4).split(50)
    return om.Detector(om.LogLikelihood(flow)).fit(held_out, progress=False)


def test_a_monitor_says_why_no_spawned_process_can_have_it() -> None:
    text = "Expected the monitor 'stream' to stay in its process, got it to pickle: save the det"
    with om.Monitor(fitted()) as monitor:
        with pytest.raises(TypeError, match=text):
            pickle.dumps(monitor)
        process = multiprocessing.get_context("spawn").Process(target=print, args=(monitor,))
        with pytest.raises(TypeError, match=text):
            process.start()
