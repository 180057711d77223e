"""What backward passes bring to the uses of parameters, and the norms that are made of it.

A hook on the result of each use hands the result's gradient to the use's rule. Where it is not
known whose its rows are, further passes of weighted terms show it.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ood_monitor.gradients.factors import (
    Factor,
    Granularity,
    Materialised,
    full_precision,
    norms_by,
    united,
)
from ood_monitor.gradients.owners import MOST_PASSES, Owners, Weighted, weights_of
from ood_monitor.gradients.sources import Followed, Source, to_parameters
from ood_monitor.gradients.uses import Covered, Rows
from ood_monitor.gradients.views import reordered

__all__ = ["Backward", "Use", "is_checkpointed"]

#: Elements of per-sample gradients held at once while several uses of a parameter are summed.
_HELD_ELEMENTS = 2**24


@dataclass(eq=False)
class Use:
    """One operation that took derived and data tensors; alive as long as its graph is."""

    term: int  # that was being computed, counted from 0
    sources: list[Source]
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
        """The factors of the sources in order, from the gradient of the result."""
        return [] if self.form is None else self.form.factors(g, rows)


@dataclass(eq=False)
class _Waiting:
    """A use whose rows' owners are not found yet, and what backward passes brought to it."""

    full: Tensor  # the gradient of the operation's result
    g: Tensor  # as rows
    passes: list[Weighted]


