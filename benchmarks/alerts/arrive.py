"""Whether alerts arrive: through kills, beside sinks that misbehave, and out of a damaged log.

Processes are killed at random moments: one that sends to two files and a webhook with a spool, and
the webhook's receiver; one that sends to an MLflow run, and the server. Then sinks hang, raise,
cancel and exit beside one that works; bits of a log are flipped; and the time of `send` is measured
beside the build of a commit before, in turns.

    python -m benchmarks.alerts.arrive --json benchmarks/results/arrive.json
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import statistics
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.alerts.kills import ALERT, LONG, PRELUDE, ROOT, killed, said, started
from benchmarks.alerts.served import claims_of_served, served
from benchmarks.harness.measurement import Row, claim, conclude, machine
from ood_monitor.alerts import Alert, Dispatcher
from ood_monitor.alerts.journal import Journal

KILLS, FLIPS, ROUNDS, SENT, ALERTS = 60, 1_000, 300, 5, 1_000
SERVED_KILLS = 12  # of the server, two thirds of them with the sender
BEFORE = "1c741d7"
DISKS = {"as it is": 0.0, "slow (0.3 s)": 0.3, "hangs": 8.0}  # seconds of a synchronisation
NOISE = 1.05  # how much slower a build may look
AN_UPDATE = 5  # alerts, more than one update has

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
        *claims_of_served(report["served"]),
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
    part = 20 if quick else 1
    logging.getLogger("ood_monitor.alerts").propagate = False
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name)).chmod(0o700)
        report: dict[str, Any] = {"machine": machine(), "kills": killed(KILLS // part, folder)}
        report["served"] = served(-(-SERVED_KILLS // part), folder / "served")
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
