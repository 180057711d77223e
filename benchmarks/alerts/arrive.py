"""Whether alerts arrive: through kills, beside sinks that misbehave, and out of a damaged log.

Processes are killed at random moments: one that sends to two files and a webhook with a spool, and
the webhook's receiver. Then sinks hang, raise, cancel and exit beside one that works; bits of a log
are flipped; and the time of `send` is measured beside the build of a commit before, in turns.

    python -m benchmarks.alerts.arrive --json benchmarks/results/arrive.json
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.measurement import Row, claim, conclude, machine
from ood_monitor.alerts import Alert, AlertEvidence, Dispatcher
from ood_monitor.alerts.journal import Journal

KILLS, FLIPS, ROUNDS, SENT, ALERTS = 60, 1_000, 300, 5, 1_000
ROOT, BEFORE = Path(__file__).parents[2], "1c741d7"
LONG = 60.0  # seconds
DISKS = {"as it is": 0.0, "slow (0.3 s)": 0.3, "hangs": 8.0}  # seconds of a synchronisation
NOISE = 1.05  # how much slower a build may look
AN_UPDATE = 5  # alerts, more than one update has

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

#: Seconds of each of some sends with three sinks and a spool, for every line that comes.
TIMED = (
    PRELUDE
    + """
import json, time
def named(name):
    def sink(alert):
        pass
    sink.name = name
    return sink
number = 0
with Dispatcher([named("a"), named("b"), named("c")], spool=sys.argv[1]) as dispatcher:
    for line in sys.stdin:
        seconds = []
        for number in range(number + 1, number + 1 + int(line)):
            each = numbered(number)
            start = time.perf_counter()
            dispatcher.send(each)
            seconds.append(time.perf_counter() - start)
            time.sleep(0.002)
        print(json.dumps(seconds), flush=True)
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


def hangs(alert: Alert) -> None:
    threading.Event().wait()


def raising(error: type[BaseException]) -> Callable[[Alert], None]:
    def sink(alert: Alert) -> None:
        raise error

    return sink


MISBEHAVING: dict[str, Callable[[Alert], None]] = {
    "hangs": hangs,
    "raises": raising(OSError),
    "cancels": raising(asyncio.CancelledError),
    "exits": raising(SystemExit),
    "interrupts": raising(KeyboardInterrupt),
}


def beside(kind: str, alerts: int, folder: Path) -> Row:
    """What a sink gets beside one that misbehaves, and how long `send` takes at most."""
    seen: list[int] = []

    def works(alert: Alert) -> None:
        seen.append(alert.samples_seen)

    def other(alert: Alert) -> None:
        MISBEHAVING[kind](alert)

    dispatcher = Dispatcher([other, works], capacity=alerts, spool=folder / kind)
    longest = max(timed(dispatcher, number) for number in range(alerts))
    deadline = time.monotonic() + LONG
    while len(seen) < alerts and time.monotonic() < deadline:
        time.sleep(0.01)
    dispatcher.close(0.5)
    missing = alerts - dispatcher.undelivered_count
    return {
        "kind": kind,
        "others lack": alerts - len(seen) if seen == sorted(seen) else alerts,
        "not accounted for": missing,
        "longest send": round(longest, 4),
    }


def timed(dispatcher: Dispatcher, number: int) -> float:
    alert = replace(ALERT, samples_seen=number, id=f"{number:032x}")
    start = time.perf_counter()
    dispatcher.send(alert)
    return time.perf_counter() - start


def on_disk(kind: str, folder: Path) -> Row:
    """Seconds that alerts of one update take on a disk that is slow, or that does not answer."""
    real = os.fsync
    dispatcher = Dispatcher([raising(OSError)], spool=folder / f"disk {kind}")

    def fsync(fd: Any) -> None:
        time.sleep(DISKS[kind])
        real(fd)

    os.fsync = fsync
    try:
        total = sum(timed(dispatcher, number) for number in range(AN_UPDATE))
    finally:
        os.fsync = real
    dispatcher.close(2 * DISKS["hangs"])
    return {"disk": kind, "alerts": AN_UPDATE, "seconds": round(total, 3)}


def flipped(flips: int, folder: Path) -> Row:
    """Bits of a log that flip: untold ones, and alerts that came back other than written."""
    path, generator = folder / "alerts.jsonl", random.Random(0)
    written = [replace(ALERT, samples_seen=k, id=f"{k:032x}") for k in range(10)]
    journal = Journal(path, 100)
    for alert in written:
        journal.add(alert, ["a", "b"])
    journal.write()
    for alert in written[::3]:
        journal.settle(alert.id, "b")
    journal.write_settled()
    whole, row = path.read_bytes(), {"flips": flips, "untold": 0, "changed": 0, "refused": 0}
    row["most alerts that one flip cost"] = 0
    for _ in range(flips):
        bit = generator.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with told() as words:
            try:
                found = Journal(path, 100)
            except (OSError, ValueError):
                row["refused"] += 1
                continue
        found.close()
        row["untold"] += "could not be read" not in words.getvalue()
        row["changed"] += any(alert not in written for alert in found.owed("a"))
        cost = len(written) - len(found.owed("a"))
        row["most alerts that one flip cost"] = max(row["most alerts that one flip cost"], cost)
    return row


