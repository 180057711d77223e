"""Whether layer-wise gradient norms detect out-of-distribution text, which the paper leaves open.

Trains a small causal model of bytes (GPT-2's architecture, random initial weights) on Shakespeare,
then scores single windows of 128 bytes of other languages, of program code, and of the same text
rearranged. Every set is written in bytes that the training text has, so no byte gives it away.

A full run takes half an hour on one core; with `--steps 999` it repeats the committed one:
`python -m benchmarks.detection.text --data-dir FOLDER`.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

import numpy as np
import torch
import transformers
import typer
from torch import Tensor
from tqdm.auto import tqdm

import ood_monitor as om
from benchmarks.detection import protocol
from benchmarks.detection.corpora import (
    LENGTH,
    Bytes,
    Counts,
    Samples,
    Texts,
    samples,
    shipped_texts,
    stored_texts,
)
from benchmarks.detection.forward import fitted
from benchmarks.harness.measurement import claim, conclude, machine
from ood_monitor.adapters.base import checked_terms
from ood_monitor.calibration import ConformalPValue
from ood_monitor.densities import Array, Density
from ood_monitor.densities.baselines import LowLikelihood, TotalNorm, Typicality
from ood_monitor.densities.features import LogNorms, layer_of, table
from ood_monitor.densities.parts import Method
from ood_monitor.detector.plan import planned
from ood_monitor.gradients import terms_and_norms

BATCH = 32
DEFAULT = "ShrunkGaussian"


@dataclass(frozen=True)
class Size:
    """Of the model and of the sets of windows."""

    layers: int
    width: int
    counts: Counts


FULL = Size(layers=4, width=128, counts=Counts(held_out=500, test=400, ood=300))
QUICK = Size(layers=2, width=16, counts=Counts(held_out=80, test=40, ood=30))


@dataclass(frozen=True)
class Measured:
    """N windows.

    Attributes:
        windows: Their bytes, (N, 128).
        log_p: Log-likelihoods (N,) in nats.
        moments: Of each byte but the first its log p, and mean and variance of the log p of what
            the model expected in its place, (N, 127, 3) in nats.
        names: Of the features.
        norms: Squared norms by row (N, F).
    """

    windows: Bytes
    log_p: Array
    moments: Array
    names: tuple[str, ...]
    norms: Array

    def rows(self, chosen: slice) -> "Measured":
        """Some of the windows."""
        own = self.windows[chosen], self.log_p[chosen], self.moments[chosen]
        return Measured(*own, self.names, self.norms[chosen])

    def columns(self, prefix: str) -> "Measured":
        """The features whose layer starts so."""
        names = tuple(name for name in self.names if layer_of(name).startswith(prefix))
        kept = [name in set(names) for name in self.names]
        return Measured(self.windows, self.log_p, self.moments, names, self.norms[:, kept])

    def by_tensor(self) -> "Measured":
        """A parameter's squared norm is the sum of those of its rows."""
        layers = tuple(dict.fromkeys(map(layer_of, self.names)))
        owner = np.array([layers.index(layer_of(name)) for name in self.names])
        starts = np.searchsorted(owner, range(len(layers)))
        norms = np.add.reduceat(self.norms, starts, axis=1)
        return Measured(self.windows, self.log_p, self.moments, layers, norms)


Score: TypeAlias = Callable[[Measured], Array]
Fit: TypeAlias = Callable[[Measured], dict[str, Score]]


def adapter(size: Size) -> om.SequenceLikelihood:
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return om.SequenceLikelihood(transformers.GPT2LMHeadModel(config))


def nats_per_byte(model: om.SequenceLikelihood, tokens: Tensor) -> Tensor:
    terms = [value for _, value in checked_terms(model, tokens)]
    return -torch.stack(terms).mean() / (tokens.shape[1] - 1)


