"""Kills of an MLflow server, and of the sender, at random moments: what the run then shows.

The server is `mlflow server` on SQLite, killed with its workers while alerts go to it, and started
again. The sender has a file and an `MLflowSink` for sinks, and a spool.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# For MLflow, which reads them when it is imported. Its client would be patient for minutes.
os.environ |= {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a process more, of no use here
}

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from ood_monitor_integrations.mlflow import MLflowSink

from benchmarks.alerts.kills import ALERT, ROOT, arrived, end
from benchmarks.harness.measurement import Row, claim
from ood_monitor.alerts import Alert, AlertKind, Dispatcher, Status, Summary

__all__ = ["claims_of_served", "served"]

#: What is killed, one after the other, in turns.
TURNS = (("server",), ("server", "sender"), ("sender", "server"))
OUTAGE, MOMENT, PAUSE, LONG = 3.0, 3.0, 2.0, 180.0  # seconds

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
KINDS: tuple[tuple[AlertKind, Status], ...] = (
    ("sample", "WARN"),
    ("drift", "ALERT"),
    ("recovered", "OK"),
)


def alert_of(place: int) -> Alert:
    """The alert of a place in the stream, the same in every process."""
    kind, status = KINDS[place % len(KINDS)]
    return replace(
        ALERT,
        kind=kind,
        status=status,
        samples_seen=place,
        number=2 * place + 1,
        time=FIRST + timedelta(minutes=place),
        id=f"{place:032x}",
    )


def summary_of(place: int) -> Summary:
    """The figures that follow it; the mean score is the place."""
    alert = alert_of(place)
    return Summary(
        stream=alert.stream,
        samples_seen=place,
        status=alert.status,
        score_mean=float(place),
        score_p95=None,
        flagged_rate=None,
        log_e_value=None,
        number=alert.number + 1,
        time=alert.time,
    )


class Told:
    """A sink whose deliveries are written down."""

    def __init__(self, sink: MLflowSink, path: Path) -> None:
        self.name, self.summarise = sink.name, sink.summarise
        self._sink, self._write = sink, to_file(path)

    def __call__(self, alert: Alert) -> None:
        self._sink(alert)
        self._write(alert)


def to_file(path: Path) -> Callable[[Alert], None]:
    def file(alert: Alert) -> None:
        with path.open("a") as lines:
            print(alert.samples_seen, alert.id, file=lines, flush=True)

    return file


def send(folder: Path, url: str, run_id: str) -> None:
    """Send on from the last that was said to be sent, until killed or told to end."""
    sinks = [to_file(folder / "file"), Told(MLflowSink(run_id, tracking_uri=url), folder / "run")]
    places, ending = folder / "sent", threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ending.set()), daemon=True).start()
    place = int(places.read_text().split()[-1]) + 1 if places.exists() else 0
    with Dispatcher(sinks, spool=folder / "spool") as dispatcher:
        while not ending.is_set():
            dispatcher.send(alert_of(place))
            with places.open("a") as file:
                print(place, file=file, flush=True)
            dispatcher.summarise(summary_of(place))
            place += 1
            ending.wait(PAUSE)
        dispatcher.flush(LONG)
        dispatcher.summarise(summary_of(place - 1))  # one that was lost is not said again
        dispatcher.flush(LONG)
    print(dispatcher.undelivered_count, flush=True)


class Scene:
    """A sender and an MLflow server, which are killed and begun again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._server = self._serving()
        self._until(self._answers)
        self.run_id = MlflowClient(self.url).create_run("0").info.run_id
        self._sender = self._sending()

    def kill(self, what: Sequence[str], outage: float) -> None:
        """Kill, pausing after each, begin again, and wait until alerts come through."""
        for one in what:
            if one == "server":
                self._kill_server()
            else:
                end(self._sender)
            time.sleep(outage)
        if "sender" in what:
            self._sender = self._sending()
        self._server = self._serving()
        self.wait()

    def wait(self) -> None:
        """Until the run has an alert more."""
        before = self._delivered()
        self._until(lambda: self._delivered() > before)

    def end(self) -> int:
        """End the sender in order; alerts that were not delivered."""
        left, _ = self._sender.communicate("end\n", timeout=3 * LONG)
        return int(left)

    def close(self) -> None:
        """Kill what still runs."""
        self._sender.kill()
        self._kill_server()

    def _delivered(self) -> int:
        path = self._folder / "run"
        return path.read_text().count("\n") if path.exists() else 0

    def _kill_server(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _serving(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its workers die with it
            )

    def _sending(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.alerts.served"]
        command += [str(self._folder), self.url, self.run_id]
        pipe = subprocess.PIPE
        with (self._folder / "sender.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log, text=True
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not holds():
            if time.monotonic() > deadline:
                logs = [self._folder / f"{name}.log" for name in ("server", "sender")]
                raise TimeoutError("\n".join(log.read_text()[-2000:] for log in logs))
            time.sleep(0.1)


def served(kills: int, folder: Path) -> Row:
    """Through kills of server and sender: what the sinks took, and what the run shows."""
    folder.mkdir(mode=0o700)
    generator, scene = random.Random(0), Scene(folder)
    turns = [TURNS[kill % len(TURNS)] for kill in range(kills)]
    try:
        scene.wait()
        for what in turns:
            time.sleep(generator.uniform(0.0, MOMENT))
            scene.kill(what, generator.uniform(0.0, OUTAGE))
        left = scene.end()
        sent = [int(line) for line in (folder / "sent").read_text().split()]
        shown = on_run(MlflowClient(scene.url), scene.run_id, sent, folder)
    finally:
        scene.close()
    return {
        "kills of the server": len(turns),
        "kills of the sender": sum("sender" in what for what in turns),
        "sent": len(set(sent)),
        "left": left,
        "sinks": {name: arrived(folder / name, set(sent)) for name in ("file", "run")},
        "on the run": shown,
    }


def claims_of_served(row: Row) -> list[Row]:
    text = (
        f"through {row['kills of the server']} kills of an MLflow server and "
        f"{row['kills of the sender']} of the sender, of {row['sent']} alerts"
    )
    kinds, shown = ("lost", "under another id", "out of order"), row["on the run"]
    taken = sum(sink[kind] for sink in row["sinks"].values() for kind in kinds)
    wrong = shown["not of the latest"] + shown["figures wrong or twice"]
    return [
        claim(f"{text}: lost, under another id or out of order", taken, 0),
        claim(f"{text}: lacking or changed on the run", shown["lost"] + shown["changed"], 0),
        claim(f"{text}: shown of another than the latest, wrong or twice", wrong, 0),
    ]


def on_run(client: MlflowClient, run_id: str, sent: list[int], folder: Path) -> Row:
    """What a run lacks or shows wrong of the alerts that were sent, in counts."""
    place = client.download_artifacts(run_id, "ood/alerts", str(folder))
    texts = {path.stem: path.read_text() for path in Path(place).glob("*.json")}
    pictures = {path.stem for path in Path(place).glob("*.png")}
    expected = {alert_of(number).id: alert_of(number) for number in sent}
    figures = client.get_metric_history(run_id, "ood/score_mean")
    steps = [metric.step for metric in figures]
    return {
        "lost": len(expected.keys() - (texts.keys() & pictures)),
        "changed": sum(not is_same(text, expected.get(name)) for name, text in texts.items()),
        "not of the latest": len(not_latest(client, run_id, max(sent))),
        "figures wrong or twice": len(steps)
        - len(set(steps))
        + sum(metric.value != metric.step for metric in figures),
    }


def is_same(text: str, alert: Alert | None) -> bool:
    """Whether an artifact is the alert that was sent."""
    try:
        return Alert.from_json(text) == alert
    except ValueError:
        return False


def not_latest(client: MlflowClient, run_id: str, last: int) -> list[str]:
    """What the run does not show as the last that was said has it."""
    data, alert = client.get_run(run_id).data, alert_of(last)
    shown: dict[str, tuple[Any, Any]] = {
        "status": (data.tags.get("ood_monitor.status"), alert.status),
        "number": (data.tags.get("ood_monitor.number"), str(summary_of(last).number)),
        "number of the note": (data.tags.get("ood_monitor.alert_number"), str(alert.number)),
        "note": (f"{alert.id}.json" in data.tags.get(MLFLOW_RUN_NOTE, ""), True),
        "mean score": (data.metrics.get("ood/score_mean"), float(last)),
    }
    return [name for name, (found, expected) in shown.items() if found != expected]


if __name__ == "__main__":
    send(Path(sys.argv[1]), *sys.argv[2:])
