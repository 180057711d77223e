"""Time and memory of `gradient_norms` in units of one plain batched forward and backward pass.

In one process, methods interleaved; the loop is the paper's way, `vmap(grad)` PyTorch's own, Opacus
and BackPACK what others use. Each method's norms are compared with the loop's. The growth of the
cost with batch, image size and depth goes into a figure.
"""

import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure

from benchmarks.cost.peers import METHODS, Norms, ours, plain
from benchmarks.harness.measurement import claim, conclude, machine, peak_mebibytes, ratios, seconds
from benchmarks.harness.models import MODELS, QUICK, Benchmark, made, small_unet
from ood_monitor.adapters.base import checked_terms

Rows = dict[str, dict[str, Any]]

GROWTH: dict[str, list[int]] = {
    "batch": [1, 2, 4, 8, 16, 32],
    "size": [16, 32, 64],
    "depth": [1, 2, 4],
}


def measured(benchmark: Benchmark, rounds: int, device: str) -> dict[str, Any]:
    """Of one model: each method's time and memory ratio, and how many tensors it gets wrong."""
    adapter, batch = made(benchmark.make, device)
    unit, runs, found = plain(adapter, batch), {}, {}
    exact = METHODS["loop"](adapter, batch)()
    for name, method in METHODS.items():
        try:
            run = method(adapter, batch)
            found[name] = {"wrong": wrong(run(), exact), "of": len(exact)}
            runs[name] = run
        except Exception as error:
            found[name] = {"fails": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    suffixes = {
        name: ours(layers=patterns)(adapter, batch)
        for name, (patterns, _) in benchmark.suffixes.items()
    }
    unit()
    adapter.module.zero_grad()  # its gradients are part of what it costs
    memory = peak_mebibytes(unit)
    adapter.module.zero_grad()
    for name, ratio in ratios(unit, runs | suffixes, rounds).items():
        run = (runs | suffixes)[name]
        figures = {"time": round(ratio, 3), "memory": round(peak_mebibytes(run) / memory, 2)}
        found[name] = found.get(name, {}) | figures
    plain_seconds = statistics.median(seconds(unit) for _ in range(3))
    return {"plain": {"seconds": round(plain_seconds, 3), "MiB": round(memory)}} | found


def wrong(norms: Norms, exact: Norms) -> int:
    """Tensors whose norms are off by a hundredth, of those above rounding."""
    largest = max(float(values.max()) for values in exact.values())
    return sum(
        name not in norms
        or norms[name].shape != values.shape
        or not torch.allclose(norms[name], values, rtol=1e-2, atol=1e-10 * largest)
        for name, values in exact.items()
    )


def claims(name: str, row: dict[str, Any], benchmark: Benchmark) -> list[dict[str, Any]]:
    own = row["ours"]
    peers = {
        k: v["time"] for k, v in row.items() if k in METHODS and "ours" not in k and "time" in v
    }
    fastest = min(peers, key=peers.__getitem__)
    return [
        claim(f"{name}: time", own["time"], benchmark.target),
        claim(f"{name}: peak memory", own["memory"], 1.5),
        claim(f"{name}: beside the fastest peer, {fastest}", own["time"], peers[fastest]),
        *(
            claim(f"{name}: {suffix}", row[suffix]["time"], target)
            for suffix, (_, target) in benchmark.suffixes.items()
        ),
    ]


def growth(rounds: int, device: str) -> dict[str, dict[int, float]]:
    """Time ratio of the small UNet as one thing grows; B = 8 where it is not the batch."""
    found: dict[str, dict[int, float]] = {}
    for what, sizes in GROWTH.items():
        for size in sizes:
            adapter, batch = made(partial(small_unet, **({"batch": 8} | {what: size})), device)
            run = ours()(adapter, batch)
            run()
            ratio = ratios(plain(adapter, batch), {"ours": run}, rounds)["ours"]
            found.setdefault(what, {})[size] = round(ratio, 3)
    return found


def terms(rounds: int, device: str) -> dict[str, float]:
    """Time of a Glow's terms, one backward pass each, beside that of their sum."""
    adapter, batch = made(MODELS["Glow, B = 8"].make, device)
    apart = ours()(type(adapter)(adapter.module), batch)
    apart()
    count = len(dict(checked_terms(type(adapter)(adapter.module), batch)))
    ratio = ratios(plain(adapter, batch), {"terms": apart}, rounds)["terms"]
    return {"terms": count, "time": round(ratio, 3), "time per term": round(ratio / count, 3)}


def figure(growth: dict[str, dict[int, float]]) -> Figure:
    drawing = Figure(figsize=(9, 2.8), layout="constrained")
    labels = {"batch": "batch", "size": "image size (pixels)", "depth": "layers per block"}
    for axes, (what, found) in zip(
        drawing.subplots(1, 3, sharey=True), growth.items(), strict=True
    ):
        axes.plot(list(found), list(found.values()), "o-")
        axes.set(xlabel=labels[what], xscale="log", xticks=list(found))
        axes.set_xticks(list(found), map(str, found))
        axes.minorticks_off()
        axes.axhline(1, color="grey", linewidth=0.8)
    drawing.axes[0].set(ylabel="time / plain pass", ylim=(0, None))
    return drawing


def table(rows: Rows) -> str:
    lines = []
    for name, row in rows.items():
        lines.append(f"\n{name}: plain pass {row['plain']['seconds']} s, {row['plain']['MiB']} MiB")
        for method, figures in row.items():
            if "fails" in figures:
                lines.append(f"  {method:26s} fails: {figures['fails'][:70]}")
            elif "time" in figures:
                off = f"{figures['wrong']} of {figures['of']} wrong" if figures.get("wrong") else ""
                lines.append(
                    f"  {method:26s} {figures['time']:5.2f}  {figures['memory']:5.2f}  {off}"
                )
    return "\n".join(lines)


def main(
    quick: Annotated[
        bool, typer.Option(help="Two rounds, and no more than two small models.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where, such as cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
    figure_path: Annotated[
        Path | None, typer.Option("--figure", help="Where to draw growth.")
    ] = None,
) -> None:
    warnings.filterwarnings("ignore", message=".*backward hook|There is a performance drop")
    rounds, chosen = (2, QUICK) if quick else (3, MODELS)
    rows: Rows = {}
    for name, benchmark in chosen.items():
        rows[name] = measured(benchmark, rounds, device)
        typer.echo(table({name: rows[name]}))
    report = {
        "machine": machine(),
        "rows": rows,
        "terms of Glow": {} if quick else terms(rounds, device),
        "growth of the small UNet": {} if quick else growth(rounds, device),
        "claims": [c for name, row in rows.items() for c in claims(name, row, chosen[name])],
    }
    conclude(report, output)
    if figure_path is not None and not quick:
        figure(report["growth of the small UNet"]).savefig(figure_path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
