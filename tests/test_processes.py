"""Forks: a child finds locks free, and what they guard whole."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.alert_cases import ALERT, run
from support.forks import child

from ood_monitor import processes
from ood_monitor.processes import Lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")


def is_free(lock: Lock) -> bool:
    """Whether another thread can have it."""

    def take() -> bool:
        taken = lock.take(0.0)
        if taken:
            lock.__exit__()
        return taken

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


def test_a_fork_finds_what_a_lock_guards_whole() -> None:
    lock, pair, stop = Lock(), [0, 0], threading.Event()

    def change() -> None:
        while not stop.is_set():
            with lock:
                pair[0] += 1
                for _ in range(2000):
                    pass
                pair[1] += 1

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(change)
        whole = [child(lambda: is_free(lock) and pair[0] == pair[1]) for _ in range(20)]
        stop.set()
        done.result()
    assert whole == [True] * 20
    assert is_free(lock)


def test_a_lock_that_is_held_for_long_is_free_in_the_child_which_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", 0.05)
    lock, entered, leave = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            entered.set()
            leave.wait()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(hold)
        entered.wait()
        told = "may be incomplete"
        found = child(lambda: is_free(lock) and told in caplog.text), not is_free(lock)
        leave.set()
        done.result()
    assert found == (True, True)
    assert is_free(lock)
    assert caplog.text == ""


def test_a_lock_of_the_forking_thread_stays_its_own_in_both() -> None:
    lock = Lock()

    def in_child() -> bool:
        held = not is_free(lock)
        lock.__exit__()
        return held and is_free(lock)

    with lock:
        assert child(in_child)
        assert not is_free(lock)
    assert is_free(lock)


FORKING = f"""
sys.path.append({str(Path(__file__).parent)!r})
from concurrent.futures import ThreadPoolExecutor
from ood_monitor.processes import Lock
from support.forks import child
lock = Lock()
with ThreadPoolExecutor(4) as pool:
    made = [pool.submit(child, lambda: True) for _ in range(20)]
    assert all(future.result() for future in made)
assert lock.take(1)
"""


def test_threads_may_fork_together() -> None:
    # In a process of its own: where a test has used process groups, PyTorch ends them in a child
    # that another thread has forked, and waits for ever.
    ended = run(FORKING)
    assert ended.returncode == 0, ended.stderr


SENDER = """
import multiprocessing, os, sys, time
from dataclasses import replace
from ood_monitor.alerts import Alert, Dispatcher
first = Alert.from_json(sys.argv[1])
parent = os.getpid()
class Sink:
    seconds = 0.1
    def __call__(self, alert):
        time.sleep(self.seconds)
        self.say(alert.samples_seen)
    def close(self):
        self.say("closed")
    def say(self, what):
        os.write(1, f"{'parent' if os.getpid() == parent else 'child'} {what}\\n".encode())
def send(*numbers):
    for number in numbers:
        dispatcher.send(replace(first, samples_seen=number))
"""

#: How a child begins and ends, and what is left to do in its parent.
FORKS = {
    "made in a worker": """
def work():
    global dispatcher
    dispatcher = Dispatcher([Sink()])
    send(1, 2)
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
sys.exit(process.exitcode)
""",
    "made before a worker": """
dispatcher = Dispatcher([Sink()])
process = multiprocessing.get_context("fork").Process(target=send, args=(1, 2))
process.start()
process.join()
sys.exit(process.exitcode)
""",
    "a worker that fails": """
def work():
    send(1, 2)
    raise ZeroDivisionError
dispatcher = Dispatcher([Sink()])
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
sys.exit(process.exitcode != 1)
""",
    "a pool": """
dispatcher = Dispatcher([Sink()])
pool = multiprocessing.get_context("fork").Pool(1)
pool.starmap(send, [(1, 2)])
pool.close()
pool.join()
""",
    "a plain fork": """
dispatcher = Dispatcher([Sink()])
child = os.fork()
if child == 0:
    send(1, 2)
else:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
}


@pytest.mark.parametrize("how", FORKS)
def test_a_child_delivers_before_it_ends(how: str) -> None:
    ended = run(SENDER + FORKS[how], ALERT.to_json())
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line for line in lines if line != "parent closed"] == [
        "child 1",
        "child 2",
        "child closed",
    ]


def test_what_waits_when_a_process_forks_is_its_own() -> None:
    script = """
dispatcher = Dispatcher([Sink()])
send(1, 2)
process = multiprocessing.get_context("fork").Process(target=send, args=(3,))
process.start()
process.join()
"""
    ended = run(SENDER + script, ALERT.to_json())
    assert ended.stderr == ""
    expected = ["child 3", "child closed", "parent 1", "parent 2", "parent closed"]
    assert sorted(ended.stdout.splitlines()) == expected


def test_a_child_without_alerts_leaves_its_parents_sinks_alone() -> None:
    script = """
dispatcher = Dispatcher([Sink()])
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
process.start()
process.join()
"""
    ended = run(SENDER + script, ALERT.to_json())
    assert (ended.stdout, ended.stderr) == ("parent closed\n", "")


def test_a_child_of_a_closed_dispatcher_has_a_closed_one() -> None:
    script = """
dispatcher = Dispatcher([Sink()])
dispatcher.close()
process = multiprocessing.get_context("fork").Process(target=send, args=(1,))
process.start()
process.join()
"""
    ended = run(SENDER + script, ALERT.to_json())
    assert ended.stdout == "parent closed\n"
    assert "it was sent after the dispatcher was closed" in ended.stderr


def test_a_worker_tells_of_what_it_could_not_deliver() -> None:
    script = """
Sink.seconds = 60
dispatcher = Dispatcher([Sink()])
process = multiprocessing.get_context("fork").Process(target=send, args=(1, 2))
process.start()
process.join()
"""
    ended = run(SENDER + script, ALERT.to_json())
    assert ended.stdout == "parent closed\n"
    assert "Alerts not delivered: 2" in ended.stderr


def test_a_fork_while_alerts_are_sent_leaves_no_lock_held() -> None:
    script = """
import threading
Sink.seconds = 0
Sink.say = lambda self, what: None
dispatcher = Dispatcher([Sink()])
def loop():
    while True:
        send(1)
threading.Thread(target=loop, daemon=True).start()
def work():
    send(2)
    sys.exit(0 if dispatcher.flush(20) else 3)
for _ in range(20):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    print(process.exitcode)
    process.kill()
os._exit(0)
"""
    ended = run(SENDER + script, ALERT.to_json())
    assert ended.stdout.split() == ["0"] * 20, ended.stderr
