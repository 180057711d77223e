"""What watching adds to a call of denoisers of the size of SD 1.5's, SDXL's, SD3's and Flux's.

Weights are random, which the cost does not depend on, and in bfloat16 on a GPU. Without one, say
`--scale 0.1`: a tenth of the parameters and a hundredth of the positions, in single precision. Each
watched call is beside an unwatched one just before. Calls of 4 steps are measured. Those of 50 are
made of them: what scoring adds to a call is the same, and a step, and what recording adds to it,
are measured alone. Calls of which a tenth of the samples is scored are made of calls whose sample
is scored and of calls whose is not. Without a GPU the time is the processor's, with one thread as
long as the clock's where nothing else runs; that in the background is the clock's, since scoring
takes a thread of its own.
"""

import copy
import gc
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from ood_monitor_integrations.diffusers import monitor_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.capture import Capture
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from ood_monitor_integrations.diffusers.plan import ONE_LEVEL
from ood_monitor_integrations.diffusers.recorded_call import record_call
from ood_monitor_integrations.diffusers.watching import capturing, hooked, stepping
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.harness.measurement import (
    claim,
    peak_of_tensors,
    processor_seconds,
    reported,
    seconds,
)
from benchmarks.harness.real_models import MODELS, pipeline
from benchmarks.integrations.diffusers import unwatched
from ood_monitor.densities.measurements import Measurements

Row = dict[str, Any]
Array = NDArray[np.float64]

#: Steps of the measured calls, and of those that are made of them.
FEW, MANY = 4, 50

#: The share of samples where not all are scored, and one by which none is.
SHARE, NONE = 0.1, 1e-12

#: Held-out samples that are measured, and how often each is counted, to fit a detector.
HELD_OUT, COPIES = 8, 5

#: The most that a way adds, as shares of a call: by its name and steps; with guidance first.
TARGETS: Mapping[tuple[str, int], tuple[float, float]] = {
    ("two levels", MANY): (0.03, 0.06),
    ("one level", FEW): (0.35, 0.35),
    ("two levels", FEW): (0.6, 0.6),
    ("a tenth of samples", MANY): (0.08, 0.08),
    ("a tenth of samples", FEW): (0.08, 0.08),
    ("background", MANY): (0.05, 0.05),
    ("background", FEW): (0.05, 0.05),
}
THROUGHPUT, MEMORY = 0.15, 1.02


@dataclass(frozen=True)
class Calls:
    """Calls of a pipeline that are alike but for their steps."""

    pipe: Any
    arguments: Mapping[str, Any]

    def __call__(self, steps: int = FEW) -> None:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
        self.pipe(**self.arguments, **options)

    def unwatched(self, steps: int = FEW) -> None:
        unwatched(self.pipe, lambda: self(steps))


def monitor(adapter: om.Adapter, batch: Mapping[str, Tensor]) -> om.Monitor:
    """Of noise: each held-out sample is measured once and counted several times."""
    noise = torch.Generator().manual_seed(1)
    measured = []
    detector = om.Detector(adapter, explain=0)
    for _ in range(HELD_OUT):
        x = torch.randn(batch["sample"].shape, generator=noise).to(batch["sample"])
        measured.append(detector.measure({**batch, "sample": x}))
    detector.fit_measured(Measurements.together(measured * COPIES))
    return om.Monitor(detector, fpr=0.05)


def added(calls: Calls, watching: om.Monitor, rounds: int, **options: Any) -> tuple[Array, Array]:
    """Seconds of unwatched calls, and what watched ones take more, each just after one of them."""
    plain, watched = [], []
    timed = seconds if options.get("mode") == "background" else processor_seconds
    monitor_pipeline(calls.pipe, watching, raise_on_error=True, **options)
    watcher = calls.pipe.ood_monitor
    for turn in range(rounds + 1):  # the first checks the model
        watcher.flush(600)
        before, after = timed(calls.unwatched), timed(calls)
        if turn:
            plain.append(before)
            watched.append(after)
    watcher.flush(600)
    counts = watcher.counts
    watcher.release(60)
    expected = 0 if options.get("sample_rate") == NONE else rounds + 1
    if (counts.scored, counts.failures) != (expected, 0):
        raise RuntimeError(f"Expected {expected} scored samples, got {counts}.")
    return np.array(plain), np.array(watched) - np.array(plain)


