"""Which parameters become features."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ood_monitor.checks import items, text
from ood_monitor.modules import Names, fully_sharded, is_shard, local_part, stored_weights

__all__ = ["Layers", "checked_layers", "selection", "supported"]

#: All (None), names by shell-style pattern(s), or a predicate on the parameter's name.
Layers: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None

#: Of parameters that are an order or a mask (FrEIA's permutations), and no quantised weight.
_NO_WEIGHTS = frozenset({torch.int64, torch.bool})


def checked_layers(layers: Layers) -> Layers:
    """What was chosen, before there is a model to see whether it has such parameters.

    Raises:
        TypeError: It is neither text, several texts nor a function.
        ValueError: A pattern that is empty.
    """
    if layers is None or callable(layers):
        return layers
    if isinstance(layers, str):
        return text("layers", layers)
    found = [text("a pattern of layers", pattern) for pattern in items("layers", layers)]
    return layers if isinstance(layers, Sequence) else found


def selection(module: nn.Module, layers: Layers, *, shards: bool = False) -> Callable[[str], bool]:
    """The chosen floating-point or complex parameters of ``module`` as a predicate on names.

    On lasting names and on the module's own, which differ where a tuner (PEFT) has wrapped layers.

    Args:
        module: The model.
        layers: What to choose; a pattern is one of :mod:`fnmatch`, such as ``"up_blocks.*"``. A
            tuner's own weights are chosen only by a pattern that matches none of the model's.
        shards: Whether shards may be chosen, of which no gradient is then taken.

    Raises:
        ValueError: The model has no floating-point parameter, a pattern matches none, or a chosen
            one is sharded, quantised or not initialised.
        TypeError: As :func:`checked_layers`.
    """
    layers = checked_layers(layers)
    parameters = dict(module.named_parameters())
    names = [name for name, p in parameters.items() if p.is_floating_point() or p.is_complex()]
    if not names:
        raise ValueError(
            f"Expected a model with floating-point parameters, got {type(module).__name__} with "
            f"{len(parameters)} parameters, none of them floating-point."
        )
    chosen = _chosen(layers, names, Names.of(module))
    if _is_by_fsdp(module) and not shards:
        raise ValueError(
            "Expected whole parameters, got a model that FSDP has sharded: gradients of a sample "
            "are not at hand. Use method='forward', or score the consolidated checkpoint."
        )
    for name, parameter in parameters.items():
        reason = _unsupported(local_part(parameter) if shards else parameter)
        is_weight = parameter.dtype not in _NO_WEIGHTS
        if reason and (name in chosen or (layers is None and is_weight)):
            raise ValueError(
                f"Expected whole parameters of 16 bits or more, got {name!r}, {reason}. Pass "
                "`layers=` to choose others."
            )
    return chosen.__contains__


def supported(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that can be features, were they where they are computed with."""
    named = stored_weights(module)
    return frozenset(name for name, p in named if _unsupported(local_part(p)) is None)


def _is_by_fsdp(module: nn.Module) -> bool:
    wrapped = {type(part).__name__ for part in module.modules()}
    return "FullyShardedDataParallel" in wrapped or bool(fully_sharded(module))


def _unsupported(parameter: Tensor) -> str | None:
    """Why autograd gives no gradient of a parameter here, or one that means nothing, if so."""
    if is_lazy(parameter):
        return "which is not initialised: run a batch through the model first"
    if parameter.is_meta:
        return "without values: freed after its layer by offloading, which gradients would need"
    if hasattr(parameter, "ds_id"):
        return "a shard by DeepSpeed ZeRO-3"
    if hasattr(parameter, "__tensor_flatten__"):
        kind = "sharded" if is_shard(parameter) else "quantised"
        return f"a {type(parameter).__name__}: {kind}"
    continuous = parameter.is_floating_point() or parameter.is_complex()
    if not continuous or parameter.element_size() < 2:
        return f"quantised or of integers: {parameter.dtype}"
    return None


def _chosen(layers: Layers, names: list[str], lasting: Names) -> frozenset[str]:
    """Those of the names that are meant, and their lasting names."""
    known = {name: {part.name for part in lasting.weights(name)} for name in names}
    models = dict.fromkeys(each for found in known.values() for each in found)
    own = [name for name, found in known.items() if not found]
    chosen = _meant(layers, list(models), own)
    return chosen | {name for name, found in known.items() if not chosen.isdisjoint(found)}


def _meant(layers: Layers, names: list[str], others: list[str]) -> frozenset[str]:
    """Those that are meant, one at least by each pattern: of the others if of no name."""
    if layers is None:
        return frozenset(names)
    parts = [layers] if isinstance(layers, str) or callable(layers) else list(layers)
    predicates = [_predicate(part) for part in parts]
    matches = [frozenset(filter(it, names)) or frozenset(filter(it, others)) for it in predicates]
    lacking = [part for part, found in zip(parts, matches, strict=True) if not found]
    if lacking or not parts:
        raise ValueError(
            f"Expected each of layers={layers!r} to match a parameter name, got no match of "
            f"{lacking} among {len(names)}, from {names[0]!r} to {names[-1]!r}."
        )
    return frozenset().union(*matches)


def _predicate(part: str | Callable[[str], bool]) -> Callable[[str], bool]:
    return part if callable(part) else lambda name: fnmatchcase(name, part)
