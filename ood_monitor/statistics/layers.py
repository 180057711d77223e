"""The layers of a model: modules that make a linear map of what they are given.

They are found by what they compute, in one pass that is looked at operation by operation, and not
by a list of classes: masked, quantised, low-rank and foreign layers dispatch the same operations.
A layer is a module that, while it is the innermost one that runs, maps its first tensor linearly:
by a convolution or a matrix product, the other factor of which comes from none of its arguments.
So attention's queries with keys are none, and neither are embeddings and norms, nor what a tuner
has put beside a layer. Names are the lasting ones of :mod:`~ood_monitor.modules.names`.
"""

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ood_monitor.modules import Names

__all__ = ["GROUPS", "Discovery", "Layer", "first_tensor_of"]

#: Groups of input channels: channel c belongs to group c mod 32.
GROUPS = 32

#: Parts of the names of operations that are linear in one of their tensors.
_CONVOLUTION = re.compile(r"q?conv(olution)?(\dd)?")
_PRODUCT = re.compile(r"q?linear|\w*mm|\w*matmul|gem[mv]|rnn|lstm|gru")

#: Where "aten::convolution" is told that it is a transposed one.
_TRANSPOSED = 6

#: With channels last, unlike all other convolutions.
_OTHER_CONVOLUTION = "tbc"


@dataclass(frozen=True)
class Layer:
    """What is known of a layer.

    Attributes:
        channels: C, of its input.
        axis: Where in its input they are: 1 of a convolution's, -1 of a linear map's.
        weight_dimension: Where in its weight they are: 1, or 0 of a transposed convolution's and of
            a matrix that inputs are multiplied by.
    """

    channels: int
    axis: int
    weight_dimension: int = 1

    @property
    def groups(self) -> int:
        """G = min(32, C)."""
        return min(GROUPS, self.channels)

    def dimension_in(self, weight: torch.Size) -> int:
        """Where the input channels are in a weight of this shape."""
        other = 1 - self.weight_dimension
        # A depthwise convolution's has one column; so has a scale, whose kernel is none.
        is_depthwise = weight[self.weight_dimension] == 1 < weight[2:].numel()
        return other if is_depthwise and weight[other] == self.channels else self.weight_dimension


@dataclass
class _Call:
    """A module that runs, and which of the tensors that it made come from its arguments.

    Tensors are told apart by their storage, so that a view and what it is a view of are one.
    """

    names: tuple[str, ...]
    module: nn.Module
    is_leaf: bool
    first: Tensor | None
    kept: list[Any] = field(default_factory=list)  # so that no storage's address is used again
    of_first: set[int] = field(default_factory=set)
    of_others: set[int] = field(default_factory=set)

    def mark(self, tensor: Tensor, where: set[int]) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self.kept.append(storage)
            where.add(storage._cdata)

    def is_in(self, tensor: Tensor, where: set[int]) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in where


