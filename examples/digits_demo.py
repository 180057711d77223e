"""The main job, end to end: train, fit a detector, watch, catch a drift, find it in MLflow.

On scikit-learn's handwritten digits (real, 8x8, in the package), with a Glow under Lightning that
both methods watch, and a diffusers pipeline. Run it by `make demo`, or with `--fast` for the Glow
alone in half a minute. It exits with 0 only if every drift was caught, none was seen where there
was none, and the alerts stand in MLflow.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Read when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlflow
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from matplotlib.figure import Figure
from ood_monitor_integrations.diffusers import monitor_pipeline
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.mlflow import MLflowSink
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import MLFlowLogger
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import ood_monitor as om
from ood_monitor.densities.baselines import LowLikelihood, TotalNorm, Typicality
from ood_monitor.densities.features import table
from ood_monitor.densities.parts import Method
from ood_monitor.plots import alert_figure, layer_histograms, score_histogram

OUT = Path("runs/digits")
STORE = "sqlite:///mlflow.db"
EXPERIMENT = "ood-monitor demo"
ERT, FPR = 10_000, 0.01
LEVELS = 16  # the digits' pixels are 0, 1, ..., 16
METHODS: list[Method] = ["gradient_norms", "forward"]
TRAIN, HELD_OUT = 800, 700  # the rest is the test stream
IS_TERMINAL = sys.stderr.isatty()  # elsewhere bars are lines without end


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="the Glow alone, in half a minute")
    fast = parser.parse_args().fast
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, of PyTorch
    torch.set_num_threads(1)  # images of 8x8: threads cost more than they bring
    pl.seed_everything(0)
    OUT.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(STORE)
    mlflow.set_experiment(EXPERIMENT)
    digits = Digits.load()
    rows = [*watch_glow(digits), *([] if fast else watch_diffusion(digits))]
    print_report(rows, seconds=time.monotonic() - started)
    return 0 if all(row.caught and not row.false_alarms for row in rows) else 1


@dataclass(frozen=True)
class Digits:
    """Disjoint splits, (N, 1, 8, 8) in [0, 1], and the test images shifted."""

    train: Tensor
    held_out: Tensor
    test: Tensor
    shifts: dict[str, Tensor]

    @classmethod
    def load(cls) -> "Digits":
        images = torch.tensor(load_digits().images / LEVELS, dtype=torch.float32).unsqueeze(1)
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        train, held_out, test = images.tensor_split([TRAIN, TRAIN + HELD_OUT])
        shifts = {
            "contrast x 0.5": quantised(test * 0.5),
            "3x3 blur": quantised(F.avg_pool2d(test, 3, stride=1, padding=1)),
            "photo patches": photo_patches(len(test)),
        }
        return cls(train, held_out, test, shifts)


def quantised(images: Tensor) -> Tensor:
    """On the digits' own grid of grey levels, so that a shift is not told by its fractions."""
    return (images * LEVELS).round() / LEVELS