def trained(size: Size, text: bytes, steps: int, seed: int) -> om.SequenceLikelihood:
    """AdamW, warm-up and cosine decay, on windows at random places."""
    torch.manual_seed(seed)
    model = adapter(size)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 12, steps)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    for _ in tqdm(range(steps), desc="training", unit="step", disable=None):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1))
        optimizer.zero_grad()
        loss = nats_per_byte(model, data[starts + torch.arange(LENGTH)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.module.eval()
    return model


def steps_in(minutes: float, size: Size, text: bytes) -> int:
    """Steps that fit into so many minutes on this machine, by the time that 20 of them take."""
    trained(size, text, 3, 0)
    start = time.perf_counter()
    trained(size, text, 20, 0)
    return max(20, int(60 * minutes * 20 / (time.perf_counter() - start)))


def measured(model: om.SequenceLikelihood, found: Bytes) -> Measured:
    """Each window by itself; a batch of them only saves time."""
    log_p, moments, tables = [], [], []
    tokens = torch.from_numpy(found.astype(np.int64))
    for start in range(0, len(tokens), 50):
        result = terms_and_norms(model, tokens[start : start + 50], granularity="row")
        tables.append(table(result.norms))
        moments.append(moments_of(model, tokens[start : start + 50]))
        log_p.append(result.log_likelihood["log_likelihood"].double().numpy())
    norms = np.concatenate([array for _, array in tables])
    own = np.concatenate(log_p), np.concatenate(moments)
    return Measured(found, *own, tables[0][0], norms)


@torch.no_grad()
def moments_of(model: om.SequenceLikelihood, tokens: Tensor) -> Array:
    """Of a batch (B, 128): what :class:`Measured` says of moments, (B, 127, 3)."""
    log_p = model.module(tokens).logits[:, :-1].double().log_softmax(-1)
    own, p = log_p.gather(-1, tokens[:, 1:, None])[..., 0], log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    found: Array = torch.stack([own, mean, variance], -1).numpy()
    return found


def curvature(of: Measured) -> Array:
    """By how many deviations a window is less likely than what was expected in its place."""
    own, mean, variance = of.moments.sum(1).T
    found: Array = (mean - own) / np.sqrt(variance)
    return found


def least_likely(of: Measured, share: float = 0.2) -> Array:
    """The mean of the same by byte, over the share of bytes that have most."""
    own, mean, variance = np.moveaxis(of.moments, -1, 0)
    deviations = np.sort((mean - own) / np.sqrt(variance + 1e-12), axis=1)
    found: Array = deviations[:, -max(1, round(share * deviations.shape[1])) :].mean(1)
    return found


def zlib_bits(of: Measured) -> Array:
    return np.array([8.0 * len(zlib.compress(window.tobytes(), 9)) for window in of.windows])


def baselines(fit: Measured) -> dict[str, Score]:
    """Scores without gradients; that of Serra et al. is -log2 p less a compressor's bits.

    Fast-DetectGPT's is the curvature, of the model itself in place of a second one; Min-K%++ takes
    a fifth of the bytes. Both were made to tell what a machine has written or was trained on: here
    the less of it, the odder.

    References:
        Input complexity and out-of-distribution detection with likelihood-based generative models
        (Serrà et al., 2020), https://arxiv.org/abs/1909.11480
        Fast-DetectGPT (Bao et al., 2023), https://arxiv.org/abs/2310.05130
        Min-K%++ (Zhang et al., 2024), https://arxiv.org/abs/2404.02936
    """
    low, typicality = LowLikelihood(), Typicality().fit(fit.log_p)
    counts = np.bincount(fit.windows.ravel(), minlength=256) + 1  # a byte not seen is possible
    byte_nats = -np.log(counts / counts.sum())
    return {
        "byte frequencies": lambda m: byte_nats[m.windows].sum(1),
        "zlib": zlib_bits,
        "-log p": lambda m: low.score(m.log_p),
        "-log p less zlib": lambda m: low.score(m.log_p) / math.log(2) - zlib_bits(m),
        "typicality": lambda m: typicality.score(m.log_p),
        "Fast-DetectGPT": curvature,
        "Min-K%++": least_likely,
    }


def gradient_scores(fit: Measured) -> dict[str, Score]:
    """Those of the library."""
    log_norms = LogNorms.fit(fit.names, fit.norms, torch.finfo(torch.float32).eps)
    features = log_norms(fit.norms)
    densities: dict[str, Density] = {
        "DiagonalGaussian": om.DiagonalGaussian(),
        DEFAULT: om.ShrunkGaussian(),
        "Ledoit-Wolf": om.ShrunkGaussian("ledoit_wolf"),
        "Maximum": om.Maximum(),
    }
    fitted = {name: density.fit(features).score for name, density in densities.items()}
    scores = {"total norm": TotalNorm().score} | fitted
    return {name: on_logs(score, log_norms) for name, score in scores.items()}


def on_logs(score: Callable[[Array], Array], log_norms: LogNorms) -> Score:
    return lambda m: score(log_norms(m.norms))


def compared(model: om.SequenceLikelihood, of: Samples, size: Size) -> list[dict[str, Any]]:
    """A row per method and kind of feature."""
    held_out, test = measured(model, of.held_out), measured(model, of.test)
    ood = {name: measured(model, found) for name, found in of.ood.items()}
    last = f"log_likelihood/transformer.h.{size.layers - 1}."
    kinds: dict[str, tuple[Fit, Callable[[Measured], Measured]]] = {
        "none": (baselines, lambda m: m),
        "tensor": (gradient_scores, Measured.by_tensor),
        "row, last block": (gradient_scores, lambda m: m.columns(last)),
        "row": (gradient_scores, lambda m: m),
    }
    rows = [
        row
        for kind, (fit, view) in kinds.items()
        for row in evaluated(
            kind, fit, view(held_out), view(test), {k: view(m) for k, m in ood.items()}
        )
    ]
    return [*rows, *of_detectors(model, of)]


def of_detectors(model: om.SequenceLikelihood, of: Samples) -> Iterator[dict[str, Any]]:
    """A row for each method of a detector, fitted on the same half."""
    windows = {"held out": of.held_out, "test": of.test} | of.ood
    tokens = {name: torch.from_numpy(found.astype(np.int64)) for name, found in windows.items()}
    for method in get_args(Method):
        detector = om.Detector(model, method=method, chunk_size=50)
        found = {name: detector.measure(each) for name, each in tokens.items()}
        half = len(of.held_out) // 2
        plan = planned(found["held out"].sample, method, None, None)
        joined = fitted(plan, found["held out"].take(range(half)))
        scores = {name: joined.score(it) for name, it in found.items()}
        yield row(method, "detector", {"calibration": scores.pop("held out")[half:]} | scores)


def evaluated(
    kind: str, fit: Fit, held_out: Measured, test: Measured, ood: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """Methods fitted on a half of the held-out windows, which are in random order."""
    half = len(held_out.log_p) // 2
    sets = {"calibration": held_out.rows(slice(half, None)), "test": test, **ood}
    return [
        row(method, kind, {name: score(m) for name, m in sets.items()})
        for method, score in fit(held_out.rows(slice(half))).items()
    ]


def row(method: str, features: str, scores: Mapping[str, Array]) -> dict[str, Any]:
    """What `protocol` reports of these scores, and the share of false alarms at .05."""
    alarms = round(false_alarms(scores["calibration"], scores["test"]), 3)
    case = {"method": method, "features": features, "false alarms at .05": alarms}
    return case | protocol.judged(scores)


def false_alarms(calibration: Array, test: Array, level: float = 0.05) -> float:
    """Share of in-distribution test windows with a conformal p-value of at most the level."""
    return float(np.mean(ConformalPValue.fit(calibration).p_value(test) <= level))


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the default: single windows, features by tensor.

    The test windows come later in the text than those that calibrate: not quite exchangeable.
    """
    chosen = {(row["method"], row["features"]): row for row in rows}
    default = chosen[DEFAULT, "tensor"]
    others = {
        "the best method's": max(row["mean"] for row in rows),
        "-log p's": chosen["-log p", "none"]["mean"],
        "typicality's": chosen["typicality", "none"]["mean"],
        "the paper's density's": chosen["DiagonalGaussian", "tensor"]["mean"],
    }
    forward = chosen["forward", "detector"]["mean"]
    text = "mean AUROC of the default density of gradient norms short of"
    found = [
        claim(f"{text} {name}", round(mean - default["mean"], 4), 0.01)
        for name, mean in others.items()
    ]
    found.append(
        claim("1 - mean AUROC of the detector's default, forward", round(1 - forward, 4), 0.03)
    )
    text = "false alarms of the default density at .05, later in the text than calibrated"
    return [*found, claim(text, default["false alarms at .05"], 0.08)]


def shown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["auroc"])
    lines = [f"{i}: {name}" for i, name in enumerate(names, 1)]
    lines.append(
        f"{'AUROC':34s}" + "".join(f"{i:6d}" for i in range(1, len(names) + 1)) + "   mean"
    )
    for row in rows:
        figures = "".join(f"{value:6.2f}" for value in (*row["auroc"].values(), row["mean"]))
        lines.append(f"{row['method']:18s}{row['features']:16s}{figures}")
    return "\n".join(lines)


def report(texts: Texts, size: Size, steps: int, seed: int) -> dict[str, Any]:
    """Trains on nine tenths of the training text; the last tenth fits and calibrates."""
    cut = len(texts.train) * 9 // 10
    start = time.perf_counter()
    model = trained(size, texts.train[:cut], steps, seed)
    taken = round(time.perf_counter() - start)
    of = samples(texts, texts.train[cut:], size.counts, seed)
    rows = compared(model, of, size)
    with torch.no_grad():
        tokens = torch.from_numpy(of.test.astype(np.int64))
        nats = float(nats_per_byte(model, tokens))
    return {
        "machine": machine(),
        "model": {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "steps": steps,
            "seed": seed,
            "training seconds": taken,
            "test nats per byte": round(nats, 4),
            "test bits per byte": round(nats / math.log(2), 4),
        },
        "rows": rows,
        "claims": claims(rows),
    }


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder of text_bytes.npz.")] = Path(
        "../shared/data"
    ),
    minutes: Annotated[float, typer.Option(help="Of training.", min=0)] = 10,
    steps: Annotated[
        int | None, typer.Option(help="Of training, instead: repeats a run.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, batches and windows.")] = 0,
    quick: Annotated[
        bool, typer.Option(help="A tiny model and text that Python ships; says nothing of quality.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    size, texts = (QUICK, shipped_texts()) if quick else (FULL, stored_texts(data_dir))
    if steps is None:
        steps = 20 if quick else steps_in(minutes, size, texts.train)
    found = report(texts, size, steps, seed)
    typer.echo("  ".join(f"{name}: {value}" for name, value in found["model"].items()))
    typer.echo(shown(found["rows"]))
    conclude(found, output)


if __name__ == "__main__":
    typer.run(main)
