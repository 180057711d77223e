"""What watching a pipeline costs its calls, and what it detects through one.

Latency: calls watched in each way, each beside an unwatched call just before it. Weights are
random, which the cost does not depend on. Detection: a pipeline trained on Fashion-MNIST; images
are scored as its detector scores what it draws or is given.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from numpy.typing import NDArray
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, plan_costs
from ood_monitor_integrations.diffusers.calls import original_class
from ood_monitor_integrations.diffusers.replay import LEVELS, SEED
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import datasets, trained
from benchmarks.harness.measurement import claim, conclude, machine, seconds
from benchmarks.harness.models import ddpm_cifar10
from ood_monitor.densities.measurements import Measurements
from ood_monitor.densities.parts import Method

Array = NDArray[np.float64]
Row = dict[str, Any]

#: Noise levels compared with the default, and seeds of the noise, the default first.
FEWER = ((50, 500), (500,))
SEEDS = (SEED, 0, 1)

OUTPUT = ["conv_norm_out.*", "conv_out.*"]

#: The set that the pipeline was trained on, then those that it is to tell from it.
DETECTED = ("Fashion-MNIST", "MNIST", "EMNIST letters")


@dataclass(frozen=True)
class Watching:
    """A way to watch.

    Attributes:
        method: Of the detector; None for its default.
        layers: Patterns; None for all.
        levels: Noise levels.
        options: Of `monitor_pipeline`.
        target: The most that it adds to a call, as a share of it; None without a claim.
        mean: Whether the claim is of the mean of calls, as a share of the samples asks for.
    """

    method: Method | None = "gradient_norms"
    layers: list[str] | None = None
    levels: tuple[int, ...] = (50, 500)
    options: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    mean: bool = False

    @property
    def chunk_size(self) -> int | None:
        """As many samples as it has at once; gradients of eight, for their memory."""
        return None if self.method is None else 8


def ways(last: str, *, few: bool) -> dict[str, Watching]:
    """The ways compared, for a UNet whose last up block has this name.

    Args:
        last: That name.
        few: Those alone that can be told from few calls.
    """
    end = [f"{last}.*", *OUTPUT]
    share, background = {"sample_rate": 0.1}, {"mode": "background", "queue_size": 4}
    all_ways = {
        "defaults": Watching(None, target=0.06),
        "defaults, a tenth of samples": Watching(None, options=share, target=0.02, mean=True),
        "defaults, background": Watching(None, options=background, target=0.05),
        "gradient norms, four levels": Watching(levels=LEVELS),
        "gradient norms, last up block": Watching(layers=end, target=0.12),
        "gradient norms, last up block, background": Watching(
            layers=end, options=background, target=0.05
        ),
    }
    chosen = ("defaults", "defaults, background", "gradient norms, last up block")
    return {name: way for name, way in all_ways.items() if not few or name in chosen}


def pipeline(unet: Any) -> DDPMPipeline:
    pipe = DDPMPipeline(unet.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits_unet() -> Any:
    """That of examples/digits_demo.py."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def latency(
    name: str, pipe: DDPMPipeline, last: str, *, steps: int, calls: int, batch: int = 1
) -> Iterator[Row]:
    """A row for each way of watching a pipeline."""
    size = pipe.unet.config.sample_size
    images = [torch.rand(40, pipe.unet.config.in_channels, size, size)]
    arguments = {"num_inference_steps": steps, "output_type": "np", "batch_size": batch}

    def call() -> None:
        pipe(generator=torch.Generator().manual_seed(0), **arguments)

    call()
    for way, watching in ways(last, few=calls < 10).items():
        detector = fit_pipeline(
            pipe,
            images,
            call={"output_type": "np"},
            method=watching.method,
            levels=watching.levels,
            layers=watching.layers,
            chunk_size=watching.chunk_size,
            progress=False,
            watches="outputs",  # of an untrained model: what it costs is the same
        )
        # Calls with a sample that is scored and calls without: enough of both.
        rounds = max(3, 12 // batch) * calls if watching.mean else calls
        yield {"pipeline": f"{name}, B = {batch}", "steps": steps, "way": way} | measured(
            pipe, call, om.Monitor(detector, fpr=0.05), watching, rounds
        )


def measured(
    pipe: DDPMPipeline, call: Callable[[], None], monitor: om.Monitor, way: Watching, rounds: int
) -> Row:
    """Watched calls in turn with unwatched ones, and what they take more.

    Beside the time it is told in time of the processor, which others on the machine hardly change;
    that of a background is its thread's as well.
    """
    plain, watched, cpu_plain, cpu_watched = [], [], [], []
    monitor_pipeline(pipe, monitor, **way.options)
    call()  # the first checks the model
    watcher = pipe.ood_monitor
    watcher.flush(60)
    for _ in range(rounds):
        start = time.process_time()
        plain.append(seconds(lambda: unwatched(pipe, call)))
        between = time.process_time()
        watched.append(seconds(call))
        watcher.flush(60)
        cpu_plain.append(between - start)
        cpu_watched.append(time.process_time() - between)
    counts = watcher.counts
    watcher.detach(60)
    added = np.array(watched) - np.array(plain)
    cpu_added = np.array(cpu_watched) - np.array(cpu_plain)
    return {
        "call_ms": round(1000 * statistics.median(plain), 2),
        "added_ms_p50": round(1000 * float(np.quantile(added, 0.5)), 2),
        "added_ms_p95": round(1000 * float(np.quantile(added, 0.95)), 2),
        "share": share(added, np.array(plain), mean=way.mean),
        "cpu_share": share(cpu_added, np.array(cpu_plain), mean=way.mean),
        "calls": rounds,
        "scored": counts.scored,
        "dropped": counts.dropped,
        "target": way.target,
    }


def share(added: Array, plain: Array, *, mean: bool) -> float:
    """What is added to a call, as a share of it: the median, or of all calls together."""
    found = added.mean() / plain.mean() if mean else np.median(added / plain)
    return round(float(found), 4)


def unwatched(pipe: Any, call: Callable[[], None]) -> None:
    """A call of the pipeline's own class: what it is without a monitor."""
    watcher, kind = pipe.__dict__.pop("ood_monitor"), pipe.__class__
    pipe.__class__ = original_class(pipe)
    try:
        call()
    finally:
        pipe.__class__ = kind
        pipe.__dict__["ood_monitor"] = watcher


def told(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as soon as it is there."""
    found = []
    for row in rows:
        typer.echo("  ".join(f"{name} {value}" for name, value in row.items()))
        found.append(row)
    return found


def latency_claims(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        if row.get("target") is not None and row["steps"] == 50:
            text = f"{row['pipeline']}, {row['way']}: time added to a call of 50 steps, as a share"
            # The clock's where scoring takes a thread of its own, else the processor's.
            is_later = "background" in row["way"]
            found.append(claim(text, row["share" if is_later else "cpu_share"], row["target"]))
    return found


# Detection.


def signed(images: Tensor) -> Tensor:
    """As `fit_pipeline` takes them, in [0, 1]."""
    return images.float() / 255


def measure(detector: om.Detector, images: Tensor, batch: int = 50) -> Measurements:
    """What the detector sees of images (uint8) as samples of the pipeline."""
    parts = [detector.measure({"sample": 2 * signed(piece) - 1}) for piece in images.split(batch)]
    return Measurements.together(parts)


def scores(detector: om.Detector, measured: Measurements) -> Array:
    fitted = detector.fitted
    found: Array = fitted.joined.score(measured)
    return found


def single(
    pipe: DDPMPipeline, sets: dict[str, Tensor], seeds: tuple[int, ...]
) -> Iterator[tuple[Row, om.Detector, dict[str, Array]]]:
    """AUROC of single samples by noise levels and by the seed of their noise, the default first.

    Yields:
        A row, and the detector and the scores behind it.
    """
    settings = [LEVELS, *FEWER]
    every = sorted({level for levels in settings for level in levels})
    for seed in seeds:
        start = time.perf_counter()
        few = [signed(sets["fit"][:100])]
        detector = fit_pipeline(
            pipe, few, method="gradient_norms", levels=every, seed=seed, progress=False
        )
        measured = {name: measure(detector, images) for name, images in sets.items()}
        print(f"  seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        for levels in settings:
            kept = {name: of_levels(seen, levels) for name, seen in measured.items()}
            detector.fit_measured(kept.pop("fit"))
            found = {name: scores(detector, seen) for name, seen in kept.items()}
            aurocs = {k: round(auroc(found["test"], v), 4) for k, v in found.items() if k != "test"}
            yield {"detection": "AUROC", "levels": levels, "seed": seed} | aurocs, detector, found


def of_levels(measured: Measurements, levels: tuple[int, ...]) -> Measurements:
    """What a detector at these levels alone sees."""
    terms = [f"t={level}" for level in levels]
    columns = [measured.terms.index(term) for term in terms]
    names = measured.features
    features = [i for i, name in enumerate(names) if name.split("/", 1)[0] in terms]
    return Measurements.of_norms(
        tuple(terms),
        measured.log_likelihood[:, columns],
        tuple(names[i] for i in features),
        measured.norms[:, features],
    )


def auroc(normal: Array, odd: Array) -> float:
    labels = np.repeat([0, 1], [len(normal), len(odd)])
    return float(roc_auc_score(labels, np.concatenate([normal, odd])))


def delays(
    detector: om.Detector, found: dict[str, Array], name: str, *, ert: float, runs: int
) -> Row:
    """Samples to the alarm in streams of which a fifth is of another set, from the first on."""
    calibration, alarms = detector.fitted.calibration.scores, []
    for run in range(runs):
        generator = np.random.default_rng(run)
        normal = generator.permutation(found["test"])
        odd = generator.permutation(found[name])
        length = min(len(normal), 300)
        stream = np.where(generator.random(length) < 0.2, np.resize(odd, length), normal[:length])
        alarms.append(first_alarm(calibration, stream, ert, run))
    late = [length + 1 if alarm is None else alarm for alarm in alarms]
    return {
        "detection": "delay",
        "against": f"{name}, 20 % of the stream",
        "median": float(np.median(late)),
        "largest": float(np.max(late)),
        "runs": runs,
    }


def first_alarm(calibration: Array, stream: Array, ert: float, seed: int) -> int | None:
    drift = om.EDetector(calibration, ert=ert, seed=seed)
    for i, score in enumerate(stream):
        if drift.update(float(score)).alarm:
            return i + 1
    return None


def false_alarms(
    detector: om.Detector, measured: Measurements, *, fit: int, length: int, ert: float, runs: int
) -> Row:
    """Streams in control of which fit, calibration and stream are drawn without replacement."""
    alarmed = 0
    for run in range(runs):
        order = np.random.default_rng(run).permutation(len(measured))
        detector.fit_measured(measured.take(order[:fit]))
        stream = scores(detector, measured.take(order[fit : fit + length]))
        alarm = first_alarm(detector.fitted.calibration.scores, stream, ert, run)
        alarmed += alarm is not None
    share = alarmed / runs
    return {
        "detection": "false alarms",
        "ert": ert,
        "length": length,
        "runs": runs,
        "share": round(share, 3),
        "standard_error": round(float(np.sqrt(share * (1 - share) / runs)), 3),
    }


def detection(
    pipe: DDPMPipeline,
    held_out: Tensor,
    odd: dict[str, Tensor],
    last: str,
    sizes: dict[str, int],
    ert: float,
) -> tuple[list[Row], list[Row]]:
    """Rows and claims."""
    images = trained.drawn(held_out, sizes["fit"] + sizes["test"])
    sets = {"fit": images[: sizes["fit"]], "test": images[sizes["fit"] :]} | odd
    seen = single(pipe, sets, SEEDS[: sizes["seeds"]])
    first, detector, found = next(seen)
    delay = delays(detector, found, next(iter(odd)), ert=ert, runs=sizes["runs"])
    rows = [first, *(row for row, _, _ in seen)]
    claims = [
        claim(f"1 - AUROC of single samples against {name}", round(1 - first[name], 4), 0.02)
        for name in odd
    ]
    claims.append(claim(f"median samples to the alarm, {delay['against']}", delay["median"], 100))
    # Each image once, at one level of the last up block: the whole takes five times as long.
    start = time.perf_counter()
    cheap = fit_pipeline(
        pipe,
        [signed(held_out[:100])],
        method="gradient_norms",
        levels=(500,),
        layers=[f"{last}.*", *OUTPUT],
        progress=False,
    )
    measured = measure(cheap, held_out)
    print(f"  {len(held_out)} images: {time.perf_counter() - start:.0f} s", flush=True)
    alarms = false_alarms(
        cheap, measured, fit=sizes["fit"], length=sizes["length"], ert=ert, runs=sizes["runs"]
    )
    bound = 1 - np.exp(-1) + 2 * np.sqrt(0.63 * 0.37 / sizes["runs"])
    text = f"share of streams of {sizes['length']} with a false alarm at ert {ert:,.0f}"
    claims.append(claim(text, alarms["share"], round(float(bound), 3)))
    return [*rows, delay, alarms], claims


def fashion(folder: Path, ood: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The 20 000 images that the model never saw, and MNIST and EMNIST letters."""
    own, *others = DETECTED
    unseen = [datasets.read(folder, own, "train")[50_000:], datasets.read(folder, own, "test")]
    tests = {name: datasets.read(folder, name, "test") for name in others}
    odd = {name: trained.drawn(trained.square(images), ood) for name, images in tests.items()}
    return torch.cat([trained.square(images) for images in unseen]), odd


def digits() -> tuple[DDPMPipeline, Tensor, dict[str, Tensor]]:
    """A UNet trained for seconds on handwritten digits, digits it has not seen, and shifts."""
    images = trained.digits()
    torch.manual_seed(0)
    unet = trained.unet(8, (8, 16))
    trained.train(unet, trained.tiny()["UNet"], images.train)
    sets = dict(images.sets)
    return pipeline(unet), torch.cat([sets.pop("fit"), sets.pop("test")]), sets


def quick_report() -> dict[str, Any]:
    torch.manual_seed(0)
    rows = told(latency("digits", pipeline(digits_unet()), "up_blocks.1", steps=50, calls=3))
    pipe, held_out, odd = digits()
    sizes = {"fit": 200, "test": 150, "length": 200, "runs": 10, "seeds": 1}
    found, claims = detection(pipe, held_out, odd, "up_blocks.1", sizes, ert=1_000)
    told(found)
    return {"rows": [*rows, *found], "claims": [*latency_claims(rows), *claims]}


def latency_report() -> Iterator[Row]:
    torch.manual_seed(0)
    unet = digits_unet()
    for steps, batch in ((25, 1), (50, 1), (50, 16)):
        digits = pipeline(unet)
        yield from latency("digits", digits, "up_blocks.1", steps=steps, calls=10, batch=batch)
    cifar = pipeline(ddpm_cifar10()[0].module)
    yield from latency("DDPM-CIFAR-10", cifar, "up_blocks.3", steps=50, calls=6)
    for plan in plan_costs(cifar, call={"output_type": "np"}, layers=(None, ["up_blocks.3.*"])):
        levels = plan.levels or "without noise"
        yield {"plan": f"{plan.method}, {levels}, {plan.layers or 'all layers'}"} | {
            "milliseconds": round(plan.milliseconds, 1),
            "forwards": round(plan.forwards, 2),
        }


def main(
    quick: Annotated[bool, typer.Option(help="Tiny models of 8x8 digits; needs no files.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[
        Path, typer.Option(help="Folder of a DDPMPipeline trained on Fashion-MNIST.")
    ] = Path("models/ddpm-fashion-mnist"),
    part: Annotated[str, typer.Option(help="latency, detection or both.")] = "both",
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    if quick:
        found = quick_report()
    else:
        rows = told(latency_report()) if part != "detection" else []
        found = {"rows": rows, "claims": latency_claims(rows)}
        if part != "latency":
            datasets.require(data_dir, DETECTED)
            pipe = DDPMPipeline.from_pretrained(model)
            sizes = {"fit": 1_000, "test": 500, "length": 10_000, "runs": 40, "seeds": 3}
            more, claims = detection(pipe, *fashion(data_dir, 300), "up_blocks.2", sizes, 10_000)
            told(more)
            found = {"rows": [*rows, *more], "claims": [*found["claims"], *claims]}
    conclude({"machine": machine()} | found, output)


if __name__ == "__main__":
    typer.run(main)
