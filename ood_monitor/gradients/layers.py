"""Which parameters become features."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

__all__ = ["Layers", "selection"]

#: All (None), names by shell-style pattern(s), or a predicate on the parameter's name.
Layers: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None


def selection(module: nn.Module, layers: Layers) -> Callable[[str], bool]:
    """The chosen floating-point parameters of ``module`` as a predicate on names.

    Args:
        module: The model.
        layers: What to choose; a pattern is one of :mod:`fnmatch`, such as ``"up_blocks.*"``.

    Raises:
        ValueError: The model has no floating-point parameter, or nothing matches.
    """
    names = [name for name, p in module.named_parameters() if p.is_floating_point()]
    if not names:
        raise ValueError(
            f"Expected a model with floating-point parameters, got {type(module).__name__} with "
            f"{sum(1 for _ in module.parameters())} parameters, none of them floating-point."
        )
    chosen = frozenset(filter(_predicate(layers), names))
    if not chosen:
        raise ValueError(
            f"Expected layers={layers!r} to match a parameter name, got no match among "
            f"{len(names)}, from {names[0]!r} to {names[-1]!r}."
        )
    return chosen.__contains__


def _predicate(layers: Layers) -> Callable[[str], bool]:
    if layers is None:
        return lambda name: True
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)