@contextlib.contextmanager
def told() -> Iterator[io.StringIO]:
    """What the log says."""
    words = io.StringIO()
    handler, logger = logging.StreamHandler(words), logging.getLogger("ood_monitor.alerts")
    logger.addHandler(handler)
    try:
        yield words
    finally:
        logger.removeHandler(handler)


def beside_before(rounds: int, folder: Path) -> Row:
    """Seconds of a send with three sinks and a spool, now and by the build before, in turns.

    The build before runs twice: by how much it differs from itself, the disk makes of it.
    """
    before, now = str(checked_out(folder)), str(ROOT / "ood_monitor")
    builds = {"before": before, "now": now, "before, again": before}
    processes = {
        name: started(TIMED, package, as_read_by(name), str(folder / f"spool {name}"))
        for name, package in builds.items()
    }
    found: dict[str, list[float]] = {name: [] for name in builds}
    order, generator = list(builds), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            found[name] += sends(processes[name])
    for process in processes.values():
        process.communicate()
    medians = {name: statistics.median(each) for name, each in found.items()}
    return {
        "commit": BEFORE,
        "sends of each": rounds * SENT,
        "seconds": {name: round(seconds, 6) for name, seconds in medians.items()},
        "ratio": round(medians["now"] / medians["before"], 3),
        "ratio of the build before to itself": round(
            medians["before, again"] / medians["before"], 3
        ),
    }


def as_read_by(build: str) -> str:
    """The alert in the form that a build reads."""
    if build == "now":
        return ALERT.to_json()
    record = json.loads(ALERT.to_json()) | {"format": 3}
    return json.dumps({k: v for k, v in record.items() if k not in ("trace", "number", "explains")})


def sends(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdin is not None
    process.stdin.write(f"{SENT}\n")
    process.stdin.flush()
    found: list[float] = json.loads(said(process))
    return found


def checked_out(folder: Path) -> Path:
    """The package of the build before."""
    command = ["git", "-C", str(ROOT), "archive", BEFORE, "ood_monitor"]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder / "before", filter="data")
    return folder / "before" / "ood_monitor"


def claims_of(report: dict[str, Any]) -> list[Row]:
    kills, flips = report["kills"], report["flips"]
    sinks = list(kills["sinks"].values())
    text = f"through {kills['kills']} kills, of {kills['sent']} alerts to three sinks"
    at_kills = [
        claim(f"{text}: {what}", sum(sink[what] for sink in sinks), 0)
        for what in ("lost", "under another id", "out of order")
    ]
    sends = report.get("sends")
    beside_before = (
        []
        if sends is None
        else [
            claim(
                f"time of a send, median, in times of {BEFORE}",
                sends["ratio"],
                max(NOISE, sends["ratio of the build before to itself"]),
            )
        ]
    )
    lacking = max(max(row["others lack"], row["not accounted for"]) for row in report["rows"])
    return [
        *at_kills,
        claim("alerts that a sink lacks beside one that misbehaves, worst", lacking, 0),
        claim(
            "seconds of a send beside a sink that misbehaves, longest",
            max(row["longest send"] for row in report["rows"]),
            1.0,
        ),
        claim(
            f"seconds of {AN_UPDATE} sends whatever the disk does, worst",
            max(row["seconds"] for row in report["disks"]),
            1.0,
        ),
        claim(
            f"of {flips['flips']} bits that flip: untold, or an alert changed",
            flips["untold"] + flips["changed"],
            0,
        ),
        *beside_before,
    ]


def main(
    quick: Annotated[bool, typer.Option(help="A few of each.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    part = 10 if quick else 1
    logging.getLogger("ood_monitor.alerts").propagate = False
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name)).chmod(0o700)
        report: dict[str, Any] = {"machine": machine(), "kills": killed(KILLS // part, folder)}
        report["rows"] = [beside(kind, ALERTS // part, folder) for kind in MISBEHAVING]
        report["disks"] = [on_disk(kind, folder) for kind in DISKS]
        report["flips"] = flipped(FLIPS // part, folder)
        if not quick:  # the build before is of the repository's history
            report["sends"] = beside_before(ROUNDS, folder)
    report["claims"] = claims_of(report)
    conclude(report, output)
    if output is None:
        typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
