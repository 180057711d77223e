"""What a pipeline's own last steps tell of how its samples were made, at no pass more.

Class-conditional pipelines on latents, whose weights are committed, with guidance. Detectors are
fitted on their own normal samples, and told broken ones: weights disturbed, other numbers of steps,
other guidance, a LoRA of other images. All methods see the same samples.

    python -m benchmarks.integrations.own_calls --json benchmarks/results/own_calls.json
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from ood_monitor_integrations.diffusers import replayed_bound
from ood_monitor_integrations.diffusers.own_calls import STEPS
from ood_monitor_integrations.diffusers.recorded_call import record_call
from peft import LoraConfig, inject_adapter_in_model
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import kinds, trained, zoo
from benchmarks.harness.measurement import claim, reported

Row = dict[str, Any]
State = Mapping[str, Tensor]

MODELS = ("latent, epsilon", "latent, v")

#: Samples of one call, what it is usually called with, and labels that are drawn.
AT_ONCE, LABELS = 50, 10
USUAL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}

#: Parts or methods of the detectors that are compared, and the faults that a claim is of.
DETECTORS: dict[str, dict[str, Any]] = {
    "own calls": {"parts": ["own_calls"]},
    "default": {},
    "default and own calls": {"parts": ["output_layer", "energies", "own_calls"]},
    "gradient norms": {"method": "gradient_norms"},
}
OF_CALLS = ("10 steps", "5 steps", "guidance 4", "guidance 7.5")


class LabelledPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Latents of labels, guided."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Samples (B, C, H, W)."""
        self.scheduler.set_timesteps(num_inference_steps)
        config, count = self.unet.config, len(class_labels)
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=generator)
        labels = torch.cat([torch.full_like(class_labels, kinds.NONE), class_labels])
        for t in self.scheduler.timesteps:
            none, given = self.unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
            told = none + guidance_scale * (given - none)
            x = self.scheduler.step(told, t, x).prev_sample
        return ImagePipelineOutput(images=x.numpy())


@dataclass(frozen=True)
class Fault:
    """How samples are made otherwise than normal ones: by other weights, by another call."""

    weights: State | None = None
    call: dict[str, Any] = field(default_factory=dict)


def pipeline(kind: kinds.Kind, name: str) -> Any:
    network, _ = zoo.load(kinds.watched(kind, lambda x: x), kinds.weights_file(name))
    return LabelledPipeline(network.eval(), cast(Any, DDIMScheduler)(prediction_type=kind.predicts))


