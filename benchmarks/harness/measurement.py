"""Time and memory of one method beside another's, in one process, and what to write of it."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
Row = dict[str, Any]


def processor() -> str:
    """The processor's name, which `platform.processor` does not give on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    card = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    return {
        "processor": processor(),
        **card,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def seconds(run: Run) -> float:
    """Until all is computed, on a GPU too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def processor_seconds(run: Run) -> float:
    """Of all threads of this process on the processor, which other work there changes little.

    On a GPU it is :func:`seconds`: there the processor only waits.
    """
    if torch.cuda.is_initialized():
        return seconds(run)
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(
    plain: Run,
    methods: Mapping[str, Run],
    rounds: int,
    timed: Callable[[Run], float] = seconds,
) -> dict[str, float]:
    """Median time of each method in units of the plain runs just before and after it."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        before = timed(plain)
        for name, run in methods.items():
            taken, after = timed(run), timed(plain)
            found[name].append(2 * taken / (before + after))
            before = after
    return {name: statistics.median(values) for name, values in found.items()}


def peak_mebibytes(run: Run) -> float:
    """How much a run raises the process's resident memory at its peak (Linux), or the GPU's.

    What the process keeps of freed memory is in it, which of small models is as much again, and
    another amount each time: :func:`peak_of_tensors` counts what is alive.
    """
    if torch.cuda.is_initialized():
        return _peak_on_gpu(run)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def peak_of_tensors(run: Run) -> float:
    """Mebibytes of the tensors that a run made and that were alive at once, at their peak."""
    if torch.cuda.is_initialized():
        return _peak_on_gpu(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes)), default=0) / 2**20


def _peak_on_gpu(run: Run) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def claim(text: str, value: float, target: float) -> dict[str, Any]:
    """A claim that a figure is at most its target."""
    return {"claim": text, "value": value, "target": target, "holds": value <= target}


def reported(
    rows: Iterable[Row],
    line: Callable[[Row], str],
    claims: Callable[[list[Row]], list[Row]],
    path: Path | None,
    **facts: Any,
) -> None:
    """Tell each row as soon as it is measured, then :func:`conclude` a report of them."""
    told: list[Row] = []
    for row in rows:
        print(line(row), flush=True)
        told.append(row)
    conclude({"machine": machine(), **facts, "rows": told, "claims": claims(told)}, path)


def conclude(report: Mapping[str, Any], path: Path | None) -> None:
    """Tell a report's claims, then :func:`save` it."""
    for c in report["claims"]:
        print(f"{'holds' if c['holds'] else 'FAILS'}  {c['claim']}: {c['value']} ({c['target']})")
    save(report, path)


def save(report: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
