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

Where it is not known whose the rows of an operation are, the graph gets a second backward pass, of
weighted terms, which shows it (:mod:`~ood_monitor.gradients.owners`).

What no rule covers is put on the list `left_over`, with the reason, for the loop over samples:
exact, only slower.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    united,
)
from ood_monitor.gradients.order import CREATING, SHAPED_BY_OTHERS, sample_dimensions
from ood_monitor.gradients.owners import MOST_PASSES, Owners, Weighted, weights_of
from ood_monitor.gradients.products import PRODUCTS
from ood_monitor.gradients.recurrent import REWRITTEN
from ood_monitor.gradients.rules import ADDING, IN_PLACE, POINTWISE, REWRITES, RULES, SPREADING
from ood_monitor.gradients.tracking import Data, DataMarks, map_arguments, tensors_of
from ood_monitor.gradients.uses import Covered, Given, Rows, covered, spread_along
from ood_monitor.gradients.views import order_of, reordered

__all__ = ["Recorder"]

#: Elements of per-sample gradients held at once while several uses of a parameter are summed.
_HELD_ELEMENTS = 2**24


@dataclass(eq=False)
class _Source:
    """A derived tensor and the parameters it is made of; for a parameter, itself."""

    tensor: Tensor
    names: tuple[str, ...]
    version: int = 0  # of a derived tensor, which later writes may have made of others
    order: tuple[int, ...] | None = None  # of a parameter's dimensions, where it is no more

    @property
    def is_parameter(self) -> bool:
        return self.tensor.is_leaf

    def is_intact(self) -> bool:
        return self.is_parameter or self.tensor._version == self.version


@dataclass(eq=False)
class _Use:
    """One operation that took derived and data tensors; alive as long as its graph is."""

    term: int  # that was being computed, counted from 0
    sources: list[_Source]
    form: Covered | None
    dimension: int | None  # along which its rows are in order, as far as is known
    saved: list[tuple[Tensor, int]]  # the data it took, and their versions then

    def forget(self) -> None:
        """Let go of the data, which the hook would keep until the whole graph is freed."""
        self.form, self.saved = None, []

    def is_intact(self) -> bool:
        """Whether neither data nor derived tensors were written over since."""
        kept = all(tensor._version == version for tensor, version in self.saved)
        return kept and all(source.is_intact() for source in self.sources)

    def factors(self, g: Tensor, rows: Rows) -> list[Factor]:
        return [] if self.form is None else self.form.factors(g, rows)


@dataclass(eq=False)
class _Waiting:
    """A use whose rows' owners are not found yet, and what backward passes brought to it."""

    full: Tensor  # the gradient of the operation's result
    g: Tensor  # as rows
    passes: list[Weighted]


#: Puts other data under a tensor, past its graph.
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

#: Gives its data past its version, and past PyTorch.
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_UNSEEN = frozenset({_GET_DATA, Tensor.numpy, Tensor.__array__})

#: What asks a tensor for no more than its form, which its substitute has too.
_ASKING = frozenset(
    [
        *(getattr(Tensor, k).__get__ for k in ("shape", "ndim", "dtype", "device", "layout")),
        *(getattr(Tensor, k) for k in ("size", "dim", "numel", "nelement", "__len__", "stride")),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size),
    ]
)


