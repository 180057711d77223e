"""The scoring view: a model as scoring runs it, beside the one that its user runs.

It is a structural copy (:mod:`~ood_monitor.modules.copies`) of the model and of what holds it, in
eval mode, which shares the weights' storage. Each pass has a fresh one: it sees the model as it is
now, and nothing that an earlier pass has kept. The user's module is never run and never changed:
another thread may train it meanwhile.

A model without a copy (sharded, offloaded by hooks, TorchScript), or that is reached otherwise (by
a global variable), is scored where it stands and put back afterwards.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.modules.caches import overrides_train, renew, renew_if_harmless
from ood_monitor.modules.copies import Structure
from ood_monitor.modules.in_place import PythonState, restored
from ood_monitor.modules.lockstep import Lockstep
from ood_monitor.modules.random_state import kept_random_state, leaving_random_state
from ood_monitor.modules.shards import begin_pass, is_sharded, resharded
from ood_monitor.modules.substitutes import renormalises
from ood_monitor.modules.tensors import Tensors
from ood_monitor.modules.weights import device_of

__all__ = ["Passes", "scored", "scoring_in_place", "scoring_view"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: What is scored in place: holders whose passes were seen to run the user's own module.
_in_place: WeakIdKeyDictionary = WeakIdKeyDictionary()


#: Holders whose passes were seen to stay in their views.
_staying: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: What has not written into its weights in its first pass, which is made on copies of them, and
#: bytes of weights up to which it is.
_first_looked_at: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Holders whose passes write what is there already into weights, as masks do: theirs are copies.
_writing: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Models that throw away in train mode what they have computed, and write into no weight there.
_renewable: WeakIdKeyDictionary = WeakIdKeyDictionary()

_MOST_BYTES = 1 << 30


@dataclass
class Passes(Generic[T]):
    """Where passes over a model get it from.

    Attributes:
        holder: What holds the model, or the model itself.
        module: The model.
        in_place: Whether it is scored where it stands.
        is_watched: Whether a pass that leaves the view is seen.
        has_derived: Whether a view has shared a tensor that was computed from parameters before.
    """

    holder: T
    module: nn.Module
    in_place: bool = False
    is_watched: bool = True
    has_derived: bool = False
    _tensors: Tensors = field(default_factory=Tensors)
    _originals: set[int] = field(default_factory=set)
    _first: "_First | None" = None
    _state: PythonState | None = None
    _structure: Structure | None = None  # kept while its view is: what is only weakly held there

    def fresh(self) -> T:
        """The holder on a view of the model as it is now, for one pass.

        Raises:
            ValueError: The model writes into its parameters when it is called.
        """
        if self.in_place:
            if self._state is not None:
                self._state.put_back()
            begin_pass(self.module)
            return self.holder
        with torch._C.DisableTorchFunction():
            self._check_first()
            is_first = not self._is_looked_at() and _bytes(self.module) <= _MOST_BYTES
            shares_weights = not is_first and self.holder not in _writing
            view, module = self._copied(shares_weights=shares_weights)
            if is_first and overrides_train(module):
                _renewable[self.module] = renew_if_harmless(module, self.module)
                view, module = self._copied(shares_weights=False)
            if _renewable.get(self.module):  # type: ignore[no-untyped-call]
                renew(module)
        if getattr(view, "module", module) is not module:
            raise _LeftError  # it holds the model in its class, say
        self._first = _First(self.module, module) if is_first else None
        return view

    def _is_looked_at(self) -> bool:
        """Whether a first pass of the holder over this very module was looked at."""
        known: weakref.ref[nn.Module] | None = _first_looked_at.get(self.holder)  # type: ignore[no-untyped-call]
        return known is not None and known() is self.module

    def _copied(self, *, shares_weights: bool) -> tuple[T, nn.Module]:
        structure = Structure(self._tensors, shares_weights=shares_weights)
        copies = structure.of(self.holder), structure.of(self.module)
        self._structure = structure
        self._originals |= structure.originals
        self.has_derived |= structure.has_derived
        if self.has_derived and not (self.is_watched or self.in_place):
            raise _UnwatchedError
        return copies

    def forget(self) -> None:
        """Let go of the last view, which no pass needs any more."""
        self._structure = None

    def end(self) -> None:
        """Look at what the last pass did.

        Raises:
            ValueError: As there.
        """
        with torch._C.DisableTorchFunction():
            self._check_first()

    def _check_first(self) -> None:
        """Whether the first pass, which had weights of its own, has written into them."""
        if self._first is None:
            return
        if self._first.wrote:
            _writing[self.holder] = True
        written, self._first = self._first.written(), None
        if written:
            raise ValueError(
                f"Expected {type(self.module).__name__} to leave its parameters alone when it is "
                f"called, got a write into {written}. If its first call initialises them, call it "
                "once before it is scored."
            )
        _first_looked_at[self.holder] = weakref.ref(self.module)


class _First:
    """A first pass, on copies of the weights, of which it shows whether it writes into them.

    Args:
        module: The model.
        view: The view of it that the pass runs.

    Attributes:
        wrote: Whether an operation wrote into a weight, be it what was there.
    """

    def __init__(self, module: nn.Module, view: nn.Module) -> None:
        self.wrote = False
        self._storages = {_storage(p) for m in view.modules() for p in m._parameters.values()}
        self._parts = list(zip(module.named_modules(), view.modules(), strict=True))
        parameters = (p for m in module.modules() for p in m._parameters.values())
        self._versions = {id(p): _version(p) for p in parameters if p is not None}

    def see(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Look at an operation that is about to be done."""
        name = func.__name__
        writes = name.endswith("_") if not name.endswith("__") else name.startswith(_WRITING)
        if writes and args and isinstance(args[0], Tensor):
            self.wrote |= _storage(args[0]) in self._storages - {None}

    def written(self) -> list[str]:
        """Names of parameters that the pass wrote into."""
        return [
            f"{prefix}.{name}".lstrip(".")
            for (prefix, module), view in self._parts
            if not renormalises(module)
            for name, parameter in module._parameters.items()
            if parameter is not None and self._differs(parameter, view._parameters[name])
        ]

    def _differs(self, parameter: Tensor, own: Tensor | None) -> bool:
        if own is None or parameter.is_meta or _version(parameter) != self._versions[id(parameter)]:
            return False  # replaced, or trained meanwhile
        a, b = parameter.detach(), own.detach()
        return not (torch.equal(a, b) or bool(a.isnan().any()))


