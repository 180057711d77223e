"""Watches a forward pass and turns one plain backward pass into per-sample gradient norms.

Rules are looked up by *operation*, not by module type: a `TorchFunctionMode` sees every call of a
PyTorch function in this thread, so a parameter is followed wherever it is used (a layer, a
functional call, a module called twice, tied weights, a weight computed from parameters), no hook is
put on the model and other threads that run it see nothing.

Three kinds of tensors are told apart. *Data* depend on the batch. A *derived* tensor depends on
parameters alone (a parameter itself, or a weight-normed or LU-composed one). All else is constant.
Where an operation takes derived and data tensors together, it gets the derived ones without their
graph, so that the backward pass computes no weight gradient, and a hook on its output hands the
output's gradient to the operation's rule. Gradients of a derived tensor then go back to its
parameters through its own small graph.

What no rule covers is put on the list `left_over`, for the loop over samples: exact, only slower.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from ood_monitor.gradients.factors import (
    Factor,
    Granularity,
    Materialised,
    full_precision,
    norms_by,
)
from ood_monitor.gradients.order import CREATING, SHAPED_BY_OTHERS, sample_dimensions
from ood_monitor.gradients.rules import (
    JOINING,
    POINTWISE,
    REWRITES,
    RULES,
    is_of_each_sample,
    joined,
    pointwise,
)
from ood_monitor.gradients.tracking import Data, DataMarks, map_arguments, tensors_of

__all__ = ["Recorder"]

#: Elements of per-sample gradients held at once while several uses of a parameter are summed.
_HELD_ELEMENTS = 2**24


@dataclass(eq=False)
class _Source:
    """A derived tensor and the parameters it is made of; for a parameter, itself."""

    tensor: Tensor
    names: tuple[str, ...]

    @property
    def is_parameter(self) -> bool:
        return self.tensor.is_leaf


@dataclass(eq=False)
class _Use:
    """One operation that took derived and data tensors; alive as long as its graph is."""

    term: int  # that was being computed, counted from 0
    sources: list[_Source]
    factors: Callable[[Tensor], list[Factor]]
    saved: list[tuple[Tensor, int]]  # the data it took, and their versions then

    def forget(self) -> None:
        """Let go of the data, which the hook would keep until the whole graph is freed."""
        self.factors, self.saved = lambda g: [], []

    def is_intact(self) -> bool:
        return all(tensor._version == version for tensor, version in self.saved)


#: Puts other data under a tensor, past its graph.
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

#: Gives its data past its version, and past PyTorch.
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_UNSEEN = frozenset({_GET_DATA, Tensor.numpy, Tensor.__array__})


class Recorder(TorchFunctionMode):
    """Records the forward pass that runs inside it; :meth:`squared_norms` makes the backward one.

    Args:
        module: The module whose parameters are followed.
        selected: Which parameters, by name, get features. The backward pass stops at the first.
        data: The tensors of the batch.
        n: Number of gradients: the batch size, or the number of groups.
        by: The granularity of each.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Callable[[str], bool],
        data: Iterable[Tensor],
        n: int,
        by: Callable[[str], Granularity],
    ) -> None:
        super().__init__()
        self.left_over: set[str] = set()
        #: The followed parameters that met data, in the order of their first use.
        self.used: dict[str, None] = {}
        #: Terms, counted from 0, whose graph a later one needs.
        self.shared: set[int] = set()
        self._term = 0
        self._n, self._by = n, by
        #: The followed parameters by name, in module order.
        self.leaves: dict[str, Tensor] = {}
        # By identity; of a derived tensor, which its source keeps alive, or of a parameter.
        self._sources: dict[int, _Source] = {}
        self._plain: dict[int, Tensor] = {}
        for name, parameter in module.named_parameters():
            # Aliases of the storage, so that no flag of the module's own tensors is ever set.
            value = parameter.detach()
            self._plain[id(parameter)] = value
            if selected(name) and (parameter.is_floating_point() or parameter.is_complex()):
                if parameter.is_complex():  # the rules are those of real numbers
                    self.left_over.add(name)
                leaf = value.detach().requires_grad_()
                self.leaves[name] = leaf
                self._sources[id(parameter)] = _Source(leaf, (name,))
        self._parameters = list(module.parameters())  # keeps the ids above valid
        self._data = DataMarks()
        for tensor in data:
            self._data.set(tensor, Data(dimension=0, anchored=False))
        #: Parameters that met data of rows created alone.
        self._met_created: set[str] = set()
        self._uses: dict[str, weakref.WeakSet[_Use]] = {}
        self._anchors: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._keep_graph, self._backward = True, False
        self._collected: list[tuple[_Source, Factor]] = []
        self._norms: dict[str, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside `torch.func`, whose tensors stand for others, as do their gradients.
            self._leave(self._sources.values())
            return func(*self._substituted(args), **self._substituted(kwargs))
        if func in REWRITES:
            with self:  # so that what it is made of comes here too
                result = REWRITES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunction():  # a look at a tensor is not a call of the model's
            tensors = tensors_of(args) + tensors_of(kwargs.values())
            of_shape = func in SHAPED_BY_OTHERS
            sources = [s for tensor in tensors if (s := self._sources.get(id(tensor))) is not None]
            data = [(t, d) for t in tensors[: 1 if of_shape else None] if (d := self._data.get(t))]
            if any(self._is_unknown(tensor) for tensor in tensors) or (data and func == _SET_DATA):
                self._leave(self._sources.values())
            if sources and data and not torch.is_grad_enabled():
                self._leave(sources)  # as in the forward of an `autograd.Function`
        if not data:
            return self._constant_or_derived(func, args, kwargs, sources)
        consumed = bool(sources) and torch.is_grad_enabled() and func not in CREATING
        if consumed or any(id(tensor) in self._plain for tensor in tensors):
            plain = self._substituted(args), self._substituted(kwargs)
        else:
            plain = args, dict(kwargs)
        result = func(*plain[0], **plain[1])
        if func in _UNSEEN:
            self._follow(func, args[0], result)
        changed = args[0] if func is Tensor.__setitem__ else result  # which has no result
        with torch._C.DisableTorchFunction():
            dimensions = self._dimensions(func, args, kwargs, changed, data)
        if consumed:
            self.used |= dict.fromkeys(name for source in sources for name in source.names)
            result = self._consume(func, (args, kwargs), plain, result, sources, data, dimensions)
            changed = args[0] if func is Tensor.__setitem__ else result
        with torch._C.DisableTorchFunction():
            self._mark(func, changed, data, dimensions)
        return result

    def squared_norms(self, value: Tensor, *, keep_graph: bool = True) -> dict[str, Tensor]:
        """Squared norms of the gradient of ``value``, by parameter.

        Args:
            value: The next term computed inside this recorder, shape (B,).
            keep_graph: Whether a later term may need the graph; else it is freed on the way.

        Returns:
            ``{parameter: (n,)}``, or ``(n, rows)``. Parameters in :attr:`left_over` are missing
            from it or incomplete.
        """
        self._collected, self._norms = [], {}
        if id(value) in self._sources:
            self._leave([self._sources[id(value)]])
        elif value.requires_grad and self._anchors:
            # Asking for the gradients of the anchors alone drives the whole backward pass.
            anchors = list(self._anchors.values())
            self._keep_graph, self._backward = keep_graph, True
            try:
                torch.autograd.grad(
                    value.sum(), anchors, retain_graph=keep_graph, allow_unused=True
                )
            except CheckpointError:  # gradient checkpointing runs a forward pass unrecorded
                self._leave(self._sources.values())
            finally:
                self._backward = False
        self._sum_up_uses()
        self._term += 1
        return self._norms

    # The forward pass.

    def _substituted(self, arguments: Any, *, graph: bool = False) -> Any:
        """The arguments with parameters as aliases, derived tensors with or without their graph."""

        def substitute(tensor: Tensor) -> Tensor:
            source = self._sources.get(id(tensor))
            if source is None:
                return self._plain.get(id(tensor), tensor)
            return source.tensor if graph else source.tensor.detach()

        return map_arguments(substitute, arguments)

    def _dimensions(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        changed: Any,
        data: list[tuple[Tensor, Data]],
    ) -> list[int | None]:
        """The sample dimension of each tensor of ``changed``; left over is what it refutes."""
        known = [(tensor, d.dimension) for tensor, d in data]
        found = sample_dimensions(func, args, kwargs, tensors_of((changed,)), self._n, known)
        if None in found and func not in CREATING and any(d.created for _, d in data):
            self.left_over |= self._met_created
        return found

    def _mark(
        self,
        func: Callable[..., Any],
        changed: Any,
        data: list[tuple[Tensor, Data]],
        dimensions: list[int | None],
    ) -> None:
        """Take what a call on data gave, or wrote into, for data."""
        anchored = any(known.anchored for _, known in data)
        created = func in CREATING or all(known.created for _, known in data)
        for tensor, dimension in zip(tensors_of((changed,)), dimensions, strict=True):
            known = self._data.get(tensor)
            through = tensor.requires_grad and (anchored or bool(known and known.anchored))
            number = dimension is None and tensor.ndim == 0 and not tensor.requires_grad
            if not (number or (dimension is None and func in CREATING)):  # else constants
                self._data.set(tensor, Data(dimension, through, created))

    def _constant_or_derived(
        self, func: Callable[..., Any], args: Any, kwargs: Any, sources: list[_Source]
    ) -> Any:
        result = func(*self._substituted(args, graph=True), **self._substituted(kwargs, graph=True))
        if sources and torch.is_grad_enabled():
            names = tuple(dict.fromkeys(name for source in sources for name in source.names))
            for tensor in tensors_of((result,)):
                if tensor.requires_grad and id(tensor) not in self._plain:
                    self._sources[id(tensor)] = _Source(tensor, names)
        return result

    def _consume(
        self,
        func: Callable[..., Any],
        given: Any,
        plain: Any,
        result: Any,
        sources: list[_Source],
        data: list[tuple[Tensor, Data]],
        dimensions: list[int | None],
    ) -> Any:
        changed_in_place = any(result is tensor for tensor in tensors_of(plain))
        numbers = [source.tensor for source in sources] + tensors_of((result,))
        real = not any(tensor.is_complex() for tensor in numbers)
        covered = real and dimensions == [0] and isinstance(result, Tensor) and not changed_in_place
        factors = self._factors(func, given, plain, result) if covered else None
        if factors is None:  # exact all the same: the loop takes these parameters
            self._leave(sources)
            return result
        if all(known.created for _, known in data):
            self._met_created.update(name for source in sources for name in source.names)
        if not any(known.anchored for _, known in data):
            result = result + self._anchor(result)
            self._data.set(result, Data(0, anchored=True))
        saved = [(tensor.detach(), tensor._version) for tensor, _ in data]
        use = _Use(self._term, sources, factors, saved)
        for name in {name for source in sources for name in source.names}:
            self._uses.setdefault(name, weakref.WeakSet()).add(use)
        result.register_hook(lambda g: self._on_gradient(use, g))
        return result

    def _factors(
        self, func: Callable[..., Any], given: Any, plain: Any, result: Tensor
    ) -> Callable[[Tensor], list[Factor]] | None:
        """What gives the factors of the sources in order, or None if no rule covers the call."""
        if func in POINTWISE:
            return self._pointwise_factors(func, given, plain, result)
        if func in JOINING:
            return self._joined_factors(given, result)
        return self._rule_factors(func, given, plain) if func in RULES else None

    def _rule_factors(
        self, func: Callable[..., Any], given: Any, plain: Any
    ) -> Callable[[Tensor], list[Factor]] | None:
        rule, n = RULES[func], self._n
        arguments = dict(zip(rule.arguments, given[0], strict=False)) | given[1]
        values = dict(zip(rule.arguments, plain[0], strict=False)) | plain[1]
        values = map_arguments(Tensor.detach, values)
        names = [
            k for k, v in arguments.items() if isinstance(v, Tensor) and id(v) in self._sources
        ]
        x = arguments["input"]
        if not set(names) <= {"weight", "bias"} or not self._is_batch_first(x):
            return None

        def factors(g: Tensor) -> list[Factor]:
            by_name = rule.factors(n, g, map_arguments(full_precision, values))
            return [by_name[name] for name in names]

        return factors

    def _pointwise_factors(
        self, func: Callable[..., Any], given: Any, plain: Any, result: Tensor
    ) -> Callable[[Tensor], list[Factor]] | None:
        (args, _), (values, options) = given, map_arguments(Tensor.detach, plain)
        tensors = {i: v for i, v in enumerate(args) if isinstance(v, Tensor)}
        followed = any(v.ndim == result.ndim and self._is_batch_first(v) for v in tensors.values())
        taken = {i: s for i, v in tensors.items() if (s := self._sources.get(id(v))) is not None}
        # A parameter of so many rows as the batch has would not fit any other batch.
        fixed = any(s.is_parameter and is_of_each_sample(args[i], result) for i, s in taken.items())
        if fixed or not taken or not followed:
            return None
        operation, n = partial(func, **options), self._n

        def factors(g: Tensor) -> list[Factor]:
            arguments = map_arguments(full_precision, values)
            return [pointwise(operation, n, g, arguments, i) for i in taken]

        return factors

    def _joined_factors(
        self, given: Any, result: Tensor
    ) -> Callable[[Tensor], list[Factor]] | None:
        (tensors, *rest), options = given
        dim = (rest[0] if rest else options.get("dim", options.get("axis", 0))) % result.ndim
        if dim == 0 or any(len(tensor) != len(result) for tensor in tensors):
            return None
        sizes, n = [tensor.shape[dim] for tensor in tensors], self._n
        positions = [i for i, tensor in enumerate(tensors) if id(tensor) in self._sources]
        return lambda g: [joined(n, g, dim, sizes, i) for i in positions]

    def _follow(self, func: Callable[..., Any], tensor: Tensor, result: Any) -> None:
        """Know of writes past a tensor's version: by its data, which has its own, or in NumPy."""
        with torch._C.DisableTorchFunction():
            if func == _GET_DATA:
                self._data.follow(tensor, result)
            else:
                self._data.lose(tensor)

    def _is_batch_first(self, tensor: Tensor) -> bool:
        known = self._data.get(tensor)
        whole = tensor.ndim > 0 and len(tensor) > 0 and len(tensor) % self._n == 0
        return whole and known is not None and known.dimension == 0

    def _anchor(self, like: Tensor) -> Tensor:
        """A zero that requires a gradient: what makes a result part of the graph."""
        key = (like.dtype, like.device)
        if key not in self._anchors:
            self._anchors[key] = like.new_zeros(()).requires_grad_()
        return self._anchors[key]

    def _is_unknown(self, tensor: Tensor) -> bool:
        """Whether a gradient goes through it that no call has shown: of a write through a view."""
        if not tensor.requires_grad or isinstance(tensor, nn.Parameter):  # of another module
            return False
        known = id(tensor) in self._sources or id(tensor) in self._plain
        return not known and self._data.get(tensor) is None

    def _leave(self, sources: Iterable[_Source]) -> None:
        self.left_over.update(name for source in sources for name in source.names)

    # The backward pass.

    def _on_gradient(self, use: _Use, g: Tensor) -> None:
        self.shared.update(range(use.term, self._term))
        if not self._backward:  # a gradient in the forward pass: its own gradient is not seen
            self._leave(self._sources.values())
            return
        if not use.is_intact():
            self._leave(use.sources)
            return
        try:
            with torch._C.DisableTorchFunction():
                factors = use.factors(full_precision(g.detach()))
        except NotImplementedError:
            self._leave(use.sources)
            return
        if not self._keep_graph:
            use.forget()
        for source, factor in zip(use.sources, factors, strict=True):
            name = source.names[0]
            if source.is_parameter and len(self._uses[name]) == 1:
                with torch._C.DisableTorchFunction():
                    self._norms[name] = norms_by(self._by(name), factor)
            else:
                self._collected.append((source, factor))

    def _sum_up_uses(self) -> None:
        """Norms of parameters with several uses, and of those behind derived tensors."""
        leaves = self.leaves
        names = {name for source, _ in self._collected for name in source.names}
        elements = sum(source.tensor.numel() for source, _ in self._collected)
        step = max(1, _HELD_ELEMENTS // max(1, elements + sum(leaves[k].numel() for k in names)))
        norms: dict[str, list[Tensor]] = {}
        for start in range(0, self._n if names else 0, step):
            stop = min(start + step, self._n)
            for name, total in self._summed_gradients(leaves, start, stop).items():
                found = norms_by(self._by(name), Materialised(total))
                norms.setdefault(name, []).append(found)
        self._norms |= {name: torch.cat(pieces) for name, pieces in norms.items()}

    def _summed_gradients(
        self, leaves: dict[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for source, factor in self._collected:
            gradient = factor.gradients(start, stop)
            for name, part in _to_parameters(source, leaves, gradient).items():
                totals[name] = totals[name] + part if name in totals else part
        return totals


def _to_parameters(
    source: _Source, leaves: dict[str, Tensor], gradient: Tensor
) -> dict[str, Tensor]:
    """Per-sample gradients of a derived tensor taken back to the parameters it is made of."""
    if source.is_parameter:
        return {source.names[0]: gradient}
    inputs = [leaves[name] for name in source.names]
    gradient = gradient.to(source.tensor.dtype)
    parts = torch.autograd.grad(
        source.tensor, inputs, gradient, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    pairs = zip(source.names, parts, strict=True)
    return {name: full_precision(part) for name, part in pairs if part is not None}
