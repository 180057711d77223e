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

Where it is not known whose the rows of an operation are, the graph gets further backward passes, of
weighted terms, which shows it (:mod:`~ood_monitor.gradients.owners`).

What no rule covers is put on the list `left_over`, with the reason, for the loop over samples:
exact, only slower.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ood_monitor.gradients.backward import Backward, Use, is_checkpointed
from ood_monitor.gradients.factors import Granularity
from ood_monitor.gradients.order import CREATING, SHAPED_BY_OTHERS, sample_dimensions
from ood_monitor.gradients.products import PRODUCTS
from ood_monitor.gradients.recurrent import REWRITTEN
from ood_monitor.gradients.rules import ADDING, IN_PLACE, POINTWISE, REWRITES, RULES, SPREADING
from ood_monitor.gradients.sources import Followed, Source
from ood_monitor.gradients.tracking import Data, DataMarks, tensors_of
from ood_monitor.gradients.uses import Covered, Given, covered, is_above, spread_along

__all__ = ["Recorder"]

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
        self._followed = Followed(module, selected)
        self._backward = Backward(
            self._followed, n, by, confirms=confirms, finds_owners=finds_owners
        )
        #: Parameters that only the loop gets right, and why.
        self.left_over = self._followed.left_over
        #: The followed parameters by name, in module order.
        self.leaves = self._followed.leaves
        #: Parameters whose rows' owners were found in weighted passes.
        self.found_owners = self._backward.found_owners
        #: Terms, counted from 0, whose graph a later one needs.
        self.shared = self._backward.shared
        #: Whether rows were taken for the samples' by their number.
        self.guessed = False
        #: The followed parameters that met data, in the order of their first use.
        self.used: dict[str, None] = {}
        self._n, self._by_size = n, by_size
        # Asked for at every call.
        self._sources, self._plain = self._followed.sources, self._followed.plain
        self._data = DataMarks()
        self._rows = 0
        for tensor in data:
            self._data.set(tensor, Data(dimension=0, anchored=False))
            self._rows = len(tensor)

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
            self._followed.leave_all("a transform of `torch.func`")
            return func(*self._followed.substituted(args), **self._followed.substituted(kwargs))
        if func in REWRITES:
            with self:  # so that what it is made of comes here too
                result = REWRITES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunction():  # a look at a tensor is not a call of the model's
            tensors = tensors_of(args) + tensors_of(kwargs.values()) if kwargs else tensors_of(args)
            sources, data, has_plain, is_unknown = self._told_apart(func, tensors)
            if is_unknown or (data and func == _SET_DATA):
                self._followed.leave_all("a write that no call shows")
            if sources and data and not torch.is_grad_enabled():
                # As in the forward of an `autograd.Function`.
                self._followed.leave(sources, "a call without gradients")
            if sources and not data and self._by_size and self._n > 1 and torch.is_grad_enabled():
                if func in SPREADING:
                    return self._spread(func, args, kwargs, sources)
                data = self._created_by_size(func, tensors)
        if not data:
            if not sources and not has_plain:
                return func(*args, **kwargs)
            return self._constant_or_derived(func, args, kwargs, sources)
        consumed = bool(sources) and torch.is_grad_enabled() and func not in CREATING
        if consumed and args and self._data.get(args[0]) is not None:
            result = self._rewritten(func, args, kwargs, data)
            if result is not NotImplemented:
                return result
        if consumed or has_plain:
            plain = self._followed.substituted(args), self._followed.substituted(kwargs)
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
    ) -> tuple[list[Source], list[tuple[Tensor, Data]], bool, bool]:
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
        return self._backward.norms(value, keep_graph=keep_graph)

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
            self._backward.lose_created()
        return found

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
        self, func: Callable[..., Any], args: Any, kwargs: Any, sources: list[Source]
    ) -> Any:
        result = func(
            *self._followed.substituted(args, graph=True),
            **self._followed.substituted(kwargs, graph=True),
        )
        if sources and torch.is_grad_enabled():
            self._followed.derive(_changed(func, args, result), sources)
        return result

    def _created_by_size(
        self, func: Callable[..., Any], tensors: list[Tensor]
    ) -> list[tuple[Tensor, Data]]:
        """Constants among a call's tensors that have a row for each sample, as data."""
        own = [t for t in tensors if id(t) in self._sources]
        if func in RULES or func in PRODUCTS:
            given = [t for t in tensors[:1] if t.ndim]
        elif func in POINTWISE:  # a mask of a weight has the weight's own rows
            given = [t for t in tensors if all(is_above(t.shape, p.shape) for p in own)]
        else:
            return []
        found = [t for t in given if self._is_constant(t) and len(t) == self._rows]
        self.guessed |= bool(found)
        return [(t, Data(dimension=0, anchored=False, created=True)) for t in found]

    def _is_constant(self, tensor: Tensor) -> bool:
        known = self._followed.is_known(tensor)
        return not known and tensor.ndim > 0 and not tensor.requires_grad

    def _spread(
        self, func: Callable[..., Any], args: Any, kwargs: Any, sources: list[Source]
    ) -> Any:
        """A derived tensor put in rows: its use, if there are as many as the batch has."""
        plain = self._followed.substituted(args), self._followed.substituted(kwargs)
        result = func(*plain[0], **plain[1])
        d = spread_along(sources[0].tensor, result, self._rows)
        if d is None or sources[0].tensor.is_complex():
            return self._constant_or_derived(func, args, kwargs, sources)
        self.guessed = True
        result = self._consume(func, (args, kwargs), plain, result, sources, [], [d])
        with torch._C.DisableTorchFunction():
            self._mark(func, [result], [], [d])
        return result

    def _rewritten(
        self, func: Callable[..., Any], args: Any, kwargs: Any, data: list[tuple[Tensor, Data]]
    ) -> Any:
        """A recurrent layer, or a write into data, in operations that have rules."""
        if func in REWRITTEN:
            return self._recurrent(func, args, kwargs, data)
        if func in IN_PLACE:
            with self:
                own = args[0] if IN_PLACE[func] in ADDING else args[0].clone()
                return args[0].copy_(IN_PLACE[func](own, *args[1:], **kwargs))
        if func is Tensor.__setitem__ and id(args[2]) in self._sources:
            with self:  # rows of the data's, so that it is known whose they are
                rows = args[0][args[1]].detach().clone().zero_()
                return func(args[0], args[1], args[2] + rows)
        return NotImplemented

    def _recurrent(
        self, func: Callable[..., Any], args: Any, kwargs: Any, data: list[tuple[Tensor, Data]]
    ) -> Any:
        """A recurrent layer or cell, in operations that have rules; its states are not derived."""
        states = tensors_of((args[1],))
        if any(id(state) in self._sources for state in states):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            like = states if args[0].ndim == 2 else [args[0], *states]  # as the results are
            found = self._dimensions(func, args, kwargs, like, data)
            if None in found:  # its operations see its input alone, and not beside its states
                for tensor in (tensor for tensor, d in data if d.created):
                    self._data.lose(tensor)
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
        sources: list[Source],
        data: list[tuple[Tensor, Data]],
        dimensions: list[int | None],
    ) -> Any:
        self.used |= dict.fromkeys(name for source in sources for name in source.names)
        if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
            return result  # as of a comparison, which has no gradient
        if is_checkpointed():
            # Its second forward pass, unrecorded, may save other tensors of the same shapes.
            self._followed.leave_all("gradient checkpointing")
        form = self._form(func, given, plain, result, sources, dimensions)
        if isinstance(form, str):  # exact all the same: the loop takes these parameters
            self._followed.leave(sources, form)
            return result
        if not any(known.anchored for _, known in data):
            result = result + self._backward.anchor(result)
            self._data.set(result, Data(dimensions[0], anchored=True))
        needed = () if func in ADDING else data
        saved = [(tensor.detach(), tensor._version) for tensor, _ in needed]
        use = Use(self._backward.term, sources, form, form.dimension, saved)
        self._backward.follow(result, use, created=all(known.created for _, known in data))
        return result

    def _form(
        self,
        func: Callable[..., Any],
        given: Any,
        plain: Any,
        result: Any,
        sources: list[Source],
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
            self._followed.is_source,
            self._followed.is_parameter,
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
                self._data.lose_memory_of(tensor)


def _changed(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """What a call gave, or wrote into, where it has no result."""
    if type(result) is Tensor:
        return [result]
    return tensors_of((args[0] if func is Tensor.__setitem__ else result,))
