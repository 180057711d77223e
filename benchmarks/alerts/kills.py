"""Kills of a sender and of an HTTP receiver at random moments: what each sink has of what was sent.

The sender has two files and a webhook for sinks, and a spool.
"""

import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.harness.measurement import Row
from ood_monitor.alerts import Alert, AlertEvidence

__all__ = ["ALERT", "LONG", "PRELUDE", "ROOT", "arrived", "end", "killed", "said", "started"]

ROOT = Path(__file__).parents[2]
LONG = 60.0  # seconds

EVIDENCE = AlertEvidence(
    log_e_value=9.5,
    ert=10_000.0,
    fpr=0.01,
    flagged=20,
    window=30,
    flagged_rate=2 / 3,
    flagged_rate_low=0.47,
    flagged_rate_high=0.83,
    score_mean=3.25,
    score_p95=9.75,
)
ALERT = Alert(
    kind="drift",
    severity="critical",
    stream="production",
    samples_seen=1,
    message="Two of three samples are unlike the training data.",
    evidence=EVIDENCE,
    detector="d5",
    model="m7",
)

#: The modules of a checkout without the package, whose torch takes seconds to import.
PRELUDE = """
import sys, types
package = types.ModuleType("ood_monitor")
package.__path__ = [sys.argv.pop(1)]
sys.modules["ood_monitor"] = package
from dataclasses import replace
from ood_monitor.alerts import Alert, Dispatcher, WebhookSink
def numbered(number):
    return replace(alert, samples_seen=number, id=f"{number:032x}")
alert = Alert.from_json(sys.argv.pop(1))
"""

RECEIVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(sys.argv[1], "a") as file:
            print(body["data"]["samples_seen"], self.headers["webhook-id"], file=file, flush=True)
        self.send_response(204)
        self.end_headers()
    def log_message(self, *args):
        pass
class Server(ThreadingHTTPServer):
    allow_reuse_address = True
server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

#: Sends on from the last that it said was sent, until it is killed or told to end.
SENDER = (
    PRELUDE
    + """
import pathlib, threading, time
folder, port = pathlib.Path(sys.argv[1]), sys.argv[2]
def to_file(name, seconds):
    def sink(alert):
        time.sleep(seconds)
        with (folder / name).open("a") as file:
            print(alert.samples_seen, alert.id, file=file, flush=True)
    sink.name = name
    return sink
webhook = WebhookSink(f"http://127.0.0.1:{port}/")
sinks = [to_file("quick", 0), to_file("slow", 0.003), webhook]
sent = (folder / "sent").read_text().split() if (folder / "sent").exists() else []
number = int(sent[-1]) + 1 if sent else 0
dispatcher = Dispatcher(sinks, spool=folder / "spool")
ending = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ending.set()), daemon=True).start()
print("ready", flush=True)
while not ending.is_set():
    dispatcher.send(numbered(number))
    with (folder / "sent").open("a") as file:
        print(number, file=file, flush=True)
    number += 1
    time.sleep(0.02)
dispatcher.flush(60)
dispatcher.close(10)
print(dispatcher.undelivered_count, flush=True)
"""
)


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


class Scene:
    """A sender and its receiver, which are killed and begun again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.receiver = self._receiver(0)
        self._port = int(said(self.receiver))
        self.sender = self._sender()
        said(self.sender)

    def kill_sender(self) -> None:
        end(self.sender)
        self.sender = self._sender()
        said(self.sender)

    def kill_receiver(self, seconds: float) -> None:
        end(self.receiver)
        time.sleep(seconds)
        self.receiver = self._receiver(self._port)
        said(self.receiver)

    def close(self) -> int:
        """End in order; alerts that were not delivered."""
        left, _ = self.sender.communicate("end\n", timeout=2 * LONG)
        end(self.receiver)
        return int(left)

    def _receiver(self, port: int) -> subprocess.Popen[str]:
        return started(RECEIVER, str(self._folder / "webhook"), str(port))

    def _sender(self) -> subprocess.Popen[str]:
        package = str(ROOT / "ood_monitor")
        return started(SENDER, package, ALERT.to_json(), str(self._folder), str(self._port))


def killed(kills: int, folder: Path) -> Row:
    """Through kills of either at random moments: what each sink has of what was sent."""
    generator, scene = random.Random(0), Scene(folder)
    for kill in range(kills):
        time.sleep(generator.uniform(0.0, 0.6))
        if kill % 2:
            scene.kill_receiver(generator.uniform(0.0, 0.4))
        else:
            scene.kill_sender()
    time.sleep(0.5)
    left = scene.close()
    sent = {int(line) for line in (folder / "sent").read_text().split()}
    rows = {name: arrived(folder / name, sent) for name in ("quick", "slow", "webhook")}
    return {"kills": kills, "sent": len(sent), "left": left, "sinks": rows}


def arrived(path: Path, sent: set[int]) -> Row:
    """Of what a sink took: what it lacks, has twice, has under another id or out of order."""
    pairs = [line.split() for line in path.read_text().splitlines()]
    taken = [int(number) for number, _ in pairs]
    first = list(dict.fromkeys(taken))
    return {
        "lost": len(sent - set(taken)),
        "twice": len(taken) - len(first),
        "under another id": sum(name != f"{int(number):032x}" for number, name in pairs),
        "out of order": sum(b < a for a, b in pairwise(first)),
    }