class Recorder(TorchFunctionMode):
    """Records the forward pass that runs inside it; :meth:`squared_norms` makes the backward one.

    Args:
        module: The module whose parameters are followed.
        selected: Which parameters, by name, get features. The backward pass stops at the first.
        data: The tensors of the batch.
        n: Number of gradients: the batch size, or the number of groups.
        by: The granularity of each.
        by_size: Whether what is put in as many rows as the batch has is taken for the samples'
            rows, as a learned start state. Where it is not that, order is lost.
        confirms: Whether owners of rows are found twice.
        finds_owners: Whether they are found at all; else the loop takes parameters of such rows.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Callable[[str], bool],
        data: Iterable[Tensor],
        n: int,
        by: Callable[[str], Granularity],
        *,
        by_size: bool = True,
        confirms: bool = True,
        finds_owners: bool = True,
    ) -> None:
        super().__init__()
        #: Parameters that only the loop gets right, and why.
        self.left_over: dict[str, str] = {}
        #: Parameters whose rows' owners were found in weighted passes.
        self.found_owners: set[str] = set()
        #: Whether rows were taken for the samples' by their number, and whether that was wrong.
        self.guessed, self.refuted = False, False
        #: The followed parameters that met data, in the order of their first use.
        self.used: dict[str, None] = {}
        #: Terms, counted from 0, whose graph a later one needs.
        self.shared: set[int] = set()
        self._term = 0
        self._n, self._by = n, by
        self._by_size, self._confirms, self._finds_owners = by_size, confirms, finds_owners
        #: The followed parameters by name, in module order.
        self.leaves: dict[str, Tensor] = {}
        # By identity; of a derived tensor, which its source keeps alive, or of a parameter.
        self._sources: dict[int, _Source] = {}
        self._plain: dict[int, Tensor] = {}
        self._parameters = list(module.named_parameters())  # keeps the ids valid
        for name, parameter in self._parameters:
            # Aliases of the storage, so that no flag of the module's own tensors is ever set.
            value = parameter.detach()
            self._plain[id(parameter)] = value
            if selected(name) and (parameter.is_floating_point() or parameter.is_complex()):
                if parameter.is_complex():  # the rules are those of real numbers
                    self.left_over[name] = "complex numbers"
                leaf = value.detach().requires_grad_()
                self.leaves[name] = leaf
                self._sources[id(parameter)] = _Source(leaf, (name,))
        self._data = DataMarks()
        self._rows = 0
        for tensor in data:
            self._data.set(tensor, Data(dimension=0, anchored=False))
            self._rows = len(tensor)
        #: Uses of data of rows created alone, and those whose owners have to be found.
        self._of_created: list[weakref.ref[_Use]] = []
        self._unordered: weakref.WeakSet[_Use] = weakref.WeakSet()
        self._uses: dict[str, weakref.WeakSet[_Use]] = {}
        self._anchors: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._keep_graph, self._backward = True, False
        #: The weights of the pass that is being made; None of the plain one.
        self._weights: Tensor | None = None
        self._waiting: dict[_Use, _Waiting] = {}
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
        if func in _ASKING:
            return func(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside `torch.func`, whose tensors stand for others, as do their gradients.
            self._leave(self._sources.values(), "a transform of `torch.func`")
            return func(*self._substituted(args), **self._substituted(kwargs))
        if func in REWRITES:
            with self:  # so that what it is made of comes here too
                result = REWRITES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunction():  # a look at a tensor is not a call of the model's
            tensors = tensors_of(args) + tensors_of(kwargs.values()) if kwargs else tensors_of(args)
            sources, data, has_plain, is_unknown = self._told_apart(func, tensors)
            if is_unknown or (data and func == _SET_DATA):
                self._leave(self._sources.values(), "a write that no call shows")
            if sources and data and not torch.is_grad_enabled():
                # As in the forward of an `autograd.Function`.
                self._leave(sources, "a call without gradients")
            if sources and not data and self._by_size and self._n > 1 and torch.is_grad_enabled():
                if func in SPREADING:
                    return self._spread(func, args, kwargs, sources)
                data = self._created_by_size(func, tensors)
        if not data:
            if not sources and not has_plain:
                return func(*args, **kwargs)
            return self._constant_or_derived(func, args, kwargs, sources)
        consumed = bool(sources) and torch.is_grad_enabled()
        if consumed and self._data.get(args[0]) is not None:
            if func in REWRITTEN:
                result = self._recurrent(func, args, kwargs, data)
                if result is not NotImplemented:
                    return result
            with self:
                if func in IN_PLACE:
                    own = args[0] if IN_PLACE[func] in ADDING else args[0].clone()
                    return args[0].copy_(IN_PLACE[func](own, *args[1:], **kwargs))
                if func is Tensor.__setitem__ and id(args[2]) in self._sources:
                    # Rows of the data's, so that it is known whose they are.
                    rows = args[0][args[1]].detach().clone().zero_()
                    return func(args[0], args[1], args[2] + rows)
        consumed = consumed and func not in CREATING
        if consumed or has_plain:
            plain = self._substituted(args), self._substituted(kwargs)
        else:
            plain = args, kwargs
        result = func(*plain[0], **plain[1])
        if func in _UNSEEN:
            self._follow(func, args[0], result)
        with torch._C.DisableTorchFunction():
            changed = _changed(func, args, result)
            dimensions = self._dimensions(func, args, kwargs, changed, data)
            if not consumed:
                self._mark(func, changed, data, dimensions)
                return result
        result = self._consume(func, (args, kwargs), plain, result, sources, data, dimensions)
        with torch._C.DisableTorchFunction():
            self._mark(func, _changed(func, args, result), data, dimensions)
        return result

    def _told_apart(
        self, func: Callable[..., Any], tensors: list[Tensor]
    ) -> tuple[list[_Source], list[tuple[Tensor, Data]], bool, bool]:
        """Derived tensors and data, and whether there are the model's own or unknown ones."""
        sources, data, has_plain, is_unknown = [], [], False, False
        count = 1 if func in SHAPED_BY_OTHERS else len(tensors)
        for i, tensor in enumerate(tensors):
            key = id(tensor)
            source, known = self._sources.get(key), self._data.get(tensor)
            is_plain = key in self._plain
            if source is not None:
                sources.append(source)
            elif known is None and not is_plain and tensor.requires_grad:
                # A gradient goes through it that no call has shown, as of a write through a view.
                # The type last, which takes long to ask for; a parameter is of another module.
                is_unknown = is_unknown or not isinstance(tensor, nn.Parameter)
            if known is not None and i < count:
                data.append((tensor, known))
            has_plain = has_plain or is_plain
        return sources, data, has_plain, is_unknown

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
            self._leave([self._sources[id(value)]], "a term that is no function of the data")
        elif value.requires_grad and self._anchors:
            self._keep_graph = keep_graph or (self._finds_owners and bool(self._unordered))
            self._differentiate(value, None)
            self._settle(value)
        self._sum_up_uses()
        self._term += 1
        return self._norms

    def _differentiate(self, value: Tensor, weights: Tensor | None) -> None:
        """One backward pass; the hooks of uses see what it brings."""
        # Asking for the gradients of the anchors alone drives the whole backward pass.
        anchors = list(self._anchors.values())
        self._weights, self._backward = weights, True
        ones = torch.ones_like(value) if weights is None else weights
        each = ones.repeat_interleave(len(value) // len(ones))
        try:
            torch.autograd.grad(
                value, anchors, each, retain_graph=self._keep_graph, allow_unused=True
            )
        except CheckpointError:  # gradient checkpointing runs a forward pass unrecorded
            self._leave(self._sources.values(), "gradient checkpointing")
        finally:
            self._weights, self._backward = None, False

    def _settle(self, value: Tensor) -> None:
        """Find the owners of the rows that wait for them, by passes of weighted terms."""
        for number in range(1, MOST_PASSES + 1):
            if self._waiting:
                self._differentiate(value, weights_of(self._n, number).to(value))
                self._waiting = self._still_open(confirms=number == 1 and self._confirms)
        self._leave([s for use in self._waiting for s in use.sources], "rows whose owner is open")
        self._waiting = {}

    def _still_open(self, *, confirms: bool) -> dict[_Use, _Waiting]:
        """Those of which a further pass has to tell; the factors of the others are taken."""
        still: dict[_Use, _Waiting] = {}
        for use, each in self._waiting.items():
            with torch._C.DisableTorchFunction():
                owners = Owners.found(each.g, each.passes) if each.passes else None
            if owners is None:
                self._leave(use.sources, "rows that are of no sample alone")
            elif confirms or not owners.certain:
                still[use] = each
            else:
                self.found_owners.update(name for s in use.sources for name in s.names)
                self._take(use, each.full, owners)
        return still

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
        changed: list[Tensor],
        data: list[tuple[Tensor, Data]],
    ) -> list[int | None]:
        """The sample dimension of each tensor of ``changed``."""
        known = [(tensor, d.dimension) for tensor, d in data]
        found = sample_dimensions(func, args, kwargs, changed, self._n, known)
        if None in found and func not in CREATING and any(d.created for _, d in data):
            self._refute()
        return found

    def _refute(self) -> None:
        """Rows that were created may be no longer those of the samples, in order."""
        self.refuted = True
        for use in filter(None, (each() for each in self._of_created)):
            use.dimension = None
            self._unordered.add(use)

    def _mark(
        self,
        func: Callable[..., Any],
        changed: list[Tensor],
        data: list[tuple[Tensor, Data]],
        dimensions: list[int | None],
    ) -> None:
        """Take what a call on data gave, or wrote into, for data."""
        anchored = any([known.anchored for _, known in data])
        created = func in CREATING or all([known.created for _, known in data])
        for tensor, dimension in zip(changed, dimensions, strict=True):
            through = tensor.requires_grad
            if through and not anchored:
                known = self._data.get(tensor)
                through = known is not None and known.anchored
            if dimension is None:
                number = tensor.ndim == 0 and not tensor.requires_grad
                if number or func in CREATING:  # constants
                    continue
            self._data.set(tensor, Data(dimension, through, created))

    def _constant_or_derived(
        self, func: Callable[..., Any], args: Any, kwargs: Any, sources: list[_Source]
    ) -> Any:
        result = func(*self._substituted(args, graph=True), **self._substituted(kwargs, graph=True))
        if sources and torch.is_grad_enabled():
            names = tuple(dict.fromkeys(name for source in sources for name in source.names))
            for tensor in _changed(func, args, result):
                if tensor.requires_grad and id(tensor) not in self._plain:
                    order = order_of(tensor, self.leaves[names[0]]) if len(names) == 1 else None
                    self._sources[id(tensor)] = _Source(tensor, names, tensor._version, order)
        return result

    def _created_by_size(
        self, func: Callable[..., Any], tensors: list[Tensor]
    ) -> list[tuple[Tensor, Data]]:
        """Constants among a call's tensors that have a row for each sample, as data."""
        own = [t for t in tensors if id(t) in self._sources]
        if func in RULES or func in PRODUCTS:
            given = [t for t in tensors[:1] if t.ndim]
        elif func in POINTWISE:  # a mask of a weight has the weight's own rows
            given = [t for t in tensors if all(_is_above(t.shape, p.shape) for p in own)]
        else:
            return []
        found = [t for t in given if self._is_constant(t) and len(t) == self._rows]
        self.guessed |= bool(found)
        return [(t, Data(dimension=0, anchored=False, created=True)) for t in found]

    def _is_constant(self, tensor: Tensor) -> bool:
        known = id(tensor) in self._sources or id(tensor) in self._plain
        return not known and tensor.ndim > 0 and not tensor.requires_grad

    def _spread(
        self, func: Callable[..., Any], args: Any, kwargs: Any, sources: list[_Source]
    ) -> Any:
        """A derived tensor put in rows: its use, if there are as many as the batch has."""
        plain = self._substituted(args), self._substituted(kwargs)
        result = func(*plain[0], **plain[1])
        d = spread_along(sources[0].tensor, result, self._rows)
        if d is None or sources[0].tensor.is_complex():
            return self._constant_or_derived(func, args, kwargs, sources)
        self.guessed = True
        result = self._consume(func, (args, kwargs), plain, result, sources, [], [d])
        with torch._C.DisableTorchFunction():
            self._mark(func, [result], [], [d])
        return result

    def _recurrent(
        self, func: Callable[..., Any], args: Any, kwargs: Any, data: list[tuple[Tensor, Data]]
    ) -> Any:
        """A recurrent layer or cell, in operations that have rules; its states are not derived."""
        states = tensors_of((args[1],))
        if any(id(state) in self._sources for state in states):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            like = states if args[0].ndim == 2 else [args[0], *states]  # as the results are
            known = [(tensor, d.dimension) for tensor, d in data]
            found = sample_dimensions(func, args, kwargs, like, self._n, known)
        created = all(d.created for _, d in data)

        def mark(tensor: Tensor, dimension: int) -> Tensor:
            d = None if None in found else dimension if self._n > 1 else 0
            with torch._C.DisableTorchFunction():
                self._data.set(tensor, Data(d, tensor.requires_grad, created))
            return tensor

        with self:
            return REWRITTEN[func](mark, *args, **kwargs)

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
        self.used |= dict.fromkeys(name for source in sources for name in source.names)
        if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
            return result  # as of a comparison, which has no gradient
        if _is_checkpointed():
            # Its second forward pass, unrecorded, may save other tensors of the same shapes.
            self._leave(self._sources.values(), "gradient checkpointing")
        form = self._form(func, given, plain, result, sources, dimensions)
        if isinstance(form, str):  # exact all the same: the loop takes these parameters
            self._leave(sources, form)
            return result
        if not any(known.anchored for _, known in data):
            result = result + self._anchor(result)
            self._data.set(result, Data(dimensions[0], anchored=True))
        needed = () if func in ADDING else data
        saved = [(tensor.detach(), tensor._version) for tensor, _ in needed]
        use = _Use(self._term, sources, form, form.dimension, saved)
        if form.dimension is None:
            self._unordered.add(use)
        if all(known.created for _, known in data):
            self._of_created.append(weakref.ref(use))
        for name in {name for source in sources for name in source.names}:
            if name not in self._uses:
                self._uses[name] = weakref.WeakSet()
            self._uses[name].add(use)
        result.register_hook(lambda g: self._on_gradient(use, g))
        return result

    def _form(
        self,
        func: Callable[..., Any],
        given: Any,
        plain: Any,
        result: Any,
        sources: list[_Source],
        dimensions: list[int | None],
    ) -> Covered | str:
        """The closed form of a call, or why it has none."""
        name = getattr(func, "__name__", str(func))
        if not isinstance(result, Tensor) or result.ndim == 0:
            return f"`{name}`, which has no rule"
        if any(result is tensor for tensor in tensors_of(plain)):
            return f"`{name}`, which writes in place"
        numbers = [source.tensor for source in sources] + [result]
        if any(tensor.is_complex() for tensor in numbers):
            return "complex numbers"
        (d,) = dimensions
        call = Given(
            func,
            given[0],
            given[1],
            plain,
            result,
            self._n,
            lambda v: id(v) in self._sources,
            lambda v: self._sources[id(v)].is_parameter,
            self._dimension_of,
            d if d is not None and result.shape[d] > 0 == result.shape[d] % self._n else None,
        )
        found = covered(call)
        return f"`{name}`, which has no rule for this" if found is None else found

    def _dimension_of(self, tensor: Tensor) -> int | None:
        known = self._data.get(tensor)
        return None if known is None else known.dimension

    def _follow(self, func: Callable[..., Any], tensor: Tensor, result: Any) -> None:
        """Know of writes past a tensor's version: by its data, which has its own, or in NumPy."""
        with torch._C.DisableTorchFunction():
            if func == _GET_DATA:
                self._data.follow(tensor, result)
            else:
                self._data.lose(tensor)

    def _anchor(self, like: Tensor) -> Tensor:
        """A zero that requires a gradient: what makes a result part of the graph."""
        key = (like.dtype, like.device)
        if key not in self._anchors:
            self._anchors[key] = like.new_zeros(()).requires_grad_()
        return self._anchors[key]

    def _leave(self, sources: Iterable[_Source], reason: str) -> None:
        for name in (name for source in sources for name in source.names):
            self.left_over.setdefault(name, reason)

    # The backward pass.

    def _on_gradient(self, use: _Use, g: Tensor) -> None:
        if self._weights is not None:
            waiting = self._waiting.get(use)
            if waiting is not None and use.form is not None:
                rows = use.form.rows(full_precision(g.detach()))
                waiting.passes.append(Weighted(rows, self._weights))
            return
        self.shared.update(range(use.term, self._term))
        if not self._backward:  # a gradient in the forward pass: its own gradient is not seen
            self._leave(self._sources.values(), "a gradient taken in the forward pass")
        elif not use.is_intact():
            self._leave(use.sources, "what it took was written over")
        elif use.dimension is not None or use.form is None:
            self._take(use, full_precision(g.detach()), use.dimension or 0)
            if not self._keep_graph:
                use.forget()
        elif not self._finds_owners:
            self._leave(use.sources, "rows whose order is not known, beside others that are looped")
        else:
            full = full_precision(g.detach())
            self._waiting[use] = _Waiting(full, use.form.rows(full), [])

    def _take(self, use: _Use, g: Tensor, rows: Rows) -> None:
        """Take the norms of a use's gradients, or keep its factors where there are further uses."""
        try:
            with torch._C.DisableTorchFunction():
                factors = use.factors(g, rows)
        except NotImplementedError as error:
            self._leave(use.sources, str(error))
            return
        for source, factor in zip(use.sources, factors, strict=True):
            name, order = source.names[0], source.order
            if order is not None:
                leaf = self.leaves[name]
                factor = reordered(factor, order, leaf.shape)
                source = _Source(leaf, (name,))
            once = len(self._uses[name]) == 1 == sum(name in s.names for s in use.sources)
            if source.is_parameter and once:
                with torch._C.DisableTorchFunction():
                    self._norms[name] = norms_by(self._by(name), factor)
            else:
                self._collected.append((source, factor))

    def _sum_up_uses(self) -> None:
        """Norms of parameters with several uses, and of those behind derived tensors."""
        self._put_together()
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

    def _put_together(self) -> None:
        """Take the norms of parameters whose uses' factors are one, as of a recurrent layer."""
        derived = {
            k for source, _ in self._collected if not source.is_parameter for k in source.names
        }
        by_name: dict[str, list[Factor]] = {}
        for source, factor in self._collected:
            if source.is_parameter and source.names[0] not in derived:
                by_name.setdefault(source.names[0], []).append(factor)
        done = set()
        for name, factors in by_name.items():
            with torch._C.DisableTorchFunction():
                whole = united(factors)
                if whole is not None:
                    self._norms[name] = norms_by(self._by(name), whole)
                    done.add(name)
        self._collected = [(s, f) for s, f in self._collected if s.names[0] not in done]

    def _summed_gradients(
        self, leaves: dict[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        derived: dict[int, tuple[_Source, Tensor]] = {}
        for source, factor in self._collected:
            part, name = factor.gradients(start, stop), source.names[0]
            if source.is_parameter:
                totals[name] = totals[name] + part if name in totals else part
            else:
                key = id(source.tensor)
                derived[key] = source, derived[key][1] + part if key in derived else part
        for name, part in _to_parameters(list(derived.values()), leaves).items():
            totals[name] = totals[name] + part if name in totals else part
        return totals


def _to_parameters(
    derived: list[tuple[_Source, Tensor]], leaves: dict[str, Tensor]
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


def _changed(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """What a call gave, or wrote into, where it has no result."""
    if type(result) is Tensor:
        return [result]
    return tensors_of((args[0] if func is Tensor.__setitem__ else result,))


def _is_above(shape: torch.Size, other: torch.Size) -> bool:
    """Whether the first dimension of a shape is one along which another broadcasts to it."""
    return len(shape) > len(other) or (len(shape) == len(other) > 0 and other[0] == 1)


def _is_checkpointed() -> bool:
    """Whether what the backward pass needs is not saved but computed again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__
