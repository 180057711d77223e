"""Time of `gradient_norms` as a multiple of one plain batched forward + backward pass.

In one process, methods interleaved, medians of ratios to the plain pass of the same round. The loop
is the paper's way; `vmap(grad)` is PyTorch's own for per-sample gradients.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ood_monitor as om
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.gradients.scoring import undisturbed

Run = Callable[[], object]


class Denoising(om.Adapter):
    """One noise level without noise: the cost of a diffusion term, and nothing beside it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def log_likelihood(self, batch: Tensor) -> list[tuple[str, Tensor]]:
        t = torch.full_like(batch[:, 0, 0, 0], 50, dtype=torch.long)
        return [("t=50", -(self.module(batch, t).sample - batch).square().flatten(1).sum(1))]


def small_unet() -> tuple[om.Adapter, Tensor]:
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return Denoising(unet.eval()), torch.randn(32, 1, 32, 32)


def glow() -> tuple[om.Adapter, Tensor]:
    flow = om.models.Glow(channels=3, size=16, levels=2, steps=4, hidden=64).eval()
    return om.LogLikelihood(flow, lambda flow, x: flow.log_prob(x)), torch.randn(16, 3, 16, 16)


MODELS = {"small UNet, B = 32": small_unet, "Glow, one term, B = 16": glow}


def plain(adapter: om.Adapter, batch: Tensor) -> None:
    """One training step's forward and backward pass."""
    adapter.module.zero_grad()
    sum(value.sum() for _, value in adapter.log_likelihood(batch)).backward()  # type: ignore[union-attr]


def loop(adapter: om.Adapter, batch: Tensor) -> None:
    with undisturbed(adapter.module):
        loop_norms(adapter, batch, len(batch), lambda name: True)


def vmapped(adapter: om.Adapter, batch: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in adapter.module.named_parameters()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = adapter.module

        def forward(self, x: Tensor) -> Tensor:
            return sum(value.sum() for _, value in adapter.log_likelihood(x))  # type: ignore[return-value]

    wrapped = Wrapped()

    def total(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"module.{name}": value for name, value in weights.items()}
        return functional_call(wrapped, named, (x.unsqueeze(0),))

    gradients = vmap(grad(total), in_dims=(None, 0))(parameters, batch)
    return {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(adapter: om.Adapter, batch: Tensor, rounds: int) -> dict[str, float]:
    methods: dict[str, Run] = {
        "ours": lambda: om.gradient_norms(adapter, batch),
        "ours, by row": lambda: om.gradient_norms(adapter, batch, granularity="row"),
        "loop": lambda: loop(adapter, batch),
        "vmap(grad)": lambda: vmapped(adapter, batch),
    }
    for run in methods.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        base = seconds(lambda: plain(adapter, batch))
        for name, run in methods.items():
            found[name].append(seconds(run) / base)
    return {name: statistics.median(values) for name, values in found.items()}


def main(
    quick: Annotated[bool, typer.Option(help="Three rounds instead of nine.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.manual_seed(0)
    rows = {name: ratios(*make(), 3 if quick else 9) for name, make in MODELS.items()}
    claims = [
        {
            "claim": f"{name}: faster than the loop and vmap(grad)",
            "value": row["ours"],
            "target": min(row["loop"], row["vmap(grad)"]),
            "holds": row["ours"] < min(row["loop"], row["vmap(grad)"]),
        }
        for name, row in rows.items()
    ]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    text = json.dumps({"machine": machine, "rows": rows, "claims": claims}, indent=2)
    typer.echo(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