class Backward:
    """The backward passes of one recorded forward pass.

    Args:
        followed: The parameters.
        n: Number of gradients.
        by: The granularity of each parameter.
        confirms: Whether owners of rows are found twice.
        finds_owners: Whether they are found at all; else the loop takes parameters of such rows.
    """

    def __init__(
        self,
        followed: Followed,
        n: int,
        by: Callable[[str], Granularity],
        *,
        confirms: bool,
        finds_owners: bool,
    ) -> None:
        self._followed, self._n, self._by = followed, n, by
        self._confirms, self._finds_owners = confirms, finds_owners
        #: Parameters whose rows' owners were found in weighted passes.
        self.found_owners: set[str] = set()
        #: Terms, counted from 0, whose graph a later one needs.
        self.shared: set[int] = set()
        #: The term that is being computed.
        self.term = 0
        #: Uses of data of rows created alone, and those whose owners have to be found.
        self._of_created: list[weakref.ref[Use]] = []
        self._unordered: weakref.WeakSet[Use] = weakref.WeakSet()
        self._uses: dict[str, weakref.WeakSet[Use]] = {}
        self._anchors: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._keep_graph, self._backward = True, False
        #: The weights of the pass that is being made; None of the plain one.
        self._weights: Tensor | None = None
        self._waiting: dict[Use, _Waiting] = {}
        self._collected: list[tuple[Source, Factor]] = []
        self._norms: dict[str, Tensor] = {}

    def follow(self, result: Tensor, use: Use, *, created: bool) -> None:
        """Take the gradients of a use's result, whose rows may be those of created data alone."""
        if use.dimension is None:
            self._unordered.add(use)
        if created:
            self._of_created.append(weakref.ref(use))
        for name in {name for source in use.sources for name in source.names}:
            if name not in self._uses:
                self._uses[name] = weakref.WeakSet()
            self._uses[name].add(use)
        result.register_hook(lambda g: self._on_gradient(use, g))  # type: ignore[no-untyped-call]

    def lose_created(self) -> None:
        """Rows that were created may be no longer those of the samples, in order."""
        for use in filter(None, (each() for each in self._of_created)):
            use.dimension = None
            self._unordered.add(use)

    def anchor(self, like: Tensor) -> Tensor:
        """A zero that requires a gradient: what makes a result part of the graph."""
        key = (like.dtype, like.device)
        if key not in self._anchors:
            self._anchors[key] = like.new_zeros(()).requires_grad_()
        return self._anchors[key]

    def norms(self, value: Tensor, *, keep_graph: bool) -> dict[str, Tensor]:
        """As :meth:`~ood_monitor.gradients.recorder.Recorder.squared_norms`."""
        self._collected, self._norms = [], {}
        if self._followed.is_source(value):
            source = self._followed.sources[id(value)]
            self._followed.leave([source], "a term that is no function of the data")
        elif value.requires_grad and self._anchors:
            self._keep_graph = keep_graph or (self._finds_owners and bool(self._unordered))
            self._differentiate(value, None)
            self._settle(value)
        self._sum_up_uses()
        self.term += 1
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
            self._followed.leave_all("gradient checkpointing")
        finally:
            self._weights, self._backward = None, False

    def _settle(self, value: Tensor) -> None:
        """Find the owners of the rows that wait for them, by passes of weighted terms."""
        for number in range(1, MOST_PASSES + 1):
            if self._waiting:
                self._differentiate(value, weights_of(self._n, number).to(value))
                self._waiting = self._still_open(confirms=number == 1 and self._confirms)
        open_still = [source for use in self._waiting for source in use.sources]
        self._followed.leave(open_still, "rows whose owner is open")
        self._waiting = {}

    def _still_open(self, *, confirms: bool) -> dict[Use, _Waiting]:
        """Those of which a further pass has to tell; the factors of the others are taken."""
        still: dict[Use, _Waiting] = {}
        for use, each in self._waiting.items():
            with torch._C.DisableTorchFunction():
                owners = Owners.found(each.g, each.passes) if each.passes else None
            if owners is None:
                self._followed.leave(use.sources, "rows that are of no sample alone")
            elif confirms or not owners.certain:
                still[use] = each
            else:
                self.found_owners.update(name for s in use.sources for name in s.names)
                self._take(use, each.full, owners)
        return still

    def _on_gradient(self, use: Use, g: Tensor) -> None:
        if self._weights is not None:
            waiting = self._waiting.get(use)
            if waiting is not None and use.form is not None:
                rows = use.form.rows(full_precision(g.detach()))
                waiting.passes.append(Weighted(rows, self._weights))
            return
        self.shared.update(range(use.term, self.term))
        if not self._backward:  # a gradient in the forward pass: its own gradient is not seen
            self._followed.leave_all("a gradient taken in the forward pass")
        elif not use.is_intact():
            self._followed.leave(use.sources, "what it took was written over")
        elif use.dimension is not None or use.form is None:
            self._take(use, full_precision(g.detach()), use.dimension or 0)
            if not self._keep_graph:
                use.forget()
        elif not self._finds_owners:
            self._followed.leave(
                use.sources, "rows whose order is not known, beside others that are looped"
            )
        else:
            full = full_precision(g.detach())
            self._waiting[use] = _Waiting(full, use.form.rows(full), [])

    def _take(self, use: Use, g: Tensor, rows: Rows) -> None:
        """Take the norms of a use's gradients, or keep its factors where there are further uses."""
        try:
            with torch._C.DisableTorchFunction():
                factors = use.factors(g, rows)
        except NotImplementedError as error:
            self._followed.leave(use.sources, str(error))
            return
        for source, factor in zip(use.sources, factors, strict=True):
            name, order = source.names[0], source.order
            if order is not None:
                leaf = self._followed.leaves[name]
                factor = reordered(factor, order, leaf.shape)
                source = Source(leaf, (name,))
            once = len(self._uses[name]) == 1 == sum(name in s.names for s in use.sources)
            if source.is_parameter and once:
                with torch._C.DisableTorchFunction():
                    self._norms[name] = norms_by(self._by(name), factor)
            else:
                self._collected.append((source, factor))

    def _sum_up_uses(self) -> None:
        """Norms of parameters with several uses, and of those behind derived tensors."""
        self._put_together()
        leaves = self._followed.leaves
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
        derived: dict[int, tuple[Source, Tensor]] = {}
        for source, factor in self._collected:
            part, name = factor.gradients(start, stop), source.names[0]
            if source.is_parameter:
                totals[name] = totals[name] + part if name in totals else part
            else:
                key = id(source.tensor)
                derived[key] = source, derived[key][1] + part if key in derived else part
        for name, part in to_parameters(list(derived.values()), leaves).items():
            totals[name] = totals[name] + part if name in totals else part
        return totals


def is_checkpointed() -> bool:
    """Whether what the backward pass needs is not saved but computed again."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # torch 2.6 does not say: then whoever calls from there counts as such
        return _is_called_from(torch.utils.checkpoint.__file__)
    hooks = top(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _is_called_from(file: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None