def photo_patches(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    photos = torch.tensor(np.stack(load_sample_images().images), dtype=torch.float32).mean(3) / 255
    small = F.avg_pool2d(photos, 4)
    corners = torch.rand(count, 2, generator=generator)
    patches = []
    for i, (u, v) in enumerate(corners.tolist()):
        photo = small[i % len(small)]
        y, x = int(u * (photo.shape[0] - 8)), int(v * (photo.shape[1] - 8))
        patches.append(photo[y : y + 8, x : x + 8])
    return quantised(torch.stack(patches).unsqueeze(1))


class FlowModule(pl.LightningModule):
    """A Glow that Lightning trains; the callback asks it for `adapter()`."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = om.models.Glow(channels=1, size=8, levels=2, steps=4, hidden=64)

    def adapter(self) -> om.LogLikelihood:
        return om.LogLikelihood(self.flow, bins=LEVELS + 1)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        noisy = (x * LEVELS + torch.rand_like(x)) / (LEVELS + 1)
        loss = -self.flow.log_prob(noisy).mean()
        self.log("train/nll", loss, prog_bar=True)
        return loss

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val/nll", -self.flow.log_prob((x * LEVELS + 0.5) / (LEVELS + 1)).mean())

    def predict_step(self, x: Tensor, index: int) -> Tensor:
        return self.flow.log_prob((x * LEVELS + 0.5) / (LEVELS + 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loader(images: Tensor, *, shuffle: bool = False) -> DataLoader[Tensor]:
    return DataLoader(images, batch_size=50, shuffle=shuffle)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """One line of the report: a stream of held-out digits, then a shift."""

    model: str
    shift: str
    method: str
    auroc: dict[str, float]
    false_alarms: int
    flagged: float
    delay: int | None
    run_id: str

    @property
    def caught(self) -> bool:
        return self.delay is not None and stands_in_mlflow(self.run_id)


def watch_glow(digits: Digits) -> list[Row]:
    """Train with a callback for each method, then watch `trainer.predict` and two streams more."""
    logger = MLFlowLogger(EXPERIMENT, "Glow: contrast x 0.5", tracking_uri=STORE)
    watchers = [
        OODMonitor(ert=ERT, fpr=FPR, watch=["predict"], method=method, name=method)
        for method in METHODS
    ]
    trainer = pl.Trainer(
        max_epochs=18,
        accelerator="cpu",
        logger=logger,
        callbacks=[*watchers, ModelCheckpoint(OUT / "glow", save_last=True)],
        log_every_n_steps=8,
        check_val_every_n_epoch=6,
        num_sanity_val_steps=0,
        enable_progress_bar=IS_TERMINAL,
    )
    module = FlowModule()
    trainer.fit(module, loader(digits.train, shuffle=True), loader(digits.held_out))
    detectors = [watcher.detector for watcher in watchers if watcher.detector is not None]
    assert len(detectors) == len(METHODS), "a callback did not calibrate"
    for method, detector in zip(METHODS, detectors, strict=True):
        detector.save_pretrained(OUT / "glow" / method)
    aurocs = compare("Glow", detectors, digits)
    shift, *others = digits.shifts
    trainer.predict(
        module, loader(torch.cat([digits.test, digits.shifts[shift]])), ckpt_path="last"
    )
    rows = []
    for method, detector, watcher in zip(METHODS, detectors, watchers, strict=True):
        flagged = float((detector.score(digits.test).p_value <= FPR).double().mean())
        false_alarms, delay = outcome(watcher.alerts, len(digits.test))
        row = Row(
            "Glow", shift, method, aurocs[shift], false_alarms, flagged, delay, str(logger.run_id)
        )
        rows.append(row)
    watches = [monitored("Glow", detector, digits) for detector in detectors]
    return [*rows, *(watch(shift, aurocs[shift]) for shift in others for watch in watches)]


def watch_diffusion(digits: Digits) -> list[Row]:
    """Train a UNet, save and load its pipeline, fit by each method, wrap the pipeline, watch."""
    train_pipeline(digits.train).save_pretrained(OUT / "ddpm")
    pipe = DDPMPipeline.from_pretrained(OUT / "ddpm", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(desc="sampling")
    adapter = om.DenoisingBound(pipe.unet, pipe.scheduler, inputs=lambda x: 2 * x - 1)
    detectors = [
        om.Detector(adapter, method=method).fit(loader(digits.held_out)) for method in METHODS
    ]
    for method, detector in zip(METHODS, detectors, strict=True):
        detector.save_pretrained(OUT / "ddpm" / method)
    aurocs = compare("diffusion", detectors, digits)
    show_generated(pipe, detectors[-1])
    watches = [monitored("diffusion", detector, digits) for detector in detectors]
    return [watch(shift, aurocs[shift]) for shift in digits.shifts for watch in watches]


def train_pipeline(images: Tensor, steps: int = 600) -> DDPMPipeline:
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    bar = tqdm(range(steps), desc="training the UNet", unit="step", disable=not IS_TERMINAL)
    for _ in bar:
        x = 2 * images[torch.randint(len(images), (64,), generator=generator)] - 1
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(1000, (len(x),), generator=generator)
        loss = F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return DDPMPipeline(unet.eval(), scheduler)


def show_generated(pipe: DDPMPipeline, detector: om.Detector) -> None:
    """The inference hook: what the pipeline draws, scored by the call itself."""
    images = om.DenoisingBound(pipe.unet, pipe.scheduler)  # the hook sees samples in [-1, 1]
    outputs = om.Detector.from_state_dict(detector.state_dict(), images)
    with monitor_pipeline(pipe, om.Monitor(outputs, fpr=FPR, name="pipeline outputs")) as watched:
        generator = torch.Generator().manual_seed(0)
        result = watched(batch_size=16, num_inference_steps=50, generator=generator)
    flagged = int((result.ood.p_value <= FPR).sum())
    print(
        f"The wrapped pipeline drew 16 images; {flagged} are unlike held-out digits at fpr {FPR}."
    )


def compare(
    model: str, detectors: list[om.Detector], digits: Digits
) -> dict[str, dict[str, float]]:
    """AUROC of each method on the same model: {shift: {method: AUROC}}; and the figures."""
    first = detectors[0]
    paper = om.Detector(first.adapter, density=om.DiagonalGaussian())
    paper.fit(loader(digits.held_out), progress=False)
    typicality = Typicality().fit(first.fitted.log_likelihood)

    def scores(images: Tensor) -> dict[str, np.ndarray]:
        results = {detector.fitted.method: detector.score(images) for detector in detectors}
        log_likelihood = results[first.fitted.method].log_likelihood.numpy()
        norms = table(om.gradient_norms(first.adapter, images))[1]
        return {method: result.score.numpy() for method, result in results.items()} | {
            "paper": paper.score(images).score.numpy(),
            "total norm": TotalNorm().score(np.log(norms + 1e-300)),
            "typicality": typicality.score(log_likelihood),
            "log-likelihood": LowLikelihood().score(log_likelihood),
        }

    usual = scores(digits.test)
    unusual = {shift: scores(images) for shift, images in digits.shifts.items()}
    own = first.fitted.method
    draw(model, first, digits, usual[own], {k: v[own] for k, v in unusual.items()})
    shift = next(iter(digits.shifts))
    stream = np.concatenate([usual["forward"], unusual[shift]["forward"]])
    draw_stream(model, shift, detectors[METHODS.index("forward")], stream, len(digits.test))
    labels = np.repeat([0, 1], len(digits.test))
    return {
        shift: {
            method: float(roc_auc_score(labels, np.concatenate([usual[method], values])))
            for method, values in by_method.items()
        }
        for shift, by_method in unusual.items()
    }


def draw(
    model: str,
    detector: om.Detector,
    digits: Digits,
    usual: np.ndarray,
    unusual: dict[str, np.ndarray],
) -> None:
    """Figures: scores by stream, and log norms of a few layers with the density fitted."""
    groups = {"held-out digits": usual, **unusual}
    score_histogram(groups, title=f"{model}: anomaly scores").savefig(OUT / f"{model}-scores.png")
    fitted = detector.fitted
    chosen = fitted.layers[:: max(1, len(fitted.layers) // 4)][:4]
    at = {layer: fitted.layers.index(layer) for layer in chosen}
    normal = {k: (float(fitted.layer_mean[i]), float(fitted.layer_sd[i])) for k, i in at.items()}

    def log_norms(images: Tensor) -> dict[str, np.ndarray]:
        z = detector.score(images).z
        return {k: z[k].numpy() * sd + mean for k, (mean, sd) in normal.items()}

    shifts = list(digits.shifts)[:2]
    others = {shift: log_norms(digits.shifts[shift]) for shift in shifts}
    figure = layer_histograms(log_norms(digits.test), normal, other=others)
    figure.savefig(OUT / f"{model}-layers.png")


def draw_stream(
    model: str, shift: str, detector: om.Detector, scores: np.ndarray, change: int
) -> None:
    """A figure of a stream: scores, and the evidence of drift up to its alarm."""
    evidence = om.EDetector(detector.fitted.calibration.scores, ert=ERT).update_many(scores)
    alarm = next((e.n for e in evidence if e.alarm), len(scores))
    seen = np.arange(1, len(scores) + 1)
    figure = Figure(figsize=(8.0, 3.6), dpi=150, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    figure.suptitle(f"{model}: digits, and from sample {change} on {shift}", fontsize="medium")
    above.scatter(seen, scores, s=6, c=np.where(seen > change, "#D55E00", "#0072B2"), linewidths=0)
    above.set(yscale="symlog", ylabel="score")
    below.plot(seen[:alarm], [e.log_e_value for e in evidence[:alarm]], color="#0072B2")
    below.axhline(np.log(ERT), color="#D55E00", linestyle="--", label=f"alarm bar, ert {ERT:,}")
    below.set(xlabel="sample of the stream", ylabel="log e-value", xlim=(1, len(scores)))
    for axes in (above, below):
        axes.axvline(alarm, color="black", linestyle=":", label=f"drift alarm at sample {alarm}")
        axes.spines[["top", "right"]].set_visible(False)
    below.legend(fontsize="small", loc="center right")
    figure.savefig(OUT / f"{model}-stream.png")


def monitored(
    model: str, detector: om.Detector, digits: Digits
) -> Callable[[str, dict[str, float]], Row]:
    """A function that watches a stream of held-out digits followed by a shift."""

    def watch(shift: str, auroc: dict[str, float]) -> Row:
        method = detector.fitted.method
        with mlflow.start_run(run_name=f"{model}, {method}: {shift}") as run:
            sinks = [MLflowSink(), om.LoggingSink()]
            name = f"{model}/{method}/{shift}"
            with om.Monitor(detector, ert=ERT, fpr=FPR, sinks=sinks, name=name) as monitor:
                alerts, p_values = [], []
                for batch in loader(torch.cat([digits.test, digits.shifts[shift]])):
                    alerts += monitor.update(batch)
                    p_values.append(monitor.last.p_value)  # type: ignore[union-attr]
                monitor.flush(60)  # a slow store has the alerts, too
        for alert in alerts:
            if alert.kind == "drift":
                alert_figure(alert).savefig(OUT / f"{model}-alert.png")
        false_alarms, delay = outcome(alerts, len(digits.test))
        flagged = float((torch.cat(p_values)[: len(digits.test)] <= FPR).double().mean())
        return Row(model, shift, method, auroc, false_alarms, flagged, delay, run.info.run_id)

    return watch


def outcome(alerts: list[om.Alert], change: int) -> tuple[int, int | None]:
    """False drift alarms before the change, and the samples from it to the first alarm after."""
    seen = [alert.samples_seen for alert in alerts if alert.kind == "drift"]
    after = [n - change for n in seen if n > change]
    return sum(n <= change for n in seen), (after[0] if after else None)


def stands_in_mlflow(run_id: str) -> bool:
    """Whether the alert is there as anybody looks for it: tag, note, metric, JSON and figure."""
    client = mlflow.MlflowClient(STORE)
    data = client.get_run(run_id).data
    note = data.tags.get("mlflow.note.content", "")
    files = {Path(file.path).suffix for file in client.list_artifacts(run_id, "ood/alerts")}
    return (
        data.tags.get("ood_monitor.status") == "ALERT"
        and "**ood-monitor: ALERT**" in note
        and any(name.endswith("/log_e_value") for name in data.metrics)
        and {".json", ".png"} <= files
    )


def print_table(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) + 2 for column in zip(header, *lines, strict=True)]
    for line in [header, *lines]:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_report(rows: list[Row], *, seconds: float) -> None:
    methods = list(rows[0].auroc)
    print("\nAUROC by method:")
    shown = {(row.model, row.shift): row for row in rows}
    lines = [
        [row.model, row.shift, *(f"{row.auroc[m]:.3f}" if m in row.auroc else "-" for m in methods)]
        for row in shown.values()
    ]
    print_table(["model", "shift", *methods], lines)
    print("\nWhat the stream of held-out digits and the shift gave, by the method that watched:")
    lines = [
        [
            *(row.model, row.shift, row.method, str(row.false_alarms), f"{row.flagged:.1%}"),
            "missed" if row.delay is None else f"{row.delay}",
        ]
        for row in rows
    ]
    print_table(["model", "shift", "method", "false alarms", "flagged", "delay"], lines)
    print(
        f"\nflagged: share of held-out digits with p <= {FPR}; delay: samples to the drift alarm."
    )
    for row in rows:
        if row.false_alarms or not row.caught:
            problem = "a false alarm" if row.false_alarms else "an alarm missed or not in MLflow"
            what = f"{row.model}, {row.shift}, {row.method}"
            print(f"FAILED: {what}: {problem} (run {row.run_id}).")
    (OUT / "report.json").write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
    print("\nFigures:    " + "\n            ".join(map(str, sorted(OUT.glob("*.png")))))
    print(f"\nDone in {seconds:.0f} s. Try next:")
    programs = Path(os.path.relpath(Path(sys.executable).parent))
    detector = OUT / "glow" / "forward"
    print(f"    {programs}/mlflow ui --backend-store-uri {STORE}    # the alerts")
    print(f"    {programs}/ood-monitor show {detector}    # what was fitted")
    print(f"    {programs}/ood-monitor report {detector} report.html    # the same as a page")


if __name__ == "__main__":
    sys.exit(main())
