"""What a case of a model is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors

__all__ = ["Case", "Function", "Gaussian", "Model", "perturbed"]

#: An adapter and a batch of it.
Case: TypeAlias = tuple[om.Adapter, Batch]


class Gaussian(om.Adapter):
    """Log-density of ones around the output of a network, up to a constant."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Tensor] = lambda module, x: module(x)
    ) -> None:
        self.module, self._forward = module, forward

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        arguments = batch if isinstance(batch, tuple) else (batch,)
        output = self._forward(self.module, *arguments)
        yield "log_likelihood", -0.5 * (output - 1).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Model:
    """One case: a model under an adapter, and what the engine makes of it.

    Attributes:
        name: Its name.
        make: Gives the adapter and a batch of four samples, in single precision.
        looped: Patterns of the parameters that no rule covers.
        warns: Whether only the comparison with the loop over samples finds them.
    """

    name: str
    make: Callable[[], Case]
    looped: tuple[str, ...] = ()
    warns: bool = False

    def __call__(self, dtype: torch.dtype = torch.float64) -> Case:
        """The model, in eval mode and off its initial values, which are often zero; its batch."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapter, batch = self.make()
            perturbed(adapter.module)
        nn.Module.to(adapter.module.eval(), dtype)  # diffusers' own `to` logs a warning
        return adapter, map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def perturbed(module: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


class Function(nn.Module):
    """A module of parameters and submodules by name, whose output a function of it gives."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(self, *inputs)
