"""The queue of scoring in the background, in a process that forks."""

import os
import threading

import pytest
from ood_monitor_integrations.diffusers.budget import Worker
from support.forks import child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_forked_child_has_a_queue_of_its_own() -> None:
    worker, entered, leave, done = Worker(2), threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        entered.set()
        leave.wait()

    def in_child() -> bool:
        accepted = worker.submit(lambda: done.append("child's"))
        return accepted and worker.flush(5) and done == ["child's"]

    assert worker.submit(first)
    entered.wait()
    assert worker.submit(lambda: done.append("parent's"))
    found = child(in_child)
    leave.set()
    assert found
    assert worker.flush(30)
    assert done == ["parent's"]
    assert worker.close(1) == 0
