"""Four ways to the norms of one chunk of samples, all of them exact."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, batch_size, checked_terms, tensors_in
from ood_monitor.gradients.check import BackOff, Facts, agree, precisions
from ood_monitor.gradients.factors import Granularity
from ood_monitor.gradients.fast import Recorded, recorded_norms, recorded_rows
from ood_monitor.gradients.kept import is_keeping
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.gradients.vmapped import is_quick_alone, vmapped_norms
from ood_monitor.modules import Passes

__all__ = ["GradientNorms", "Way", "chunk_norms", "joined"]

#: Samples up to which all terms are computed at once, where an adapter can. More gain little time,
#: and take as many times the memory as there are terms.
_FEW = 16

#: Samples up to which the loop is as quick as `vmap`.
_FEWEST_VMAPPED = 2

#: Models with batches of which `vmap` alone failed since it last did not: how often it is tried.
_failing: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Why a parameter is not taken by rules alone.
_OWNED = "rows whose order is not known"
_BESIDE = "beside others that have no rule"

_WayName: TypeAlias = Literal["rules", "rows", "vmap", "loop"]

#: Of a batch in chunks the later one is told.
_WAYS: tuple[_WayName, ...] = get_args(_WayName)


@dataclass(frozen=True)
class Way:
    """How the norms of a parameter were had, all of them exact.

    Attributes:
        name: ``"rules"``: by closed forms, from one forward and one backward pass of all samples.
            ``"rows"``: likewise, after further backward passes have shown whose each row is.
            ``"vmap"``: by a pass that holds the gradients of several samples, which is quicker for
            all parameters of some models as soon as one has no rule. ``"loop"``: by a forward and a
            backward pass for each sample.
        reason: Why not by rules, in words; empty for those.
    """

    name: _WayName
    reason: str = ""


@dataclass(frozen=True)
class GradientNorms:
    """Terms and squared gradient norms of one batch.

    Attributes:
        log_likelihood: Each term's values, ``{term: (B,)}``, in nats.
        norms: ``{"term/parameter": (B / group,)}``, or ``(B / group, rows)`` by row,
            ``(B / group, columns)`` by column.
        ways: How they were had, by parameter; the dearest, where a batch was scored in chunks.
    """

    log_likelihood: dict[str, Tensor]
    norms: dict[str, Tensor]
    ways: dict[str, Way] = field(default_factory=dict)


def chunk_norms(
    passes: Passes[Adapter],
    chunk: Batch,
    group: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
    facts: Facts,
) -> GradientNorms:
    """Norms of samples that go through the model at once, each by the quickest way that is right.

    Args:
        passes: The model.
        chunk: Those samples.
        group: Samples whose terms are added before differentiating.
        selected: Which parameters, by name.
        by: The granularity of each.
        facts: What the first use of the model found.
    """
    n = batch_size(chunk) // group
    names = [name for name, _ in passes.module.named_parameters() if selected(name)]
    if (found := _by_vmap_alone(passes, chunk, n, names, by, facts)) is not None:
        return found
    by_loop = set(filter(selected, facts.looped))

    def by_rule(name: str) -> bool:
        return selected(name) and name not in by_loop

    # Further backward passes are for nothing where the loop makes all of them anyway.
    finds_owners = not by_loop or (n > _FEWEST_VMAPPED and by_loop <= facts.vmapped)
    at_once = facts.at_once and batch_size(chunk) <= _FEW
    fast = (
        _norms_at_once(passes.fresh(), chunk, n, by_rule, by)
        if at_once
        else recorded_norms(
            passes, chunk, n, by_rule, by, facts.last_of_graph, finds_owners=finds_owners
        )
    )
    ways = {name: Way("rules") for name in names}
    ways |= dict.fromkeys(fast.found_owners, Way("rows", _OWNED))
    norms, slow = fast.norms, by_loop | fast.left_over.keys()
    if slow:
        way, rest = _of_the_rest(passes, chunk, n, slow, by, facts, fast.log_likelihood)
        reasons = {**dict.fromkeys(slow, ""), **facts.reasons, **fast.left_over}
        norms, ways = norms | rest, ways | {k: Way(way, reasons[k]) for k in slow}
    keys = [f"{term}/{name}" for term in fast.log_likelihood for name in names]
    return GradientNorms(
        fast.log_likelihood, {key: norms[key] for key in keys}, {name: ways[name] for name in names}
    )


def _by_vmap_alone(
    passes: Passes[Adapter],
    chunk: Batch,
    n: int,
    names: Sequence[str],
    by: Callable[[str], Granularity],
    facts: Facts,
) -> GradientNorms | None:
    """Of all parameters, where one of them has no rule, and `vmap` is right and quick; or None."""
    module, chosen = passes.module, set(names)
    has_rules = chosen.isdisjoint(facts.looped | facts.owned)
    if has_rules or n <= _FEWEST_VMAPPED or not chosen <= facts.vmapped:
        return None
    positions = max((t.numel() // n for t in tensors_in(chunk) if _are_tokens(t)), default=1)
    if not is_quick_alone(module, n, chosen, positions) or not _is_tried(passes):
        return None
    # What a pass of all samples checks, and gives.
    values = {term: value.detach() for term, value in checked_terms(passes.fresh(), chunk)}
    found = vmapped_norms(passes, chunk, n, chosen.__contains__, by)
    if found is None or not agree(found[0], values, precisions(module)):
        _failing.setdefault(passes.holder, BackOff())  # type: ignore[no-untyped-call]
        return None
    _failing.pop(passes.holder, None)  # type: ignore[no-untyped-call]
    reasons = {**dict.fromkeys(chosen, _BESIDE), **dict.fromkeys(facts.owned, _OWNED)}
    reasons |= facts.reasons
    norms = {f"{term}/{name}": found[1][f"{term}/{name}"] for term in values for name in names}
    return GradientNorms(values, norms, {name: Way("vmap", reasons[name]) for name in names})


def _are_tokens(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def _is_tried(passes: Passes[Adapter]) -> bool:
    """Whether `vmap` alone is tried: after a failure seldom, since that costs two forward passes.

    It may fail for some batches only, as where a model looks at a mask if there is padding.
    """
    if passes.in_place or is_keeping(passes):
        return False
    failing: BackOff | None = _failing.get(passes.holder)  # type: ignore[no-untyped-call]
    return failing is None or failing()


def _of_the_rest(
    passes: Passes[Adapter],
    chunk: Batch,
    n: int,
    names: Set[str],
    by: Callable[[str], Granularity],
    facts: Facts,
    log_likelihood: Mapping[str, Tensor],
) -> tuple[_WayName, dict[str, Tensor]]:
    """By `vmap` where that was seen to be right for all of them, else by the loop."""
    if n > _FEWEST_VMAPPED and names <= facts.vmapped:
        found = vmapped_norms(passes, chunk, n, names.__contains__, by)
        if found is not None and agree(found[0], log_likelihood, precisions(passes.module)):
            return "vmap", found[1]
    return "loop", loop_norms(passes, chunk, n, names.__contains__, by)[1]


def _norms_at_once(
    adapter: Adapter,
    chunk: Batch,
    n: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
) -> Recorded:
    one = adapter.one_pass(chunk)
    if one is None:
        raise ValueError(
            f"Expected {type(adapter).__name__}.one_pass to give what it gave on first use, got "
            "None; it must not depend on the batch."
        )
    return recorded_rows(adapter.module, one, n, selected, by)


def joined(parts: list[GradientNorms]) -> GradientNorms:
    """Those of several chunks, one after the other."""

    def together(of: Callable[[GradientNorms], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.cat([of(part)[key] for part in parts]) for key in of(parts[0])}

    ways = {
        name: max((part.ways[name] for part in parts), key=lambda way: _WAYS.index(way.name))
        for name in parts[0].ways
    }
    return GradientNorms(together(lambda p: p.log_likelihood), together(lambda p: p.norms), ways)
