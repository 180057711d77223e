"""What the Lightning callback adds to a training step and to a validation pass.

The training stream is on in every other step of one run, so that both kinds of step see the same
machine: the ratio of their medians is what it adds, and the time in its hook is told beside it.
Validation passes with and without scoring alternate. Networks have random weights.
"""

import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
import typer
from ood_monitor_integrations.lightning import OODMonitor
from torch import Tensor
from torch.utils.data import DataLoader

import ood_monitor as om
from benchmarks.detection.trained import SCHEDULE
from benchmarks.harness.measurement import Run, claim, conclude, machine, ratios
from benchmarks.harness.models import Case, made, small_unet
from ood_monitor.adapters.base import checked_terms
from ood_monitor.densities.parts import Method

#: What a step may cost with the training stream, and a validation pass, by method, with every batch
#: scored or one in ten.
TRAINING = 1.02
VALIDATION: dict[tuple[Method, int], float | None] = {
    ("forward", 1): 3.2,
    ("forward", 10): None,
    ("gradient_norms", 1): None,
    ("gradient_norms", 10): 1.6,
}

#: The same of a small net, and of a validation that is not watched.
SMALL = {
    "test, forward": 3.2,
    "test, gradient_norms": 6.0,
    "validation that is not watched": 1.05,
}

#: Samples that detectors are fitted on.
HELD_OUT = 320

#: Steps before those that count: the first allocate, and the stream warms up.
WARM_UP = 10


class Alternating(OODMonitor):
    """Looks at every other step, and times itself."""

    def __init__(self) -> None:
        super().__init__(watch=["train"], training=om.TrainingStream(warm_up=2, threshold=1e9))
        self.starts: list[float] = []
        self.spent: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.starts.append(time.perf_counter())
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if len(self.starts) % 2:
            start = time.perf_counter()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.spent.append(time.perf_counter() - start)


class Module(pl.LightningModule):
    """A denoiser of the benchmarks, trained and validated on its loss at one noise level."""

    def __init__(self, case: om.Adapter) -> None:
        super().__init__()
        self.model, self._case = case.module, case
        self._bound = om.DenoisingBound(self.model, SCHEDULE, levels=(50, 500))

    def adapter(self) -> om.Adapter:
        return self._bound

    def _loss(self, x: Tensor) -> Tensor:
        terms = [value.mean() for _, value in checked_terms(self._case, x)]
        return -torch.stack(terms).sum()

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self._loss(x)

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val/loss", self._loss(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-6)


def measured(case: Case, pairs: int, batches: int, rounds: int) -> dict[str, Any]:
    adapter, batch = case
    module = Module(adapter)
    training = step_times(module, batch, pairs)
    return training | validation_times(module, batch, batches, rounds)


