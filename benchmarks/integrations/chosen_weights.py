"""What it costs to calibrate on the data that have chosen the weights.

Glows are trained on some of scikit-learn's digits; of the weights after each epoch those are kept
whose loss on validation digits is least. One detector is calibrated on these validation digits,
one on others that nothing was chosen by, and both judge new digits, over random splits.

    python -m benchmarks.integrations.chosen_weights --json benchmarks/results/chosen_weights.json
"""

import copy
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor

import ood_monitor as om
from benchmarks.harness.measurement import claim, conclude, machine

FPR, SPLITS, EPOCHS = 0.05, 20, 20
SIZES = {"train": 500, "validation": 400, "others": 400}

#: By how much the mean rate may be above the nominal one; its standard error is about a third.
MOST = 0.015


def main(
    quick: Annotated[bool, typer.Option(help="Two splits and epochs only.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    splits, epochs = (2, 2) if quick else (SPLITS, EPOCHS)
    runs = [judged(seed, epochs) for seed in range(splits)]
    rows = {of: summary([run[of] for run in runs]) for of in ("validation", "others")}
    for of, row in rows.items():
        typer.echo(f"calibrated on {of}: {row}")
    found = [
        claim(f"flagged at fpr={FPR}, calibrated on {of}", row["flagged, mean"], FPR + MOST)
        for of, row in rows.items()
    ]
    conclude({"machine": machine(), "rows": rows, "claims": found}, output)


def judged(seed: int, epochs: int) -> dict[str, float]:
    """The share of new digits that each detector flags."""
    digits, start = shuffled(seed), 0
    parts: dict[str, Tensor] = {}
    for name, size in SIZES.items():
        parts[name], start = digits[start : start + size], start + size
    adapter = om.LogLikelihood(chosen(parts["train"], parts["validation"], seed, epochs))
    rates = {}
    for name in ("validation", "others"):
        detector = om.Detector(adapter, explain=0).fit(parts[name].split(100), progress=False)
        rates[name] = float((detector.score(digits[start:]).p_value <= FPR).double().mean())
    return rates


def shuffled(seed: int) -> Tensor:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator)
    return ((images + noise) / 17)[torch.randperm(len(images), generator=generator)]


def chosen(train: Tensor, validation: Tensor, seed: int, epochs: int) -> om.models.Glow:
    """The weights, of those after each epoch, of the least loss on validation data."""
    torch.manual_seed(seed)
    flow = om.models.Glow(channels=1, size=8, levels=2, steps=2, hidden=32)
    optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3)
    best, least = copy.deepcopy(flow), float("inf")
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(50):
            optimiser.zero_grad()
            (-flow.log_prob(batch).mean()).backward()
            optimiser.step()
        with torch.no_grad():
            loss = float(-flow.eval().log_prob(validation).mean())
        flow.train()
        if loss < least:
            best, least = copy.deepcopy(flow), loss
    return best.eval()


def summary(rates: list[float]) -> dict[str, Any]:
    error = statistics.stdev(rates) / len(rates) ** 0.5
    return {"flagged, mean": round(statistics.mean(rates), 4), "its error": round(error, 4)}


if __name__ == "__main__":
    typer.run(main)
