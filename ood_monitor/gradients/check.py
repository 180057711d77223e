"""The fast path compared with the loop, on first use of a model, and until all is compared.

Where a gradient is zero, as all are before an output layer that starts at zero, or not finite, two
ways to compute it agree whatever they do: that is no verdict. Such norms are compared again on
later uses: when the fast path gives one that is not zero, when weights have changed, and now and
then. A comparison costs a forward and backward pass of two samples together and of each alone; and
one by `vmap`, where there are parameters without a rule.
Some gradients are always zero (a key's bias before a softmax), so of the uses that ask for another
comparison only the 1st, 2nd, 4th, 8th ... get it: of a million uses, twenty.
"""

import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, batch_size, checked_terms, map_tensors
from ood_monitor.gradients.factors import Granularity
from ood_monitor.gradients.fast import recorded_norms, recorded_rows
from ood_monitor.gradients.kept import noting
from ood_monitor.gradients.layers import supported
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.gradients.vmapped import vmapped_norms
from ood_monitor.modules import Passes, precision_of

__all__ = [
    "BackOff",
    "Facts",
    "agree",
    "check_last",
    "disagreeing",
    "facts_after",
    "facts_of",
    "precisions",
]

#: Relative difference up to which the fast path and the loop agree. Through a deep flow (96 steps)
#: the loop itself is off by 2e-3 in single precision.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE_IN_HALF = 0.3

#: Why a parameter is looped that the fast path has a rule for.
DISAGREES = "norms that the loop does not confirm"


class NotFiniteError(ValueError):
    """A term is not finite for a sample that should be compared."""


@dataclass(frozen=True)
class Facts:
    """What the first use of a model found.

    Attributes:
        looped: Parameters that only the loop gets right.
        last_of_graph: Terms after which no other needs the graph of their forward pass.
        at_once: Whether the adapter's one pass for all terms gives what its passes give.
        vmapped: Parameters of which `vmap` of the loop gives what the loop gives; looked at where
            some have no rule.
        owned: Parameters of which further backward passes find whose the rows are.
        reasons: Why the fast path does not take those that are looped.
    """

    looped: frozenset[str]
    last_of_graph: frozenset[str]
    at_once: bool = False
    vmapped: frozenset[str] = frozenset()
    owned: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass
class BackOff:
    """Says yes the 1st, 2nd, 4th, 8th ... time that it is asked."""

    asked: int = 0

    def __call__(self) -> bool:
        """Whether this is such a time."""
        self.asked += 1
        return not self.asked & (self.asked - 1)


@dataclass
class _Open:
    """What has not been compared yet, of one adapter.

    Attributes:
        keys: "term/parameter" whose exact norm was zero or not finite.
        weights: The state of the parameters at the last comparison.
    """

    keys: set[str]
    weights: int
    uses: BackOff = field(default_factory=lambda: BackOff(1))  # the first is behind it
    changes: BackOff = field(default_factory=BackOff)
    signs: BackOff = field(default_factory=BackOff)


#: By adapter: found on two gradients, and on one, which does not show what samples do to others.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_known_of_one: WeakIdKeyDictionary = WeakIdKeyDictionary()
_open: WeakIdKeyDictionary = WeakIdKeyDictionary()
_open_of_one: WeakIdKeyDictionary = WeakIdKeyDictionary()


#: Of the names of parameters, by adapter.
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Adapters of which a sample of a larger batch was compared with it alone.
_last_looked_at: WeakIdKeyDictionary = WeakIdKeyDictionary()


