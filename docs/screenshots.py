"""Pictures of what people see: reports and the page of `watch`, light and dark, also on a phone.

    python docs/screenshots.py pictures

It makes three streams (one odd sample, a drift, a model with other weights), watches each, makes a
report of each, and takes pictures with headless Chromium, which has to be on the PATH (Debian:
`apt-get install chromium`).
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import ood_monitor as om
from ood_monitor.alerts import Alert, PageSink
from ood_monitor.report import Exhibit, Gallery, HeldOut, Stream, drift_of, html_report

#: Width and height of a picture, in pixels, and whether it is dark.
LOOKS = {
    "light": (1000, 1300, False),
    "dark": (1000, 1300, True),
    "phone-light": (500, 1600, False),
    "phone-dark": (500, 1600, True),
}
FPR, ERT, SHOWN = 0.01, 10_000, 8


def images(count: int, seed: int) -> Tensor:
    """Smooth blobs, (N, 1, 16, 16) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    centre = 4 + 8 * torch.rand(count, 2, 1, 1, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    width = 6 + 10 * torch.rand(count, 1, 1, generator=generator)
    blob = torch.exp(-((grid - centre) ** 2).sum(1) / width)
    noise = 0.05 * torch.randn(count, 16, 16, generator=generator)
    return (0.1 + 0.8 * blob + noise).clamp(0, 1)[:, None]


def flow(*, trained_further: bool = False) -> om.Adapter:
    """An untrained Glow: the pictures show the form, not how well a model detects."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = om.models.Glow(channels=1, size=16, levels=2, steps=2, hidden=8)
    with torch.no_grad():
        for parameter in model.parameters() if trained_further else ():
            parameter.add_(0.01)
    return om.LogLikelihood(model)


def streams() -> dict[str, Tensor]:
    """One odd sample, a drift from sample 151 on, and nothing but the usual."""
    odd, drift = images(60, 1), images(260, 2)
    odd[40, :, 4:8, 4:8] = 1 - odd[40, :, 4:8, 4:8]
    drift[150:] = (drift[150:] * 0.85 + 0.05).clamp(0, 1)
    return {"one sample": odd, "drift": drift, "stale detector": images(60, 3)}


def report(
    detector: om.Detector, name: str, stream: Tensor, held_out: Tensor, said: Sequence[Alert]
) -> str:
    """As `ood-monitor report --images --alerts` makes it."""
    scores, usual = detector.score(stream), detector.score(held_out)
    ids = [f"{i:04}.png" for i in range(len(stream))]
    shown = Stream(name, ids, scores.score.numpy(), scores.p_value.numpy(), [None] * len(ids))
    drift = drift_of(detector.fitted, shown, ert=ERT, fpr=FPR)
    since = 1 if drift is None else drift.since
    came = torch.arange(since - 1, len(ids))
    worst = came[(-scores.score[came]).argsort()][:SHOWN]
    middle = (usual.p_value - 0.5).abs().argsort()[:SHOWN]
    gallery = Gallery(
        exhibits(detector, stream, scores, worst, "{:04}.png"),
        exhibits(detector, held_out, usual, middle, "held-out {}"),
        since,
    )
    return html_report(
        detector.fitted,
        stream=shown,
        held_out=HeldOut.of(usual),
        gallery=gallery,
        alerts=said,
        is_stale=detector.is_stale,
        fpr=FPR,
        title=f"Report: {name}",
    )


def exhibits(
    detector: om.Detector, samples: Tensor, scores: om.Scores, rows: Tensor, called: str
) -> tuple[Exhibit, ...]:
    """Some of the samples, with their maps."""
    return Exhibit.each(
        detector,
        samples[rows],
        ids=[called.format(row) for row in rows.tolist()],
        p_values=scores.p_value[rows].tolist(),
        images=samples[rows],
    )


def make(folder: Path) -> list[Path]:
    """The page and a report of each stream, as files."""
    held_out, page = images(600, 0), folder / "page.html"
    detector = om.Detector(flow()).fit(held_out.split(100), progress=False)
    pages = [page]
    for name, stream in streams().items():
        watched = detector
        if name == "stale detector":
            detector.save_pretrained(folder / "detector")
            watched = om.Detector.from_pretrained(folder / "detector", flow(trained_further=True))
        with om.Monitor(watched, fpr=FPR, ert=ERT, sinks=[PageSink(page)], name=name) as monitor:
            said = []
            for start in range(0, len(stream), 20):
                names = [f"{i:04}.png" for i in range(start, min(start + 20, len(stream)))]
                said += monitor.update(stream[start : start + 20], ids=names)
                monitor.summarise()
                monitor.flush()
        path = folder / f"report-{name.replace(' ', '-')}.html"
        path.write_text(report(watched, name, stream, held_out, said), encoding="utf-8")
        pages.append(path)
    return pages


def taken(page: Path | str, picture: Path, width: int, height: int, *, dark: bool) -> None:
    """A picture of a page, a file or an address, once its scripts have drawn it.

    Raises:
        RuntimeError: Chromium took none.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise RuntimeError("Expected chromium on the PATH, got none: apt-get install chromium.")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",  # which root has none of; the pages are our own files
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *([] if isinstance(page, Path) else ["--virtual-time-budget=20000"]),
            f"--screenshot={picture}",
            page.resolve().as_uri() if isinstance(page, Path) else page,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not picture.exists():
        raise RuntimeError(f"Expected a picture of {page}, got {done.stderr[-300:]!r}.")


def main() -> None:
    """Makes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pages and pictures go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for page in make(folder.resolve()):
        for look, (width, height, dark) in LOOKS.items():
            taken(page, folder.resolve() / f"{page.stem}-{look}.png", width, height, dark=dark)
        sizes[page.name] = page.stat().st_size
    print(json.dumps({"bytes": sizes}, indent=2))


if __name__ == "__main__":
    main()
