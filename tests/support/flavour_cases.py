"""Functions that a logged model names to build its adapter, as a user's package would have them."""

from typing import Any

import torch
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch

__all__ = [
    "Flow",
    "Labelled",
    "build",
    "build_labelled",
    "build_tied",
    "fitted",
    "groups",
    "images",
]

FACTORY = "support.flavour_cases:build"


class Flow(nn.Module):
    """Affine, with a scale for each pixel: a Gaussian's log-density."""

    def __init__(self, size: int = 4, start: float = 0.5) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((1, size, size), start))
        self.log_scale = nn.Parameter(torch.zeros(1, size, size))
        self.register_buffer("shift", torch.tensor(0.1))

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.mean - self.shift) * self.log_scale.exp()
        return (self.log_scale.sum() - 0.5 * z.square().flatten(1).sum(1)) * torch.ones(len(x))


class Labelled(nn.Module):
    """A density of six numbers given a class."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Embedding(2, 6)

    def log_prob(self, x: Tensor, label: Tensor) -> Tensor:
        return -0.5 * (x - self.means(label)).square().sum(1)


class Tied(nn.Module):
    """One parameter by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * self.second(self.first(x)).square().sum(1)


def build(size: int = 4, start: float = 0.5, seed: int = 0) -> om.Adapter:
    return om.LogLikelihood(Flow(size, start), seed=seed)


def build_labelled() -> om.Adapter:
    torch.manual_seed(0)
    return om.LogLikelihood(
        Labelled(), lambda module, x, label: module.log_prob(x, label), condition=label_of
    )


def build_named() -> om.Adapter:
    adapter = build_labelled()
    return om.LogLikelihood(
        adapter.module,
        lambda module, x, label: module.log_prob(x, label),
        inputs=lambda batch: batch["x"],
        condition=lambda batch: {"label": batch["label"]},
    )


def build_tied() -> om.Adapter:
    return om.LogLikelihood(Tied())


def build_from_file(weights: str, text: str) -> om.Adapter:
    """Brings its weights itself, from a file of the model."""
    from safetensors.torch import load_file

    module = Flow()
    module.load_state_dict(load_file(weights))
    with open(text) as file:
        assert file.read() == "hello"
    return om.LogLikelihood(module)


def build_nothing() -> object:
    return Flow()


def build_other() -> om.Adapter:
    return Flow()  # type: ignore[return-value]


def label_of(batch: Batch) -> dict[str, Any]:
    return {"label": batch[1]}


def groups(batch: Batch) -> list[str]:
    return [str(int(value > 0.5)) for value in batch.flatten(1).mean(1)]


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def fitted(adapter: om.Adapter | None = None, **options: Any) -> om.Detector:
    """On images, with weights that no factory gives."""
    adapter = adapter or build(start=0.25)
    return om.Detector(adapter, **options).fit([images(300)], progress=False)