#: What writes, beside functions whose name ends by an underscore.
_WRITING = ("__i", "__setitem__", "__set__")


def _storage(tensor: Tensor | None) -> int | None:
    """The address of its numbers; None of what has none of its own."""
    if tensor is None or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:  # sparse, or one of `torch.func`
        return None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def scored(function: Callable[[Passes[T]], R], holder: T, module: nn.Module) -> R:
    """What a function of passes over a model gives; the model is left as it was.

    Inside, gradients are on, inference mode and autocast are off, and the random state of the CPU
    and of the model's device is put back.

    Args:
        function: Takes :class:`Passes`. It may be called a second time, with passes in place.
        holder: What holds the model and is called: an adapter, or the module itself.
        module: The model.

    Raises:
        ValueError: It runs inside `torch.nn.utils.parametrize.cached()`, which keeps weights
            between passes.
    """
    if parametrize._cache_enabled:
        raise ValueError(
            "Expected to score outside `torch.nn.utils.parametrize.cached()`, which keeps computed "
            "weights between passes; end it first."
        )
    if holder not in _in_place and not _has_no_copy(module):
        try:
            return _scored_in_views(function, holder, module)
        except _LeftError:
            _in_place[holder] = True
            _log.info("%s is scored in place: it runs the module itself.", type(holder).__name__)
    with Lockstep(module).passes(), scoring_in_place(module, holder) as state:
        return function(Passes(holder, module, in_place=True, _state=state))


def _scored_in_views(function: Callable[[Passes[T]], R], holder: T, module: nn.Module) -> R:
    """As :func:`scored`, which passes watched until some have stayed in their views.

    The watch sees each operation, and each look at a shape, which costs more than a small model's
    backward pass.

    Raises:
        _LeftError: A pass ran the user's own module.
    """

    def run(passes: Passes[T]) -> R:
        with _modes(module):
            result = function(passes)
            passes.end()
        return result

    def watched() -> R:
        return _watched(run, holder, module)

    def unwatched() -> R:
        return run(Passes(holder, module, is_watched=False))

    device = device_of(module)
    if holder in _staying:
        try:
            return leaving_random_state(unwatched, device, holder)
        except _UnwatchedError:
            _staying.pop(holder, None)  # type: ignore[no-untyped-call]
    return leaving_random_state(watched, device, holder)


