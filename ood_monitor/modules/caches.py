"""What a module has computed from its weights and kept between calls, thrown away in a copy of it.

A layer may keep a weight that it has computed (nflows' linear maps, RevIN, merged kernels) while it
is in eval mode. A pass that takes it from there gives the weights behind it no gradient. Such
layers let go of it in train mode, which they learn by an override of `train`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["without_caches"]

#: Parameters' elements below a module, up to which they are copied to call its `train`.
_MOST_ELEMENTS = 1 << 24


def without_caches(copies: Iterable[nn.Module]) -> None:
    """Have copies of modules that keep tensors let go of what they have computed.

    Their `train` is called with copies of their weights, since some write into these (merging
    adapters, say); a module that did is left as it was.
    """
    for module in copies:
        if type(module).train is not nn.Module.train and _elements(module) <= _MOST_ELEMENTS:
            _renew(module)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _renew(module: nn.Module) -> None:
    before = [(m, dict(vars(m))) for m in module.modules()]
    with _copied_weights(module) as pairs:
        try:
            module.train(True)
            module.train(False)
            kept = not all(torch.equal(own, copied) for own, copied in pairs)
        except Exception:  # whatever it needs of a training that is none
            kept = True
    for submodule, attributes in before:
        if kept:
            vars(submodule).clear()
            vars(submodule).update(attributes)
        submodule.training = attributes["training"]


@contextmanager
def _copied_weights(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Copies in place of the parameters; gives each with its copy."""
    tables = [(m, m._parameters) for m in module.modules()]
    own = {id(p): p for p in module.parameters()}
    copied = {k: nn.Parameter(p.detach().clone(), p.requires_grad) for k, p in own.items()}
    try:
        for submodule, table in tables:
            substituted = {k: copied.get(id(p)) for k, p in table.items()}
            vars(submodule)["_parameters"] = substituted
        yield [(own[k].detach(), copied[k].detach()) for k in own]
    finally:
        for submodule, table in tables:
            vars(submodule)["_parameters"] = table
