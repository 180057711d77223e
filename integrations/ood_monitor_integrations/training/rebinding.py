"""The module under test is the one that is scored, whichever object an adapter was made of.

An adapter holds its model: ``ELBO(model.vae)`` that of the module which was trained. Where another
object is tested, of `load_from_checkpoint`, its part of the same class, with weights of the same
names and shapes, takes the place of the old one, everywhere in a copy of the adapter: in
attributes, containers, bound methods and `functools.partial`. What a function has by its closure,
its defaults or a global name cannot be replaced: it is refused by name.
"""

import copy
import dis
import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from ood_monitor import Adapter

__all__ = ["bound_to"]

_AdapterT = TypeVar("_AdapterT", bound=Adapter)

_Named: TypeAlias = tuple[str, Any]

#: Objects that an adapter leads to at most: more are a data set, or a whole program.
_MOST_OBJECTS = 10_000

#: What leads nowhere.
_ATOMS = (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex)

_FUNCTIONS = (types.FunctionType, functools._lru_cache_wrapper)

#: Packages whose objects lead to no model, or to the whole program.
_OPAQUE = ("logging", "numpy", "threading", "weakref")

#: Packages of classes whose methods hold no model by a global name.
_SOUND = ("abc", "builtins", "collections", "ood_monitor", "torch", "typing")

_REMEDY = (
    "Define `adapter(self)` on the LightningModule, which makes it of the module itself, or give a "
    "function `(module, x) -> (B,)` that uses its argument."
)


def bound_to(adapter: _AdapterT, module: nn.Module) -> _AdapterT:
    """The adapter of the same model within a module: itself, or a copy on the module's own part.

    Args:
        adapter: Of a part of the module, of a part of another module of its class, or of a model
            that has nothing to do with it.
        module: What is trained or tested.

    Returns:
        The adapter itself, if its model is the module or a part of it, or if the module has no part
        of the class and with the weights' names and shapes of a model that the adapter holds: it
        is of a model of its own, such as an autoencoder that watches a classifier's input. Else a
        copy, on the parts that are; the given adapter is left as it was.

    Raises:
        ValueError: Several parts may be the model; the adapter uses it by a function's closure,
            defaults or global names, or a weight of which it cannot be told whose it is; or it
            cannot be copied.
    """
    own = {id(part) for part in module.modules()}
    if id(adapter.module) in own:
        return adapter
    reached = _Reached(adapter)
    replaced = _replaced(reached.modules, module, own)
    if not replaced:
        return adapter
    own |= {id(tensor) for tensor in _tensors(module).values()}
    above = reached.above(replaced)
    for value in reached.objects:
        _check(value, replaced, own, above)
    kept = {id(value): value for value in reached.objects if id(value) not in above}
    try:
        return copy.deepcopy(adapter, kept | replaced)
    except Exception as error:  # of any kind: a lock, a file, a constructor of a class's own
        raise ValueError(
            f"Expected an adapter that can be copied for another {type(module).__name__}, got "
            f"{type(error).__name__}: {error}. {_REMEDY}"
        ) from error


class _Reached:
    """All objects that an adapter leads to.

    Attributes:
        objects: Them, the adapter first; modules are not looked into.
        modules: Those that are modules.

    Raises:
        ValueError: They are too many.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.objects: list[Any] = [adapter]
        self._below: dict[int, list[int]] = {}
        known = {id(adapter)}
        for value in self.objects:  # which grows
            parts = [part for _, part in _parts(value) if not isinstance(part, _ATOMS)]
            self._below[id(value)] = [id(part) for part in parts]
            new = {id(part): part for part in parts if id(part) not in known}
            self.objects += new.values()
            known |= new.keys()
            if len(self.objects) > _MOST_OBJECTS:
                raise ValueError(
                    f"Expected an adapter that leads to few objects, got {type(adapter).__name__} "
                    f"with more than {_MOST_OBJECTS}: where it has its model cannot be seen. "
                    f"{_REMEDY}"
                )
        self.modules = [value for value in self.objects if isinstance(value, nn.Module)]

    def above(self, replaced: Mapping[int, Any]) -> set[int]:
        """Identities of what leads to one of these objects, itself not among them."""
        for module in self.modules:  # one that has a part which is replaced, and is not itself
            self._below[id(module)] += [id(part) for part in module.modules() if part is not module]
        found = set[int]()
        while True:
            more = {
                own
                for own, below in self._below.items()
                if own not in replaced and own not in found
                if any(each in replaced or each in found for each in below)
            }
            if not more:
                return found
            found |= more


def _parts(value: Any) -> Iterable[_Named]:
    """What an object leads to at once, with its names there."""
    if isinstance(value, nn.Module | Tensor):
        return ()
    if isinstance(value, _FUNCTIONS):
        return _captured(value)
    if isinstance(value, types.MethodType):
        return (("self", value.__self__), ("function", value.__func__))
    if isinstance(value, functools.partial):
        return (("function", value.func), *_enumerated(value.args), *value.keywords.items())
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return _enumerated(value)
    if type(value).__module__.split(".", 1)[0] in _OPAQUE:
        return ()
    return (*_attributes(value), *_methods(type(value)))


def _enumerated(values: Iterable[Any]) -> list[_Named]:
    return [(str(i), value) for i, value in enumerate(values)]


def _attributes(value: Any) -> Iterator[_Named]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


def _methods(kind: type) -> Iterator[_Named]:
    """Functions of a user's own class, which may use a model by a global name."""
    for base in kind.__mro__:
        if base.__module__.split(".", 1)[0] not in _SOUND:
            for name, member in vars(base).items():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if isinstance(function, _FUNCTIONS):
                    yield name, function


