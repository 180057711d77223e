"""Small models with data to fit a detector on, and densities of a user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import zuko
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.densities import Array

__all__ = ["SMALL", "Branches", "Counted", "Small", "Walled", "randn"]


class Branches(nn.Module):
    """A density, up to a constant, in which the first and the last three numbers never meet.

    A shift of some of the numbers moves the gradients of one branch and of no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.left(x[:, :3]).square() + self.right(x[:, 3:]).square()
        return -0.5 * y.sum(1)


class Counted:
    """A user's own density: the distance from the mean, and nothing else."""

    minimum_samples = 2

    def fit(self, features: Array) -> Self:
        self.mean = features.mean(0)
        return self

    def score(self, features: Array) -> Array:
        return np.asarray(self.contributions(features).sum(1))

    def contributions(self, features: Array) -> Array:
        return np.asarray((features - self.mean) ** 2)

    def state(self) -> dict[str, Array]:
        return {"mean": self.mean}

    def load_state(self, state: dict[str, Array]) -> Self:
        self.mean = state["mean"]
        return self


class Walled(Counted):
    """Infinite for samples whose gradients are far too large."""

    def __init__(self, value: float) -> None:
        self._value = value

    def contributions(self, features: Array) -> Array:
        beyond = features > self.mean + 8
        return np.where(beyond, self._value, super().contributions(features))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Small:
    """A model and its data.

    Attributes:
        module: Gives the model in double precision; each time the same.
        adapter: Of a model.
        shape: Of a sample; they are standard normal.
    """

    module: Callable[[], nn.Module]
    adapter: Callable[[nn.Module], om.Adapter]
    shape: tuple[int, ...]

    def __call__(self) -> om.Adapter:
        return self.adapter(self.model())

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.module()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module.double().eval()

    def data(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        return randn(n, *self.shape, seed=seed, dtype=dtype)


SMALL: dict[str, Small] = {
    "branches": Small(Branches, om.LogLikelihood, (6,)),
    "zuko": Small(
        lambda: zuko.flows.NSF(features=3, transforms=1, hidden_features=(8,)),
        lambda flow: om.LogLikelihood(flow, lambda flow, x: flow().log_prob(x)),
        (3,),
    ),
    "glow": Small(
        lambda: om.models.Glow(channels=1, size=4, levels=2, steps=1, hidden=4),
        om.LogLikelihood,
        (1, 4, 4),
    ),
}