class Discovery(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the layers of a module, in the passes over it that this mode sees.

    Args:
        module: The scoring view.

    Attributes:
        found: Layers by name.
        shapes: Of each, the shapes of its inputs.
        last: The name of the layer that was called last.
        called_layers: Those that were called since this was last cleared.
        called: Whether any module was called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Layer] = {}
        self.shapes: dict[str, list[torch.Size]] = {}
        self.last: str | None = None
        self.called_layers: set[str] = set()
        self.called = False
        self._module, self._thread = module, threading.get_ident()
        self._stack: list[_Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: for that PyTorch would load its compiler, seconds of a process that compiles none."""
        return False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Follow the modules' calls, in this thread."""
        handles, lasting = [], Names.of(self._module)
        try:
            for name, part in self._module.named_modules():
                if isinstance(part, torch.jit.ScriptModule):
                    continue
                names = lasting.layers(name)
                is_leaf = bool(names) and _is_leaf(name, part)
                enter = functools.partial(self._enter, names, is_leaf)
                handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(part.register_forward_hook(self._leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self,
        names: tuple[str, ...],
        is_leaf: bool,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        if threading.get_ident() != self._thread:
            return
        self.called = True
        first = first_tensor_of(args, kwargs)
        call = _Call(names, module, is_leaf, first)
        for tensor in filter(_is_tensor, tree_leaves((args, kwargs))) if is_leaf else ():
            call.mark(tensor, call.of_first if tensor is first else call.of_others)
        self._stack.append(call)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        call = self._stack[-1] if self._stack else None
        if call is not None and call.is_leaf and call.first is not None:
            given = [t for t in tree_leaves((args, kwargs)) if _is_tensor(t)]
            others = [t for t in given if call.is_in(t, call.of_others)]
            own = [t for t in given if call.is_in(t, call.of_first)]
            if len(own) == 1 and not others:
                self._look(call, func, args, given, own[0])
            made = [t for t in tree_leaves(result) if _is_tensor(t)]
            for tensor in made if own or others else ():
                call.mark(tensor, call.of_first if own else call.of_others)
        return result

    def _look(
        self, call: _Call, func: Any, args: tuple[Any, ...], given: list[Tensor], own: Tensor
    ) -> None:
        """Whether an operation on what comes from a call's first tensor makes it a layer."""
        h = call.first
        assert h is not None
        layer = _layer_of(call.module, func, args, given, own, h)
        if layer is None:
            return
        for name in call.names:
            self.found.setdefault(name, layer)
            self.last = name
            self.called_layers.add(name)
            shapes = self.shapes.setdefault(name, [])
            if h.shape not in shapes:
                shapes.append(h.shape)


def first_tensor_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a call's arguments, by position or else by keyword."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    return next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def _layer_of(
    module: nn.Module,
    func: Any,
    args: tuple[Any, ...],
    given: list[Tensor],
    own: Tensor,
    h: Tensor,
) -> Layer | None:
    """The layer that makes an operation on ``own`` of its input h; None if it is none."""
    parts = func._schema.name.partition("::")[2].strip("_").split("_")
    if not (h.is_floating_point() or h.is_quantized) or h.ndim < 2:
        return None
    if any(_CONVOLUTION.fullmatch(part) for part in parts):
        fits = own.ndim == h.ndim > 2 and own.shape[1] == h.shape[1]
        if not fits or _OTHER_CONVOLUTION in parts:
            return None
        transposed = "transpose" in parts or args[_TRANSPOSED:][:1] == (True,)
        return Layer(h.shape[1], 1, 0 if transposed else 1)
    if any(_PRODUCT.fullmatch(part) for part in parts):
        # Of two factors the second is mapped by the first, along its last dimension but one.
        is_second = sum(t.ndim > 1 for t in given) > 1 and own is given[-1]
        contracted = own.shape[-2 if is_second and own.ndim > 1 else -1]
        if contracted != h.shape[-1]:
            return None
        others = [t for t in given if t is not own and t.ndim > 1]
        along = -1 if is_second else -2
        dimension = _weight_dimension(module, others[-1], along) if others else 1
        return Layer(h.shape[-1], -1, dimension)
    return None


def _weight_dimension(module: nn.Module, matrix: Tensor, contracted: int) -> int:
    """Where a weight has the input's channels, which are along a dimension of the matrix.

    The matrix is a view of the weight, transposed or not, so that its steps in memory tell; of one
    that is computed from parameters, they are in the order of its own dimensions.
    """
    step, storage = matrix.stride(contracted), _storage(matrix)
    for weight in module.parameters():
        own = _storage(weight)
        is_its = storage is not None and own is not None and own._cdata == storage._cdata
        if is_its and weight.ndim == 2:
            return int(weight.stride(1) == step)
    return int(step == 1)


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Whether a module has no part with parameters, but for those that compute its own."""
    parts = ((key, part) for key, part in module.named_children() if key != "parametrizations")
    return "parametrizations" not in name.split(".") and not any(
        True for _, part in parts for _ in part.parameters()
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> Any:
    """What holds the values of a tensor; None for one that has no storage of its own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, opaque (MKL-DNN), a functorch wrapper
        return None
