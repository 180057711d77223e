"""The parameters that a recorder follows, and what a model makes of them alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.gradients.factors import full_precision
from ood_monitor.gradients.tracking import map_arguments
from ood_monitor.gradients.views import order_of

__all__ = ["Followed", "Source", "to_parameters"]


@dataclass(eq=False)
class Source:
    """A derived tensor and the parameters it is made of; for a parameter, itself."""

    tensor: Tensor
    names: tuple[str, ...]
    version: int = 0  # of a derived tensor, which later writes may have made of others
    order: tuple[int, ...] | None = None  # of a parameter's dimensions, where it is no more

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter itself."""
        return self.tensor.is_leaf

    def is_intact(self) -> bool:
        """Whether it was not written over since."""
        return self.is_parameter or self.tensor._version == self.version


class Followed:
    """The parameters of a module, those that get features, and derived tensors.

    Args:
        module: The module.
        selected: Which parameters, by name, get features.
    """

    def __init__(self, module: nn.Module, selected: Callable[[str], bool]) -> None:
        #: Parameters that only the loop gets right, and why.
        self.left_over: dict[str, str] = {}
        #: The followed parameters by name, in module order.
        self.leaves: dict[str, Tensor] = {}
        # By identity; of a derived tensor, which its source keeps alive, or of a parameter.
        self.sources: dict[int, Source] = {}
        self.plain: dict[int, Tensor] = {}
        self._parameters = list(module.named_parameters())  # keeps the ids valid
        for name, parameter in self._parameters:
            # Aliases of the storage, so that no flag of the module's own tensors is ever set.
            value = parameter.detach()
            self.plain[id(parameter)] = value
            if selected(name) and (parameter.is_floating_point() or parameter.is_complex()):
                if parameter.is_complex():  # the rules are those of real numbers
                    self.left_over[name] = "complex numbers"
                leaf = value.detach().requires_grad_()
                self.leaves[name] = leaf
                self.sources[id(parameter)] = Source(leaf, (name,))

    def is_source(self, value: Any) -> bool:
        """Whether it is a followed parameter or a derived tensor."""
        return id(value) in self.sources

    def is_parameter(self, value: Any) -> bool:
        """Whether a source is a parameter."""
        return self.sources[id(value)].is_parameter

    def is_known(self, tensor: Tensor) -> bool:
        """Whether it is a parameter of the module, or a derived tensor."""
        return id(tensor) in self.sources or id(tensor) in self.plain

    def derive(self, tensors: Iterable[Tensor], sources: list[Source]) -> None:
        """Know of tensors that are made of these sources alone."""
        names = tuple(dict.fromkeys(name for source in sources for name in source.names))
        for tensor in tensors:
            if tensor.requires_grad and id(tensor) not in self.plain:
                order = order_of(tensor, self.leaves[names[0]]) if len(names) == 1 else None
                self.sources[id(tensor)] = Source(tensor, names, tensor._version, order)

    def leave(self, sources: Iterable[Source], reason: str) -> None:
        """Leave their parameters to the loop."""
        for name in (name for source in sources for name in source.names):
            self.left_over.setdefault(name, reason)

    def leave_all(self, reason: str) -> None:
        """Leave all parameters to the loop."""
        self.leave(self.sources.values(), reason)

    def substituted(self, arguments: Any, *, graph: bool = False) -> Any:
        """The arguments with parameters as aliases, derived tensors with or without their graph."""

        def substitute(tensor: Tensor) -> Tensor:
            source = self.sources.get(id(tensor))
            if source is None:
                return self.plain.get(id(tensor), tensor)
            return source.tensor if graph else source.tensor.detach()

        return map_arguments(substitute, arguments)


def to_parameters(
    derived: list[tuple[Source, Tensor]], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Per-sample gradients of derived tensors taken back to the parameters they are made of."""
    if not derived:
        return {}
    names = list(dict.fromkeys(name for source, _ in derived for name in source.names))
    parts = torch.autograd.grad(
        [source.tensor for source, _ in derived],
        [leaves[name] for name in names],
        [gradient.to(source.tensor.dtype) for source, gradient in derived],
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
    )
    pairs = zip(names, parts, strict=True)
    return {name: full_precision(part) for name, part in pairs if part is not None}