def made(
    pipe: Any, adapter: Any, count: int, seed: int, calls: Mapping[str, Any]
) -> list[dict[str, Tensor]]:
    """Batches of as many samples, and what was seen of the calls that made them."""
    batches = []
    for i in range(-(-count // AT_ONCE)):
        draws = torch.Generator().manual_seed(1_000 * seed + i)
        labels = torch.randint(LABELS, (min(AT_ONCE, count - i * AT_ONCE),), generator=draws)
        arguments = {"class_labels": labels} | calls
        found = record_call(pipe, arguments, 1_000 * seed + i, "whole", kept=STEPS)
        batches.append(adapter.batch(found.call, found.count))
    return batches


def faults(kind: kinds.Kind, network: nn.Module, steps: int) -> Iterator[tuple[str, Fault]]:
    """None, for what chance alone does, and others; the LoRA is trained for so many steps."""
    yield "none", Fault()
    for share in (0.01, 0.03, 0.1):
        yield f"weights disturbed by {share:.0%}", Fault(disturbed(network, share))
    for few in (10, 5):
        yield f"{few} steps", Fault(call={"num_inference_steps": few})
    for scale in (4.0, 7.5):
        yield f"guidance {scale:g}", Fault(call={"guidance_scale": scale})
    yield "a LoRA of digits", Fault(with_lora(kind, network, steps))


def disturbed(network: nn.Module, share: float) -> State:
    """Weights with noise, as a share of the deviation of each tensor's."""
    draws = torch.Generator().manual_seed(0)
    return {
        name: value + share * value.std(correction=0) * torch.randn(value.shape, generator=draws)
        for name, value in network.state_dict().items()
    }


def with_lora(kind: kinds.Kind, network: nn.Module, steps: int) -> State:
    """Weights into which a LoRA of rank 4 is fused, trained on digits."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    tuned: Any = inject_adapter_in_model(config, copy.deepcopy(network).train())
    images = digits()
    labels = torch.zeros(len(images), dtype=torch.int64)
    data = kinds.with_labels(images, labels)
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 3e-3)
    for _ in range(steps):
        rows = data[torch.randint(len(data), (64,))]
        optimiser.zero_grad()
        kinds.denoising(kind, tuned, rows).backward()
        optimiser.step()
    weights = dict(network.state_dict())
    for name, part in tuned.named_modules():
        if hasattr(part, "get_delta_weight"):
            key = f"{name}.weight"
            weights[key] = weights[key] + part.get_delta_weight("default").detach()
    return weights


@torch.no_grad()
def digits() -> Tensor:
    """Latents of scikit-learn's, in units of their deviation."""
    vae, _ = zoo.load(kinds.watched_autoencoder(), kinds.weights_file(kinds.AUTOENCODER))
    images = F.interpolate(trained.signed(trained.digits().train), 32, mode="bilinear")
    latents = torch.cat([cast(Any, vae).encode(p).latent_dist.mean for p in images.split(100)])
    return latents / latents.std()


@contextmanager
def weights_of(network: nn.Module, weights: State | None) -> Iterator[None]:
    """The network with other weights within the block."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(dict(weights or own))
    try:
        yield
    finally:
        network.load_state_dict(own)


def scored(detector: om.Detector, batches: list[dict[str, Tensor]]) -> np.ndarray:
    found = [detector.score(batch).score for batch in batches]
    return torch.cat(found).numpy()


def rows(name: str, fit: int, test: int, calls: Mapping[str, Any], steps: int) -> Iterator[Row]:
    """A row for each fault of a model: AUROC of its samples against normal ones."""
    torch.manual_seed(0)
    kind = kinds.kinds()[name]
    pipe = pipeline(kind, name)
    labels = {"class_labels": torch.arange(LABELS)}
    adapter = replayed_bound(pipe, call=labels | calls)
    held_out = made(pipe, adapter, fit, 1, calls)
    detectors = {
        each: om.Detector(adapter, explain=0, **options).fit(held_out, progress=False)
        for each, options in DETECTORS.items()
    }
    unseen = made(pipe, adapter, test, 2, calls)
    normal = {each: scored(detector, unseen) for each, detector in detectors.items()}
    for fault, broken in faults(kind, pipe.unet, steps):
        with weights_of(pipe.unet, broken.weights):
            batches = made(pipe, adapter, test, 3, {**calls, **broken.call})
            odd = {each: scored(detector, batches) for each, detector in detectors.items()}
        truth = np.repeat([0, 1], test)
        aurocs = {
            each: round(float(roc_auc_score(truth, np.concatenate([normal[each], odd[each]]))), 4)
            for each in detectors
        }
        yield {"model": name, "fault": fault, "samples": test, "auroc": aurocs}


def claims(found: list[Row]) -> list[Row]:
    """That calls otherwise made are seen, better than without, and that chance is not."""

    def mean(detector: str, of: tuple[str, ...]) -> float:
        values = [row["auroc"][detector] for row in found if row["fault"] in of]
        return round(float(np.mean(values)), 4)

    alone, default = mean("own calls", OF_CALLS), mean("default", OF_CALLS)
    together = mean("default and own calls", OF_CALLS)
    chance = max(
        abs(value - 0.5)
        for row in found
        if row["fault"] == "none"
        for value in row["auroc"].values()
    )
    return [
        claim("1 - mean AUROC of calls otherwise made, by own calls", round(1 - alone, 4), 0.05),
        claim(
            "the default's mean AUROC of them, less that of own calls", round(default - alone, 4), 0
        ),
        claim("the default's, less that of both", round(default - together, 4), 0),
        claim("distance from .5 of the AUROC of normal samples", round(chance, 4), 0.1),
    ]


def line(row: Row) -> str:
    told = ", ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items())
    return f"{row['model']}, {row['fault']}: {told}"


def main(
    quick: Annotated[bool, typer.Option(help="One model, few samples and steps.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    models, fit, test, steps = (MODELS[:1], 100, 20, 5) if quick else (MODELS, 600, 300, 200)
    calls = USUAL | ({"num_inference_steps": 6} if quick else {})
    found = (row for name in models for row in rows(name, fit, test, calls, steps))
    reported(found, line, claims, output, calls=calls, held_out=fit)


if __name__ == "__main__":
    typer.run(main)
