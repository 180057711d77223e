"""Whether the cost function picks the faster exact form of each layer's norms, and at what cost.

Times the direct and the Gram form of convolutions and linear maps of many sizes; the *regret* is
the time of the form picked in units of the faster one.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.harness.measurement import claim, conclude, machine, seconds
from ood_monitor.gradients import factors
from ood_monitor.gradients.rules import RULES

#: Batch, input and output channels, image size, kernel, stride.
CONVOLUTIONS = [
    (8, 3, 128, 32, 3, 1),
    (8, 128, 128, 32, 3, 1),
    (8, 256, 256, 16, 3, 1),
    (8, 512, 256, 16, 3, 1),
    (8, 256, 256, 8, 3, 1),
    (8, 256, 256, 4, 3, 1),
    (32, 32, 32, 32, 3, 1),
    (32, 64, 64, 16, 3, 1),
    (32, 128, 64, 16, 3, 1),
    (32, 64, 64, 8, 3, 1),
    (8, 6, 512, 16, 3, 1),
    (8, 512, 12, 16, 3, 1),
    (8, 128, 128, 32, 3, 2),
    (8, 256, 256, 16, 3, 2),
    (32, 64, 64, 16, 3, 2),
    (8, 512, 512, 16, 1, 1),
    (8, 256, 512, 8, 1, 1),
]

#: Batch, positions, inputs, outputs.
LINEAR = [
    (8, 1, 512, 256),
    (8, 64, 256, 256),
    (8, 128, 384, 1536),
    (8, 256, 128, 128),
    (8, 512, 384, 384),
    (32, 16, 64, 64),
]


def convolution(n: int, c: int, r: int, size: int, k: int, s: int) -> dict[str, Any]:
    x, weight = torch.randn(n, c, size, size), torch.randn(r, c, k, k)
    arguments = {"input": x, "weight": weight, "stride": s, "padding": k // 2}
    g = torch.randn_like(F.conv2d(x, weight, None, s, k // 2))
    return compared(f"conv {k}x{k}/{s}, {c} to {r} at {size}, B = {n}", torch.conv2d, g, arguments)


def linear(n: int, t: int, c: int, r: int) -> dict[str, Any]:
    arguments = {"input": torch.randn(n, t, c), "weight": torch.randn(r, c)}
    g = torch.randn(n, t, r)
    return compared(f"linear, {c} to {r} at {t}, B = {n}", F.linear, g, arguments)


def compared(name: str, operation: Any, g: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each form, the one picked, and its regret."""

    def norms() -> Tensor:
        return RULES[operation].factors(len(g), g, arguments)["weight"].row_norms()

    picked: list[bool] = []
    choice = factors.gram_is_cheaper
    with patch.object(factors, "gram_is_cheaper", lambda *sizes: picked.append(choice(*sizes))):
        norms()
    taken = {}
    for form in ("direct", "gram"):
        with patch.object(factors, "gram_is_cheaper", lambda *sizes, form=form: form == "gram"):
            norms()
            taken[form] = 1e3 * statistics.median(seconds(norms) for _ in range(7))
    chosen = "gram" if picked[0] else "direct"
    regret = taken[chosen] / min(taken.values())
    milliseconds = {form: round(value, 2) for form, value in taken.items()}
    return {"layer": name} | milliseconds | {"picked": chosen, "regret": round(regret, 2)}


def main(
    quick: Annotated[bool, typer.Option(help="A few sizes only.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.manual_seed(0)
    rows = [convolution(*sizes) for sizes in CONVOLUTIONS[-3 if quick else 0 :]]
    rows += [linear(*sizes) for sizes in LINEAR[-3 if quick else 0 :]]
    regrets = [row["regret"] for row in rows]
    report = {
        "machine": machine(),
        "rows": rows,
        "claims": [
            claim("regret, mean", round(statistics.mean(regrets), 3), 1.05),
            claim("regret, largest", max(regrets), 1.5),
        ],
    }
    for row in rows:
        typer.echo("  ".join(f"{value}" for value in row.values()))
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