def in_a_stream(calls: Calls, watching: om.Monitor, count: int) -> float:
    """Seconds that scoring in the background adds to a call, of calls one after the other."""
    monitor_pipeline(calls.pipe, watching, mode="background", queue_size=count, raise_on_error=True)
    watcher = calls.pipe.ood_monitor
    start = time.perf_counter()
    for _ in range(count):
        seconds(calls.unwatched)
    half = time.perf_counter()
    for _ in range(count):
        seconds(calls)
    watcher.flush(600)
    end = time.perf_counter()
    scored = watcher.counts.scored
    watcher.release(60)
    if scored != count:
        raise RuntimeError(f"Expected {count} scored samples, got {scored}.")
    return ((end - half) - (half - start)) / count


class Nothing(nn.Module):
    """A denoiser that takes no time."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (sample,)


def recording(scheduler: Any, x: Tensor, rounds: int = 7) -> float:
    """Seconds that recording a step takes: of a denoiser that takes none."""
    scheduler, network = copy.deepcopy(scheduler), Nothing()

    def steps(*, recorded: bool) -> None:
        scheduler.set_timesteps(MANY, device=x.device)
        with ExitStack() as stack:
            if recorded:
                stack.enter_context(hooked(network))
                stack.enter_context(stepping(scheduler))
                stack.enter_context(capturing(Capture(network)))
            sample = x
            for t in scheduler.timesteps:
                sample = scheduler.step(network(sample, t)[0], t, sample)[0]

    pairs = [
        tuple(processor_seconds(partial(steps, recorded=recorded)) for recorded in (False, True))
        for _ in range(rounds)
    ]
    return max(0.0, statistics.median(after - before for before, after in pairs) / MANY)


def measured(
    calls: Calls, adapter: Any, batch: Mapping[str, Tensor], rounds: int
) -> Iterator[tuple[str, Array, Array, Array, float | None]]:
    """Ways to watch: unwatched calls, what is added, by which weights, and in a stream."""
    whole = monitor(adapter, batch)
    single = monitor(adapter.with_ratios(ONE_LEVEL), batch)
    plain, scored = added(calls, whole, rounds)
    even = np.full(rounds, 1 / rounds)
    yield "two levels", plain, scored, even, None
    yield "one level", *added(calls, single, rounds), even, None
    other, idle = added(calls, whole, rounds, sample_rate=NONE)
    weights = np.concatenate([SHARE * even, (1 - SHARE) * even])
    both = np.concatenate([plain, other]), np.concatenate([scored, idle])
    yield "a tenth of samples", *both, weights, None
    later = added(calls, whole, rounds, mode="background")
    yield "background", *later, even, in_a_stream(calls, whole, rounds)


def rows_of(name: str, calls: Calls, *, guided: bool, rounds: int) -> Iterator[Row]:
    """What each way adds to calls of few steps and of many."""
    calls()
    found = record_call(calls.pipe, {**calls.arguments, "output_type": "latent"}, 0)
    adapter = replayed_bound(calls.pipe, call={**calls.arguments, "output_type": "latent"})
    batch = adapter.batch(found.call, found.count)
    per_step = recording(calls.pipe.scheduler, found.call.sample)
    of_step = step(calls, rounds)
    size = sum(p.numel() for p in denoiser_of(calls.pipe).parameters())
    known = {"model": name, "parameters": size, "guided": guided}
    for way, plain, more, weights, stream in measured(calls, adapter, batch, rounds):
        for steps in (FEW, MANY):
            if (way, steps) not in TARGETS:
                continue
            call = float(np.median(plain)) + (steps - FEW) * of_step
            yield (
                known
                | {"steps": steps, "way": way}
                | summary(call, more + (steps - FEW) * per_step, weights, stream)
            )
    yield known | memory(calls, monitor(adapter, batch))


def step(calls: Calls, rounds: int) -> float:
    """Seconds of a step: by how much a call of few is longer than a call of one."""
    pairs = [
        tuple(processor_seconds(partial(calls, steps)) for steps in (1, FEW)) for _ in range(rounds)
    ]
    return statistics.median((few - one) / (FEW - 1) for one, few in pairs)


def summary(call: float, more: Array, weights: Array, stream: float | None) -> Row:
    """In milliseconds, and as shares of a call: the median, of unequal weights the mean."""
    is_mixed = len(set(weights)) > 1
    typical = float(weights @ more) if is_mixed else float(np.median(more))
    return {
        "call_ms": round(1000 * call, 2),
        "added_ms_p50": round(1000 * quantile(more, weights, 0.5), 2),
        "added_ms_p99": round(1000 * quantile(more, weights, 0.99), 2),
        "share": round(typical / call, 4),
        "throughput": None if stream is None else round(stream / call, 4),
    }


def quantile(values: Array, weights: Array, at: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) >= at - 1e-9
    return float(values[order][int(np.argmax(reached))])


def memory(calls: Calls, watching: om.Monitor) -> Row:
    """Peaks of an unwatched and of a watched call, with the weights."""
    weights = sum(p.nbytes for p in denoiser_of(calls.pipe).parameters()) / 2**20
    monitor_pipeline(calls.pipe, watching, raise_on_error=True)
    calls()
    plain, watched = peak_of_tensors(calls.unwatched), peak_of_tensors(calls)
    calls.pipe.ood_monitor.release(60)
    return {
        "weights_mib": round(weights, 1),
        "peak_mib": round(weights + plain, 1),
        "added_mib": round(watched - plain, 1),
        "peak": round((weights + watched) / (weights + plain), 4),
    }


def every(names: list[str], scale: float, device: str, rounds: int) -> Iterator[Row]:
    for name in names:
        yield from of_model(name, scale, device, rounds)
        gc.collect()  # what a model leaves takes the room of the next
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def of_model(
    name: str, scale: float, device: str, rounds: int, *, with_guidance: bool = True
) -> Iterator[Row]:
    model, dtype = MODELS[name], torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = pipeline(model, scale, device, dtype)
    torch.manual_seed(0)
    plain = model.arguments(scale)
    ways = {False: plain}
    if model.guided is not None and with_guidance:
        ways[True] = plain | model.guided(scale)
    for guided, given in ways.items():
        moved = {k: on(v, device, dtype) for k, v in given.items()}
        yield from rows_of(name, Calls(pipe, moved), guided=guided, rounds=rounds)


def on(value: Any, device: str, dtype: torch.dtype) -> Any:
    return value.to(device, dtype) if isinstance(value, Tensor) else value


def told(row: Row) -> str:
    guided = "guided" if row["guided"] else ""
    head = f"{row['model']:8}{row['parameters'] / 1e6:8.0f} M  {guided:8}"
    if "peak" in row:
        return f"{head}peak {row['peak_mib']} MiB, {row['added_mib']} more, {row['peak']}"
    names = ["call_ms", "added_ms_p50", "added_ms_p99", "share", "throughput"]
    text = "  ".join(f"{name} {row[name]}" for name in names if row[name] is not None)
    return f"{head}{row['steps']:3} steps  {row['way']:20}{text}"


def claims(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        guided = "guided" if row["guided"] else "unguided"
        if "peak" in row:
            text = f"{row['model']}, {guided}: peak memory of a watched call in an unwatched one's"
            found.append(claim(text, row["peak"], MEMORY))
            continue
        head = f"{row['model']}, {guided}, {row['steps']} steps, {row['way']}"
        target = TARGETS[row["way"], row["steps"]][0 if row["guided"] else 1]
        found.append(claim(f"{head}: added, as a share of a call", row["share"], target))
        if row["throughput"] is not None and row["steps"] == MANY:
            text = f"{head}: added to each of calls in a stream, as a share"
            found.append(claim(text, row["throughput"], THROUGHPUT))
    return found


def main(
    quick: Annotated[bool, typer.Option(help="SD 1.5 alone, tiny, in few calls.")] = False,
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one.")] = None,
    scale: Annotated[float, typer.Option(help="Of the parameters; 0.1 on a CPU.")] = 1.0,
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Calls of each way; 10 on a GPU and 2 on a CPU.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = model or list(MODELS)
    rounds = rounds or (10 if where.startswith("cuda") else 2)
    if where.startswith("cuda"):
        torch.cuda.init()
    else:
        torch.set_num_threads(1)
    start = time.perf_counter()
    logging.getLogger("ood_monitor").setLevel(logging.ERROR)  # which tells of the copies
    if quick:
        scale, rounds = 1e-3, 1
        rows = of_model("SD 1.5", scale, where, rounds, with_guidance=False)
    else:
        rows = every(names, scale, where, rounds)
    facts = {"device": where, "scale": scale, "rounds": rounds, "positions": scale**2}
    print(f"On {where}, at {scale:g} of the parameters and {scale**2:g} of the positions.")
    reported(rows, told, claims, output, **facts)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
