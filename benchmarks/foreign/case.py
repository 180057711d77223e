"""A case of a foreign model, and the slow way to its norms, which shares no code with ours."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size, map_tensors, pieces

__all__ = ["Case", "Density", "Foreign", "exact_norms", "worst_error"]

Case = tuple[om.Adapter, Batch]


class Density(om.Adapter):
    """Of a function of a module and a batch, which gives (B,), as a user writes one."""

    is_one_pass = True

    def __init__(self, module: nn.Module, function: Callable[[Any, Any], Tensor]) -> None:
        self.module, self._function = module, function

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        yield "log_likelihood", self._function(self.module, batch)


@dataclass(frozen=True)
class Foreign:
    """A model of another package under an adapter.

    Attributes:
        name: Its name in tables.
        package: What has to be installed, by the name that it is imported by.
        make: ``make(batch, **sizes)`` gives the adapter and a batch of so many samples.
        batch: B of the benchmark.
        target: The time of gradient norms to reach, in plain passes, where one was set.
        small: Options by which it is quick, and runs in double precision.
        tolerance: The largest relative error of a norm in double precision. More than rounding
            where the model itself computes in single precision.
    """

    name: str
    package: str
    make: Callable[..., Case]
    batch: int = 32
    target: float | None = None
    small: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-8

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package) is not None

    def made(self, *, seed: int = 0) -> Case:
        """In single precision, at the sizes of the benchmark."""
        return self._prepared(seed, self.batch, {}, torch.float32)

    def made_small(self, batch: int = 5, *, seed: int = 0) -> Case:
        """In double precision, at sizes of a test."""
        return self._prepared(seed, batch, self.small, torch.float64)

    def _prepared(
        self, seed: int, batch: int, sizes: Mapping[str, Any], dtype: torch.dtype
    ) -> Case:
        """In eval mode, and off the zeros that some layers start with."""
        with seeded(seed):
            adapter, samples = self.make(batch, **sizes)
            with torch.no_grad():
                for parameter in differentiable(adapter.module).values():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        for parameter in differentiable(adapter.module).values():
            parameter.requires_grad_(True)  # norms are of frozen ones too
        adapter.module.eval()
        nn.Module.to(adapter.module, dtype)
        return adapter, map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, samples)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch and NumPy, of which FrEIA draws its permutations; as they were afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def differentiable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters but whole numbers, as FrEIA keeps its permutations."""
    return {name: p for name, p in module.named_parameters() if p.is_floating_point()}


def exact_norms(adapter: om.Adapter, batch: Batch) -> dict[str, Tensor]:
    """``{"term/parameter": (B,)}`` by `torch.autograd.grad` of each sample alone."""
    found: dict[str, list[Tensor]] = {}
    parameters = differentiable(adapter.module)
    for sample in pieces(batch, 1):
        for term, value in adapter.log_likelihood(sample):
            total = value.sum() if isinstance(value, Tensor) else value.total().sum()
            gradients = torch.autograd.grad(
                total, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                found.setdefault(f"{term}/{name}", []).append(gradient.square().sum())
    assert all(len(norms) == batch_size(batch) for norms in found.values())
    return {key: torch.stack(norms) for key, norms in found.items()}


def worst_error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a norm, and whose it is.

    Relative to the norm, or to 1e-16 of the sample's largest where it is less: a gradient that is
    zero but for rounding, as of an attention key's bias, has no digits to compare.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"Expected norms of {sorted(exact)}, got those of {sorted(found)}.")
    least = 1e-16 * torch.stack(list(exact.values())).amax(0)
    errors = {
        key: float(((found[key] - norms).abs() / norms.maximum(least)).nan_to_num(math.inf).max())
        for key, norms in exact.items()
    }
    key = max(errors, key=errors.__getitem__)
    return errors[key], key