def _captured(function: Any) -> Iterator[_Named]:
    """What a function has by closure, by default and by global names."""
    inner = getattr(function, "__wrapped__", None)
    if not isinstance(function, types.FunctionType):
        yield "function", inner
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from _enumerated(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        # Of functions elsewhere, such as a library's, globals are no model of the user's.
        if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
            yield name, value


def _global_names(code: types.CodeType) -> set[str]:
    """Names that code, and code within it, looks for among globals."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    names = {name for each in inner for name in _global_names(each)}
    loads = (it for it in dis.get_instructions(code) if it.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return names | {it.argval for it in loads}


def _replaced(modules: Iterable[nn.Module], module: nn.Module, own: set[int]) -> dict[int, Any]:
    """By the identity of an old module, parameter or buffer, the new one.

    Raises:
        ValueError: There are several.
    """
    found: dict[int, Any] = {}
    # The largest first: what is a part of another is found with it.
    for old in sorted(modules, key=lambda each: -sum(1 for _ in each.modules())):
        if id(old) not in own and id(old) not in found:
            found |= _pairs_of(old, module, own)
    return found


def _pairs_of(old: nn.Module, module: nn.Module, own: set[int]) -> dict[int, Any]:
    """By identity what is replaced of an old module, or of all parts that it was put together of.

    Raises:
        ValueError: There are several.
    """
    inner = getattr(old, "_orig_mod", old)  # under torch.compile
    new = _the_one(inner, _counterparts(inner, module), module)
    if new is not None:
        return _pairs(inner, new) | {id(old): new}
    parts = [part for part in old.children() if _form(part) and id(part) not in own]
    found = [_counterparts(part, module) for part in parts]
    if not all(found) or next(old.parameters(recurse=False), None) is not None:
        return {}
    pairs: dict[int, Any] = {}
    for part, named in zip(parts, found, strict=True):
        new = _the_one(part, named, module)
        pairs |= {} if new is None else _pairs(part, new)
    return pairs


def _counterparts(old: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module that may be what ``old`` is of another, by name."""
    form = _form(old)
    named = {name: part for name, part in module.named_modules() if type(part) is type(old)}
    return {name: part for name, part in named.items() if form and _form(part) == form}


def _the_one(old: nn.Module, found: Mapping[str, nn.Module], module: nn.Module) -> nn.Module | None:
    if len(found) > 1:
        raise ValueError(
            f"Expected one {type(old).__name__} in {type(module).__name__} with weights as the "
            f"adapter's, got {len(found)}, {sorted(found)}: which one is meant cannot be told. "
            f"{_REMEDY}"
        )
    return next(iter(found.values()), None)


def _form(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a module saves."""
    state: Mapping[str, Any] = module.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _pairs(old: nn.Module, new: nn.Module) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for of in (lambda module: dict(module.named_modules(remove_duplicate=False)), _tensors):
        ours = of(new)
        found |= {id(part): ours[name] for name, part in of(old).items() if name in ours}
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _check(value: Any, replaced: Mapping[int, Any], own: set[int], above: set[int]) -> None:
    """Refuse what cannot be on another model.

    Raises:
        ValueError: A function that uses the old one, or a weight that may be of it.
    """
    if isinstance(value, _FUNCTIONS) and id(value) in above:
        used = [name for name, part in _captured(value) if id(part) in above | replaced.keys()]
        raise ValueError(
            "Expected an adapter that has its model in attributes, since another module object is "
            f"watched than it was made of, got the function {value.__qualname__}, which uses the "
            f"old one by {', '.join(sorted(set(used)))}. {_REMEDY}"
        )
    is_weight = isinstance(value, Tensor) and value.requires_grad
    if is_weight and id(value) not in own and id(value) not in replaced:
        raise ValueError(
            "Expected an adapter whose weights are its modules', since another module object is "
            f"watched than it was made of, got a tensor of shape {tuple(value.shape)} that "
            f"requires gradients and is in none of them. {_REMEDY}"
        )