def step_times(module: Module, batch: Tensor, pairs: int) -> dict[str, Any]:
    callback = Alternating()
    steps = 2 * pairs + WARM_UP + 1
    trainer(callback, max_steps=steps).fit(module, loader(batch, steps))
    times = [b - a for a, b in zip(callback.starts, callback.starts[1:], strict=False)][WARM_UP:]
    watched, plain = (statistics.median(times[start::2]) for start in (0, 1))
    spent = statistics.median(callback.spent[WARM_UP // 2 :])
    return {
        "parameter tensors": sum(1 for _ in module.parameters()),
        "plain step, seconds": round(plain, 4),
        "step with the training stream": round(watched / plain, 4),
        "its hook, share of a step": round(spent / plain, 4),
    }


def validation_times(module: Module, batch: Tensor, batches: int, rounds: int) -> dict[str, float]:
    # Alike, and all different: what is flagged too often is explained, in its own time.
    held_out, data = (drawn(count, batch) for count in (HELD_OUT // len(batch), batches))
    adapter = module.adapter()
    methods = dict.fromkeys(method for method, _ in VALIDATION)
    detectors = {method: om.Detector(adapter, method=method).fit(held_out) for method in methods}

    def validated(*callbacks: pl.Callback) -> None:
        trainer(*callbacks).validate(module, data, verbose=False)

    def scored(method: Method, every: int) -> None:
        # No alarm, whose explanation takes its own time.
        options: dict[str, Any] = {"fpr": 0.1, "ert": 1e12, "calibrate": "never", "console": False}
        options |= {"detector": detectors[method], "every_n_batches": every}
        validated(OODMonitor(watch=["val"], **options))

    runs = {told(*case): partial(scored, *case) for case in VALIDATION}
    validated()
    found = ratios(validated, runs, rounds)
    return {name: round(ratio, 3) for name, ratio in found.items()}


class Rows(pl.LightningModule):
    """A small net: half of twelve columns from the other half, by an affine coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        kept, moved = x.chunk(2, -1)
        scale, shift = self.net(kept).chunk(2, -1)
        scale = scale.tanh()
        z = torch.cat([kept, moved * scale.exp() + shift], -1)
        return -0.5 * z.square().sum(-1) + scale.sum(-1)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return -self.log_prob(x).mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("loss", -self.log_prob(x).mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def small_net(batches: int, rounds: int) -> dict[str, Any]:
    """Passes of a net that takes a fraction of a millisecond, where overhead is all there is."""
    module, data = Rows(), rows(32 * batches)
    adapter, held_out = om.LogLikelihood(module), torch.randn(600, 12).split(50)
    runs: dict[str, Run] = {}
    for method in ("forward", "gradient_norms"):
        detector = om.Detector(adapter, method=method).fit(held_out, progress=False)
        watch = partial(OODMonitor, watch=["test"], detector=detector, console=False, ert=1e9)
        runs[f"test, {method}"] = partial(run_test, module, data, watch)
    found = ratios(partial(run_test, module, data), runs, rounds)
    found["validation that is not watched"] = unwatched_validation(data, rounds)
    return {name: round(ratio, 3) for name, ratio in found.items()} | growth(data)


def rows(count: int) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(count, 12), batch_size=32)  # type: ignore[arg-type]


def run_test(module: Rows, data: DataLoader[Tensor], watch: Any = None) -> None:
    trainer(*([] if watch is None else [watch()])).test(module, data, verbose=False)


class Validations(pl.Callback):
    """Times the validations of a `fit`, those before the last, which calibrates."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def unwatched_validation(data: DataLoader[Tensor], rounds: int) -> float:
    """The median time of one in a `fit` with the callback, beside one without; they alternate."""
    plain, idle = Validations(), Validations()
    for _ in range(rounds):
        for callbacks in ((plain,), (idle, OODMonitor(progress=False))):
            run = trainer(*callbacks, max_epochs=4, num_sanity_val_steps=0)
            run.fit(Rows(), rows(32), data)
            callbacks[0].seconds.pop()
    return statistics.median(idle.seconds) / statistics.median(plain.seconds)


def growth(data: DataLoader[Tensor]) -> dict[str, int]:
    """Bytes that a detector adds to a checkpoint."""
    sizes = []
    for callbacks in ((), (OODMonitor(progress=False),)):
        with tempfile.TemporaryDirectory() as folder:
            run, path = trainer(*callbacks, max_epochs=1), Path(folder) / "it.ckpt"
            run.fit(Rows(), data, data)
            run.save_checkpoint(path)
            sizes.append(path.stat().st_size)
    return {"checkpoint, bytes": sizes[0], "the detector's, bytes": sizes[1] - sizes[0]}


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def loader(batch: Tensor, batches: int) -> DataLoader[Tensor]:
    noise = [
        batch + 0.01 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(i))
        for i in range(batches)
    ]
    return DataLoader(torch.cat(noise), batch_size=len(batch))  # type: ignore[arg-type]


def drawn(batches: int, batch: Tensor) -> DataLoader[Tensor]:
    """Random batches, none of them alike."""
    samples = torch.randn(batches * len(batch), *batch.shape[1:])
    return DataLoader(samples, batch_size=len(batch))  # type: ignore[arg-type]


def told(method: Method, every: int) -> str:
    return f"validation, {method}, {'every batch' if every == 1 else 'one batch in ten'} scored"


def claims_of_small_net(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [claim(f"small net: {what}", row[what], most) for what, most in SMALL.items()]


def claims(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    targets = {"step with the training stream": TRAINING}
    targets |= {told(*case): most for case, most in VALIDATION.items() if most is not None}
    return [claim(f"{name}: {what}", row[what], target) for what, target in targets.items()]


def main(
    quick: Annotated[bool, typer.Option(help="A few steps of a small network only.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases = {"small UNet, B = 8": partial(small_unet, batch=8, size=16)}
    pairs, batches, rounds = 5, 20, 1
    if not quick:
        cases |= {"small UNet, B = 32": small_unet}
        pairs, batches, rounds = 60, 20, 2
    rows = {name: measured(made(make), pairs, batches, rounds) for name, make in cases.items()}
    found = [c for name, row in rows.items() for c in claims(name, row)]
    small = small_net(*((20, 1) if quick else (200, 3)))
    rows["small net, B = 32"] = small
    report = {"machine": machine(), "rows": rows, "claims": found + claims_of_small_net(small)}
    for name, row in rows.items():
        typer.echo(f"{name}: {row}")
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