def facts_of(passes: Passes[Adapter], batch: Batch, group: int) -> Facts:
    """Compare the fast path with the loop on two samples, once per adapter; on one until two come.

    Again where that gave no verdict; see above.

    Raises:
        ValueError: A sample's value depends on its batch, or no parameter gets a gradient.
    """
    adapter, n = passes.holder, min(2, batch_size(batch) // group)
    _forget_others(adapter)
    for found, unsettled in _stores(n):
        if adapter in found:
            known: Facts = found[adapter]
            left: _Open = unsettled[adapter]
            return _compared(passes, batch, group, known) if _is_due(left, adapter) else known
    return _compared(passes, batch, group, None)


def facts_after(
    passes: Passes[Adapter], batch: Batch, group: int, facts: Facts, norms: Mapping[str, Tensor]
) -> Facts:
    """Facts that hold for these norms: the same, or new ones from where a norm is the first.

    Args:
        passes: The model.
        batch: As :func:`facts_of` got it.
        group: Likewise.
        facts: What the norms rest on.
        norms: ``{"term/parameter": (n,)}``, or ``(n, rows)``.
    """
    stores = _stores(batch_size(batch) // group)
    left = next((o[passes.holder] for k, o in stores if passes.holder in k), None)
    if left is None:
        return facts  # nothing could be compared yet
    unsettled = [
        key for key in norms if key in left.keys and key.split("/", 1)[1] not in facts.looped
    ]
    if not unsettled:
        return facts
    totals = _totals(norms)
    largest = _largest(totals)
    signs = [
        totals[key]
        for key in unsettled
        if (totals[key] > _noise(largest[key.split("/", 1)[0]], totals[key].dtype)).any()
        if totals[key].isfinite().all()
    ]
    if not signs or not left.signs():
        return facts
    return _compared(passes, batch, group, facts, start=int(signs[0].argmax()))


def check_last(
    passes: Passes[Adapter], batch: Batch, group: int, log_likelihood: Mapping[str, Tensor]
) -> None:
    """Compare the last value of a pass with that of its samples alone, once per adapter.

    Two samples do not show what more of them do to each other, as experts of a fixed capacity.

    Args:
        passes: The model.
        batch: The samples of the pass.
        group: Samples whose terms are added.
        log_likelihood: ``{term: (B,)}``, of these samples and more.

    Raises:
        ValueError: They differ.
    """
    last = batch_size(batch) // group - 1
    if last < 2 or passes.holder in _last_looked_at:
        return
    group_of = slice(last * group, (last + 1) * group)
    together = {
        term: values[group_of].detach().sum(0, keepdim=True)
        for term, values in log_likelihood.items()
    }
    if not all(values.isfinite().all() for values in together.values()):
        return
    own = map_tensors(lambda t: t[group_of], batch)
    alone = {}
    for term, value in checked_terms(passes.fresh(), own):
        alone[term] = value.detach().sum(0, keepdim=True)
        del value  # its graph, before the next forward pass
    _check_independence(passes.holder, together, alone, precisions(passes.module))
    _last_looked_at[passes.holder] = True


def _stores(n: int) -> list[tuple[WeakIdKeyDictionary, WeakIdKeyDictionary]]:
    two, one = (_known, _open), (_known_of_one, _open_of_one)
    return [two] if n > 1 else [two, one]


def _forget_others(adapter: Adapter) -> None:
    """Compare anew where layers were wrapped, replaced or fused since: facts are of their names."""
    now = hash(tuple(name for name, _ in adapter.module.named_parameters()))
    if _names.get(adapter, now) != now:  # type: ignore[no-untyped-call]
        for store in (_known, _known_of_one, _open, _open_of_one, _last_looked_at):
            store.pop(adapter, None)  # type: ignore[no-untyped-call]
    _names[adapter] = now


def _is_due(left: _Open, adapter: Adapter) -> bool:
    """Whether what is not compared yet should be, on this use."""
    if not left.keys:
        return False
    now = _state(adapter.module)
    changed, left.weights = now != left.weights, now
    by_change, by_use = changed and left.changes(), left.uses()
    return by_change or by_use


def _state(module: nn.Module) -> int:
    """A number that changes with the weights: their places and how often they were written."""
    return hash(
        tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in module.parameters())
    )


def _compared(
    passes: Passes[Adapter], batch: Batch, group: int, before: Facts | None, start: int = 0
) -> Facts:
    """Compare on two samples from ``start`` on, and remember what is found with what was."""
    adapter, size = passes.holder, batch_size(batch) // group
    n, start = min(2, size), min(start, max(0, size - 2))
    own = slice(start * group, (start + n) * group)
    probe = map_tensors(lambda t: t[own], batch)
    wrong_before: Mapping[str, str] = {} if before is None else before.reasons
    try:
        facts, unsettled = _compare(passes, probe, n, wrong_before)
    except NotFiniteError:
        probe = _finite_probe(passes, batch, group)
        if probe is None:
            return before or _unknown(adapter)  # the comparison waits for samples that allow it
        n = batch_size(probe) // group
        facts, unsettled = _compare(passes, probe, n, wrong_before)
    known, opened = _stores(2)[0] if n > 1 else _stores(1)[1]
    if adapter not in opened:
        opened[adapter] = _Open(unsettled, _state(adapter.module))
    else:
        left: _Open = opened[adapter]
        if left.keys & unsettled != left.keys:
            left.signs = BackOff()
        left.keys &= unsettled
    known[adapter] = facts
    return facts


def _compare(
    passes: Passes[Adapter], probe: Batch, n: int, before: Mapping[str, str]
) -> tuple[Facts, set[str]]:
    """What two samples show, and the norms of which they show nothing."""
    adapter = passes.holder
    chosen = supported(adapter.module)
    parameters = adapter.module.named_parameters()
    dtypes = {name: precision_of(p).to_real() for name, p in parameters if name in chosen}
    every = chosen.__contains__
    fast = recorded_norms(passes, probe, n, every, _by_row)
    with noting(passes):  # before anything is kept that is of `vmap`
        values, exact = loop_norms(passes, probe, n, every, _by_row)
    _check_independence(adapter, fast.log_likelihood, values, set(dtypes.values()))
    _check_dependence(adapter, exact)
    done = fast.left_over.keys() | before.keys()
    with torch._C.DisableTorchFunction():  # no calls of the model's, which are watched
        wrong = disagreeing(fast.norms, exact, dtypes, done)
        unsettled = _without_verdict(exact, dtypes)
    if wrong:
        warnings.warn(
            f"The fast path disagrees with the loop over samples for {sorted(wrong)}; these "
            "parameters are scored by the loop: exact, but slower. [OOD114]",
            stacklevel=6,
        )
    looped = frozenset(wrong | done)
    at_once = _gives_the_same(passes.fresh(), probe, n, values, exact, dtypes, looped)
    without_rule = looped or fast.found_owners
    vmapped = _vmapped(passes, probe, n, values, exact, dtypes) if without_rule else frozenset()
    with_graph = {key for key in unsettled if key.split("/", 1)[0] not in fast.constant}
    reasons = {**dict.fromkeys(looped, DISAGREES), **before, **fast.left_over}
    owned = frozenset(fast.found_owners - looped)
    return Facts(looped, fast.last_of_graph, at_once, vmapped, owned, reasons), with_graph


def _vmapped(
    passes: Passes[Adapter],
    probe: Batch,
    n: int,
    values: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
) -> frozenset[str]:
    """Parameters of which `vmap` gives the loop's norms."""
    found = vmapped_norms(passes, probe, n, dtypes.__contains__, _by_row)
    if found is None or not agree(found[0], values, dtypes.values()):
        return frozenset()
    with torch._C.DisableTorchFunction():
        exact = {key: exact[key] for key in found[1]}
        return frozenset(dtypes) - disagreeing(found[1], exact, dtypes)


def agree(
    values: Mapping[str, Tensor], others: Mapping[str, Tensor], dtypes: Iterable[torch.dtype]
) -> bool:
    """Whether two ways to compute the terms, (B,), give the same, up to rounding.

    Args:
        values: ``{term: (B,)}``, in nats.
        others: Likewise.
        dtypes: Precisions of the parameters, of which the worst one decides.
    """
    rtol = max(1e-3, *(8 * torch.finfo(dtype).eps for dtype in dtypes))

    def close(value: Tensor, other: Tensor) -> bool:
        largest = float(other.where(other.isfinite(), 0.0).abs().max())
        atol = rtol * max(1.0, largest)
        return torch.allclose(value, other, rtol=rtol, atol=atol, equal_nan=True)

    return values.keys() == others.keys() and all(
        close(values[term], other) for term, other in others.items()
    )


def precisions(module: nn.Module) -> set[torch.dtype]:
    """Those of the parameters that can be features."""
    chosen = supported(module)
    return {precision_of(p).to_real() for name, p in module.named_parameters() if name in chosen}


def _unknown(adapter: Adapter) -> Facts:
    """Of samples that nothing can be compared on: the loop is always right."""
    every = frozenset(supported(adapter.module))
    return Facts(every, frozenset(), reasons=dict.fromkeys(every, "no finite sample to compare"))


def _finite_probe(passes: Passes[Adapter], batch: Batch, group: int) -> Batch | None:
    """The first two samples of which all terms are finite, or one; None if there is none."""
    finite: Tensor | None = None
    for _, values in checked_terms(passes.fresh(), batch):
        own = values.detach().isfinite().reshape(-1, group).all(1).cpu()
        finite = own if finite is None else finite & own
    chosen = [] if finite is None else finite.nonzero().flatten().tolist()[:2]
    if not chosen:
        return None
    rows = torch.tensor([i * group + j for i in chosen for j in range(group)], device="cpu")
    return map_tensors(lambda t: t[rows.to(t.device)], batch)


def _check_dependence(adapter: Adapter, exact: dict[str, Tensor]) -> None:
    if not any(rows.any() for rows in exact.values()):
        raise ValueError(
            f"Expected the terms of {type(adapter).__name__} to depend on the parameters of "
            f"{type(adapter.module).__name__}, got no gradient for any of them: look for a "
            "`detach()` or a `torch.no_grad()` in the model, or for another copy of its parameters."
        )


def _check_independence(
    adapter: Adapter,
    together: dict[str, Tensor],
    alone: dict[str, Tensor],
    dtypes: set[torch.dtype],
) -> None:
    rtol = max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
    rounding = _rounding(together, dtypes)
    for term, values in together.items():
        if not values.isfinite().all():
            raise NotFiniteError(
                f"Expected the term {term!r} to be finite, got {values.tolist()} for samples that "
                "are compared."
            )
        if not torch.allclose(
            values, alone[term], rtol=rtol, atol=rtol * float(values.abs().max()) + rounding
        ):
            raise ValueError(
                f"Expected the term {term!r} of a sample to be the same alone and in a batch, got "
                f"{alone[term].tolist()} alone and {values.tolist()} together: the model mixes "
                f"samples or draws random numbers that {type(adapter).__name__} does not fix."
            )


def _rounding(values: Mapping[str, Tensor], dtypes: Set[torch.dtype]) -> float:
    """What single precision may leave of a term, such as a log-determinant whose parts cancel.

    In units of the largest term: that is the size of such parts.
    """
    if dtypes <= {torch.float64}:
        return 0.0
    finite = (each[each.isfinite()].abs() for each in values.values())
    largest = max((float(each.max()) for each in finite if len(each)), default=0.0)
    return 8 * torch.finfo(torch.float32).eps * largest


def _gives_the_same(
    adapter: Adapter,
    probe: Batch,
    n: int,
    values: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    looped: frozenset[str],
) -> bool:
    """Whether all terms can be had by one pass, for the parameters that the loop does not take."""
    one = adapter.one_pass(probe)
    if one is None or one.terms != tuple(values):
        return False
    rest = dtypes.keys() - looped
    found = recorded_rows(adapter.module, one, n, rest.__contains__, _by_row)
    try:
        _check_independence(adapter, found.log_likelihood, values, set(dtypes.values()))
    except ValueError:  # a network that looks at the time of its first row, say
        return False
    exact = {key: rows for key, rows in exact.items() if key.split("/", 1)[1] in rest}
    with torch._C.DisableTorchFunction():
        return not found.left_over and not disagreeing(found.norms, exact, dtypes)


def disagreeing(
    fast: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    done: Set[str] = frozenset(),
) -> set[str]:
    """Parameters with a norm that differs by more than rounding, where the exact one is finite.

    Args:
        fast: ``{"term/parameter": (n,)}``, or ``(n, rows)``.
        exact: Likewise, with the keys to compare.
        dtypes: The precision of each parameter.
        done: Parameters to leave out.
    """
    totals = _totals(exact)
    largest = _largest(totals)
    wrong = set()
    for key, values in totals.items():
        term, name = key.split("/", 1)
        if name in done:
            continue
        rtol = _TOLERANCES.get(dtypes[name], _TOLERANCE_IN_HALF)
        found, noise = _total(fast[key]), _noise(largest[term], dtypes[name])
        close = torch.isclose(found, values, rtol=rtol, atol=noise)
        if not (close | ~values.isfinite()).all():
            wrong.add(name)
    return wrong


def _without_verdict(exact: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> set[str]:
    """Norms that are zero, up to rounding, or not finite for one of the samples."""
    totals = _totals(exact)
    largest = _largest(totals)
    return {
        key
        for key, values in totals.items()
        if not values.isfinite().all()
        or not (values > _noise(largest[key.split("/", 1)[0]], dtypes[key.split("/", 1)[1]])).all()
    }


def _by_row(name: str) -> Granularity:
    return "row"


def _total(norms: Tensor) -> Tensor:
    return norms if norms.ndim == 1 else norms.sum(1)


def _totals(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: _total(rows) for key, rows in norms.items()}


def _largest(totals: dict[str, Tensor]) -> dict[str, float]:
    """The largest finite norm of each term."""
    parts: dict[tuple[str, torch.device], list[Tensor]] = {}
    for key, values in totals.items():
        parts.setdefault((key.split("/", 1)[0], values.device), []).append(values)
    largest: dict[str, float] = {}
    for (term, _), every in parts.items():
        values = torch.cat(every)
        found = float(values.where(values.isfinite(), 0.0).max())
        largest[term] = max(largest.get(term, 0.0), found)
    return largest


def _noise(largest: float, dtype: torch.dtype) -> float:
    """Below this a norm is rounding noise (a key bias before a softmax), whoever computes it."""
    eps = torch.finfo(dtype).eps
    return largest * ((32 if eps < 1e-6 else 8) * eps) ** 2