def _watched(run: Callable[[Passes[T]], R], holder: T, module: nn.Module) -> R:
    passes, state = Passes(holder, module), PythonState(module, holder)
    watch = _Watch(passes)
    try:
        with watch:
            result = run(passes)
    except Exception as error:  # of any kind: the model met its user's tensors in train mode
        if watch.left:
            state.put_back()  # what the module did before it met one
            raise _LeftError from error
        raise
    if watch.left:
        state.put_back()
        raise _LeftError
    if not passes.has_derived:
        _staying[holder] = True
    return result


@contextmanager
def scoring_view(module: nn.Module) -> Iterator[nn.Module]:
    """The module as scoring runs it, for calls of it alone; modes as in :func:`scored`.

    Args:
        module: The model.

    Yields:
        A structural copy that shares its weights, or the module itself, put back afterwards.
    """
    with (
        _modes(module),
        kept_random_state(device_of(module), module),
        ExitStack() as stack,
    ):
        in_place = _has_no_copy(module)
        if in_place:
            stack.enter_context(Lockstep(module).passes())
            stack.enter_context(resharded(module))
            stack.enter_context(restored(module))
        passes = Passes(module, module, in_place)
        yield passes.fresh()
        passes.end()


@contextmanager
def scoring_in_place(module: nn.Module, by: object) -> Iterator[PythonState]:
    """The module itself as scoring would have it, put back afterwards: to see what is done to it.

    Args:
        module: The model.
        by: What calls it.

    Yields:
        What puts attributes back, which is done at the end too.
    """
    needed = [(p, p.requires_grad) for p in module.parameters()]
    with (
        _modes(module),
        kept_random_state(device_of(module), by),
        resharded(module),
        restored(module) as changes,
    ):
        state = PythonState(module, by)
        changes.callback(_need_again, needed)
        changes.callback(state.put_back)
        yield state


def _need_again(needed: Iterable[tuple[Tensor, bool]]) -> None:
    for parameter, requires_grad in needed:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _modes(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device_of(module).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _has_no_copy(module: nn.Module) -> bool:
    """Whether code outside the module, or no Python at all, holds its weights or its forward."""
    return is_sharded(module) or any(
        isinstance(m, torch.jit.ScriptModule)
        or type(m).__name__ == "FullyShardedDataParallel"
        or "_hf_hook" in vars(m)
        # Without hooks it is what a pipeline's call leaves of every cache's context.
        or getattr(vars(m).get("_diffusers_hook"), "hooks", None)
        for m in module.modules()
    )


class _LeftError(Exception):
    """The holder has the user's own module where its view should be."""


class _UnwatchedError(Exception):
    """A view has what needs a watch, and there is none."""


#: What asks a tensor for no more than its form.
_ASKING = frozenset(
    getattr(Tensor, name)
    for name in (
        *("__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex"),
        *("is_contiguous", "is_floating_point", "is_inference", "ndimension", "nelement"),
        *("numel", "size", "storage_offset", "stride", "__hash__", "__repr__"),
    )
)


class _Watch(TorchFunctionMode):
    """Sees whether an operation takes one of the user's own tensors.

    Attributes:
        left: Whether one did.
    """

    def __init__(self, passes: "Passes[Any]") -> None:
        super().__init__()
        self._passes = passes
        self.left = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._passes._first is not None:
            with torch._C.DisableTorchFunction():
                self._passes._first.see(func, args)
        if func in _ASKING or not (self._has_original(args) or self._has_original(kwargs.values())):
            return func(*args, **kwargs)
        # A property, which writes nothing, may tell a shape or give the weights in another form.
        if func.__name__ == "__get__" and not isinstance(found := func(*args), Tensor):
            return found
        self.left = True
        raise _LeftError  # before anything is written

    def _has_original(self, values: Iterable[Any]) -> bool:
        originals = self._passes._originals
        for value in values:  # plainly: of each operation's arguments
            if id(value) in originals:
                return True
            if isinstance(value, list | tuple) and self._has_original(value):
                return True
        return False


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
