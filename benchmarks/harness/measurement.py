"""Time and memory of one method beside another's, in one process, and what to write of it."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]

#: glibc's option of how large a block has pages of its own.
_MMAP_THRESHOLD = -3


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


def ratios(plain: Run, methods: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median time of each method in units of the plain runs just before and after it."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        before = seconds(plain)
        for name, run in methods.items():
            taken, after = seconds(run), seconds(plain)
            found[name].append(2 * taken / (before + after))
            before = after
    return {name: statistics.median(values) for name, values in found.items()}


def peak_mebibytes(run: Run) -> float:
    """How much a run raises the process's resident memory at its peak (Linux), or the GPU's.

    Each tensor has pages of its own meanwhile, which go back when it is freed: the allocator's
    holes, as large as what small models allocate and another size each time, are not counted.
    """
    if torch.cuda.is_initialized():
        return _peak_on_gpu(run)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    run()
    peak = _resident("VmHWM") - before
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most that it comes to by itself
    return peak


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


def conclude(report: Mapping[str, Any], path: Path | None) -> None:
    """Tell a report's claims, then :func:`save` it."""
    for c in report["claims"]:
        print(f"{'holds' if c['holds'] else 'FAILS'}  {c['claim']}: {c['value']} ({c['target']})")
    save(report, path)


def save(report: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
