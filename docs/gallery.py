"""Pictures of the gallery: the report, the page of streams, an alert's figure, and MLflow.

    python docs/gallery.py docs

It watches the streams of `screenshots.py`, serves a real MLflow store, and takes pictures with
headless Chromium, which has to be on the PATH. Each picture gets a palette, to be small.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["LOGNAME"] = "ada"  # whom MLflow names as the run's author

import mlflow
from ood_monitor_integrations.mlflow import MLflowSink
from PIL import Image
from screenshots import ERT, FPR, flow, images, make, streams, taken

import ood_monitor as om

#: By picture of MLflow: its address below the run.
MLFLOW = {"gallery-mlflow-run.png": "", "gallery-mlflow-alert.png": "/artifacts/{figure}"}
#: Of the browser, and where MLflow's assistant begins, which has nothing to do with the run.
WIDTH, HEIGHT, OWN_WIDTH = 1400, 960, 1036
COLOURS, MOST_BYTES = 128, 150_000


def main() -> None:
    """Takes all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder.resolve()
    with tempfile.TemporaryDirectory() as made:
        page, _, drift, _ = make(Path(made))
        taken(page, folder / "gallery-page.png", 1000, 700, dark=False)
        taken(drift, folder / "gallery-report.png", 1000, 2400, dark=False)
        _of_mlflow(Path(made), folder)
    for picture in sorted(folder.glob("gallery-*.png")):
        small(picture)


def _of_mlflow(store: Path, folder: Path) -> None:
    with served(store) as address:
        mlflow.set_tracking_uri(address)
        experiment, run, drift = _watched()
        for name, below in MLFLOW.items():
            place = f"{address}/#/experiments/{experiment}/runs/{run}"
            url = place + below.format(figure=f"ood/alerts/{drift}.png")
            taken(url, folder / name, WIDTH, HEIGHT, dark=False)
            with Image.open(folder / name) as image:
                image.crop((0, 0, OWN_WIDTH, HEIGHT)).save(folder / name)


def _watched() -> tuple[str, str, str]:
    """Ids of an experiment, of its run, and of the drift alert in it."""
    mlflow.set_experiment("images in production")
    detector = om.Detector(flow()).fit(images(600, 0).split(100), progress=False)
    with mlflow.start_run(run_name="camera 7") as run:
        sink = MLflowSink()
    said = []
    with om.Monitor(detector, fpr=FPR, ert=ERT, sinks=[sink], name="camera 7") as monitor:
        for batch in streams()["drift"].split(20):
            said += monitor.update(batch)
            monitor.summarise()
        monitor.flush(60)
    (drift,) = (alert.id for alert in said if alert.kind == "drift")
    return run.info.experiment_id, run.info.run_id, drift


@contextmanager
def served(store: Path) -> Iterator[str]:
    """MLflow's own page on the store, for as long as the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db"]
    command += ["--default-artifact-root", "mlflow-artifacts:/"]
    command += ["--artifacts-destination", str(store / "artifacts")]
    server = subprocess.Popen(command, cwd=store, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(url: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"Expected MLflow to answer at {url} within {seconds:g} s, got nothing.")


def small(picture: Path) -> None:
    """Store a picture with a palette.

    Raises:
        ValueError: It is still too large for a page.
    """
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS).save(picture, optimize=True)
    if (size := picture.stat().st_size) > MOST_BYTES:
        raise ValueError(f"Expected {picture} of at most {MOST_BYTES:,} bytes, got {size:,}.")


if __name__ == "__main__":
    main()
