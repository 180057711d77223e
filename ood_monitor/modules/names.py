"""Names of layers and weights that stay when a model is tuned or its projections are fused.

PEFT puts a module around a layer, which becomes its ``base_layer``, and its own weights beside it.
What diffusers fuses, an attention's queries, keys and values, becomes one layer beside theirs. The
names of before are kept: "to_q.base_layer.weight" is "to_q.weight", the rows of "to_qkv.weight" are
those of "to_q.weight" and so on, and what a tuner has of its own is no layer of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ood_monitor.modules.weights import stored_weights

__all__ = ["Names", "Part", "part_of", "tuners_in", "weights_in_use"]

_BASE = "base_layer"

#: A projection that diffusers has fused, and those that it stands for, in the order of its rows.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True)
class Part:
    """A weight by its lasting name.

    Attributes:
        name: The name.
        rows: Which rows of the parameter it is; None for all.
    """

    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class Names:
    """The lasting names of a module's weights and layers.

    Attributes:
        tuners: Names of the modules that a tuner put around layers.
        fused: The fused layers by name, each with the layers that it stands for and their widths.
        unused: Fused layers that are there and not used any more.
    """

    tuners: tuple[str, ...] = ()
    fused: dict[str, dict[str, int]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> "Names":
        """Look at a module as it is now."""
        tuners, fused, unused = list[str](), dict[str, dict[str, int]](), list[str]()
        for name, part in module.named_modules():
            if _is_tuner(part):
                tuners.append(name)
            for joint, single in _fused_in(part).items():
                full = f"{name}.{joint}" if name else joint
                if not _uses_fused(part):
                    unused.append(full)
                    continue
                widths = {each: len(_untuned(part._modules[each]).weight) for each in single}
                fused[full] = {f"{name}.{k}" if name else k: n for k, n in widths.items()}
        return cls(tuple(tuners), fused, tuple(unused))

    @property
    def are_plain(self) -> bool:
        """Whether all names are the module's own."""
        return not (self.tuners or self.fused or self.unused)

    def layers(self, name: str) -> tuple[str, ...]:
        """The lasting names of a submodule: none of a tuner's own, several of a fused layer."""
        if self.are_plain:
            return (name,)
        plain = self._without_tuners(name)
        if plain is None or plain in self.unused:
            return ()
        return tuple(self.fused[plain]) if plain in self.fused else (plain,)

    def weights(self, name: str) -> tuple[Part, ...]:
        """The lasting names of a parameter or buffer; none of a tuner's own."""
        if self.are_plain:
            return (Part(name),)
        plain = self._without_tuners(name)
        layer, _, own = (plain or "").rpartition(".")
        if plain is None or layer in self.unused:
            return ()
        parts, start = list[Part](), 0
        for single, width in self.fused.get(layer, {}).items():
            parts.append(Part(f"{single}.{own}", slice(start, start + width)))
            start += width
        return tuple(parts) or (Part(plain),)

    def _without_tuners(self, name: str) -> str | None:
        """The name without `base_layer`; None of what is a tuner's own."""
        for tuner in reversed(self.tuners):  # the innermost first
            if name.startswith(f"{tuner}." if tuner else ""):
                key, _, rest = name[len(tuner) + 1 if tuner else 0 :].partition(".")
                if key != _BASE:
                    return None
                name = ".".join(filter(None, (tuner, rest)))
        return name


def part_of(module: nn.Module, name: str) -> Any:
    """The layer of a lasting name, as it is now: within a tuner, or fused with others."""
    part: Any = module
    for key in name.split(".") if name else ():
        parent, part = part, part._modules[key]
        if getattr(parent, "fused_projections", False) is True and _uses_fused(parent):
            joint = (j for j, single in _fused_in(parent).items() if key in single)
            part = parent._modules[next(joint, key)]
        part = _untuned(part)
    return part


def tuners_in(module: nn.Module) -> dict[str, dict[str, Any]]:
    """By the names of wrapped layers, the tuners that change what these give, and their scales.

    None of a tuner that is off, scaled to nothing, or merged into the layer's own weights.
    """
    found = {name: _effective(part) for name, part in module.named_modules() if _is_tuner(part)}
    return {name: scales for name, scales in found.items() if scales}


def weights_in_use(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that have a part in what a module gives, each once, under lasting names.

    Of tuners those alone that change something, under their own names; fused projections under
    theirs, beside those that they stand for.
    """
    names = Names.of(module)
    if names.are_plain:
        yield from stored_weights(module)
        return
    effective = tuners_in(module)
    for name, tensor in stored_weights(module):
        parts = names.weights(name)
        tuner = next((t for t in reversed(names.tuners) if name.startswith(f"{t}.")), None)
        if len(parts) == 1:
            yield parts[0].name, tensor
        elif parts or (tuner and not effective.get(tuner, {}).keys().isdisjoint(name.split("."))):
            yield name, tensor


def _untuned(part: Any) -> Any:
    """A layer without what tuners have put around it."""
    while _is_tuner(part):
        part = part._modules[_BASE]
    return part


def _is_tuner(part: nn.Module) -> bool:
    return isinstance(part._modules.get(_BASE), nn.Module) and hasattr(part, "active_adapters")


def _effective(part: Any) -> dict[str, Any]:
    if part.disable_adapters or part.merged:
        return {}
    scales = getattr(part, "scaling", {})
    held = {key for own in part.adapter_layer_names for key in getattr(part, own, ())}
    active = [name for name in part.active_adapters if name in held]
    return {name: scales.get(name) for name in active if scales.get(name) != 0}


def _fused_in(part: nn.Module) -> dict[str, tuple[str, ...]]:
    """A part's fused layers, each with those that it stands for, which are still there."""
    if part.__dict__.get("fused_projections") is not True:  # quicker than `getattr` where it lacks
        return {}
    own = part._modules
    return {
        joint: single
        for joint, single in _FUSED.items()
        if own.get(joint) is not None and all(own.get(each) is not None for each in single)
    }


def _uses_fused(part: Any) -> bool:
    """Whether an attention calls its fused layer; one kind keeps it when it is not used again."""
    kind = type(getattr(part, "processor", None)).__name__
    return "Fused" in kind or hasattr(part, "unfuse_projections")
