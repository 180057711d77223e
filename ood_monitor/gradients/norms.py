"""Squared gradient norms per sample and layer: the features that everything else rests on.

For a term L of the log-likelihood, a sample x and a parameter tensor theta_l (a *layer*),

    f_l(x) = || d L(x) / d theta_l ||^2,

in nats squared per parameter unit squared. References: Approximations to the Fisher Information
Metric of Deep Generative Models for Out-Of-Distribution Detection (Dauncey, Holmes, Williams,
Falck, 2024), https://arxiv.org/abs/2403.01485
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    batch_size,
    checked_terms,
    describe,
    pieces,
    tensors_in,
    usable_by,
)
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.checks import flag, whole, word
from ood_monitor.gradients.check import Facts, agree, check_last, facts_after, facts_of
from ood_monitor.gradients.factors import Granularity
from ood_monitor.gradients.fast import Recorded, recorded_norms, recorded_rows, recorded_terms
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.gradients.recorder import Recorder
from ood_monitor.gradients.vmapped import is_quick_alone, vmapped_norms
from ood_monitor.modules import Names, Part, Passes, scored

__all__ = [
    "GradientNorms",
    "Granularity",
    "Way",
    "finite_samples",
    "gradient_norms",
    "last_layers",
    "terms_and_norms",
]

#: Samples up to which all terms are computed at once, where an adapter can. More gain little time,
#: and take as many times the memory as there are terms.
_FEW = 16

#: Samples up to which the loop is as quick as `vmap`.
_FEWEST_VMAPPED = 2


#: Why a parameter is not taken by rules alone.
_OWNED = "rows whose order is not known"
_BESIDE = "beside others that have no rule"

_WayName: TypeAlias = Literal["rules", "rows", "vmap", "loop"]

#: From the cheapest on.
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


@overload
def gradient_norms(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers = None,
    granularity: Granularity | Mapping[str, Granularity] = "tensor",
    group: int = 1,
    chunk_size: int | None = None,
    report: Literal[False] = False,
) -> dict[str, Tensor]: ...


@overload
def gradient_norms(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers = None,
    granularity: Granularity | Mapping[str, Granularity] = "tensor",
    group: int = 1,
    chunk_size: int | None = None,
    report: Literal[True],
) -> GradientNorms: ...


def gradient_norms(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers = None,
    granularity: Granularity | Mapping[str, Granularity] = "tensor",
    group: int = 1,
    chunk_size: int | None = None,
    report: bool = False,
) -> dict[str, Tensor] | GradientNorms:
    """Squared L2 norm of each sample's gradient with respect to each layer.

    The model is left as it was: parameters, ``.grad``, train flags, buffers and random state.

    Args:
        adapter: The model.
        batch: B samples, on any device.
        layers: Which parameters; all by default.
        granularity: ``"tensor"``, ``"row"`` or ``"column"``, of all parameters or by their names;
            those that a mapping does not name are whole tensors.
        group: Samples whose terms are added before differentiating, consecutive in the batch.
        chunk_size: Samples per pass, to bound memory; a multiple of ``group``.
        report: Whether to tell the terms too, and how the norms of each parameter were had.

    Returns:
        ``{"term/parameter": (B / group,)}`` in module order, or ``(B / group, rows)`` by row, or
        ``(B / group, columns)`` by column: indices of a parameter's second dimension, which are the
        input channels of most weights. With ``report`` they are
        :attr:`~ood_monitor.gradients.GradientNorms.norms` of what is returned.

    Raises:
        ValueError: The batch is empty, not finite or not divisible into groups; a granularity is
            none, or of no parameter; the model has no parameters, mixes samples, or gives a term
            whose shape is not (B,).
        TypeError: An option of another type.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> norms = gradient_norms(om.LogLikelihood(flow), torch.rand(3, 1, 8, 8))
        >>> next(iter(norms.values())).shape
        torch.Size([3])
        >>> told = gradient_norms(om.LogLikelihood(flow), torch.rand(3, 1, 8, 8), report=True)
        >>> {way.name for way in told.ways.values()}
        {'rules'}
    """
    told = flag("report", report)
    found = terms_and_norms(
        adapter, batch, layers=layers, granularity=granularity, group=group, chunk_size=chunk_size
    )
    return found if told else found.norms


def terms_and_norms(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers = None,
    granularity: Granularity | Mapping[str, Granularity] = "tensor",
    group: int = 1,
    chunk_size: int | None = None,
) -> GradientNorms:
    """As :func:`~ood_monitor.gradient_norms`, with the terms' values, which the same passes give.

    Raises:
        ValueError: As there.
        TypeError: As there.
    """
    names = Names.of(adapter.module)
    by = _granularity_of(granularity, adapter.module, names)
    batch = without_ignored(adapter, batch)
    size = _checked_size(batch, group, chunk_size)
    selected = selection(adapter.module, layers)

    def of_facts(passes: Passes[Adapter], usable: Batch, facts: Facts) -> GradientNorms:
        chunks = pieces(usable, chunk_size or size)
        return _joined([_chunk_norms(passes, c, group, selected, by, facts) for c in chunks])

    def measured(passes: Passes[Adapter]) -> GradientNorms:
        usable = usable_by(adapter.module, batch)
        facts = facts_of(passes, usable, group)
        found = of_facts(passes, usable, facts)
        check_last(passes, next(pieces(usable, chunk_size or size)), group, found.log_likelihood)
        settled = facts_after(passes, usable, group, facts, found.norms)
        return found if settled is facts else of_facts(passes, usable, settled)

    found = scored(measured, adapter, adapter.module)
    return found if names.are_plain else _renamed(found, names, selected)


def _renamed(found: GradientNorms, names: Names, selected: Callable[[str], bool]) -> GradientNorms:
    """Norms by lasting names; those of fused weights as the rows of the weights that they are."""
    norms: dict[str, Tensor] = {}
    ways = {
        part.name: way
        for name, way in found.ways.items()
        for part in names.weights(name) or (Part(name),)
        if part.rows is None or selected(part.name)
    }
    for key, values in found.norms.items():
        term, _, name = key.partition("/")
        for part in names.weights(name) or (Part(name),):
            if part.rows is None:
                norms[f"{term}/{part.name}"] = values
            elif selected(part.name):
                norms[f"{term}/{part.name}"] = values[:, part.rows].sum(1)
    return GradientNorms(found.log_likelihood, norms, ways)


def last_layers(adapter: Adapter, batch: Batch, k: int) -> list[str]:
    """The last k parameters that a forward pass uses, to pass as ``layers``.

    The backward pass then ends where the first of them is used, and what comes before costs its
    forward pass only. A parameter that is used in several places counts at the first.

    Args:
        adapter: The model.
        batch: Samples of it; two are looked at.
        k: How many parameter tensors.

    Returns:
        Their names, in the order of use.

    Raises:
        ValueError: Fewer than k parameters are used, or k is not positive.
        TypeError: It is no whole number.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> last_layers(om.LogLikelihood(flow), torch.rand(3, 1, 8, 8), 2)
        ['levels.0.step_0.coupling.network.4.weight', 'levels.0.step_0.coupling.network.4.bias']
    """
    k, selected = whole("k", k, 1), selection(adapter.module, None)
    names = Names.of(adapter.module)
    by = _granularity_of("tensor", adapter.module, names)
    batch = without_ignored(adapter, batch)

    def used_in(passes: Passes[Adapter]) -> list[str]:
        view = passes.fresh()
        probe = usable_by(adapter.module, next(pieces(batch, 2)))
        recorder = Recorder(view.module, selected, tensors_in(probe), batch_size(probe), by)
        for _ in recorded_terms(recorder, checked_terms(view, probe)):
            pass
        parts = (names.weights(name) or (Part(name),) for name in recorder.used)
        return [part.name for each in parts for part in each]

    used = scored(used_in, adapter, adapter.module)
    if k > len(used):
        raise ValueError(f"Expected k from 1 to the {len(used)} parameters used, got {k}.")
    return used[-k:]


def _granularity_of(
    granularity: Granularity | Mapping[str, Granularity], module: nn.Module, names: Names
) -> Callable[[str], Granularity]:
    """The granularity of each parameter, by name; of what is fused by row, to be taken apart."""
    parts = {name: names.weights(name) or (Part(name),) for name, _ in module.named_parameters()}
    known = dict.fromkeys(part.name for each in parts.values() for part in each)
    by = granularity if isinstance(granularity, Mapping) else dict.fromkeys(known, granularity)
    for name, each in by.items():
        word("granularity", each, get_args(Granularity))
        if name not in known:
            raise ValueError(f"Expected a granularity of parameters, got one of {name!r}.")
    found: dict[str, Granularity] = {
        name: by.get(own[0].name, "tensor") for name, own in parts.items()
    }
    for name, own in parts.items():
        if own[0].rows is not None:
            _check_fused(name, [by.get(part.name, "tensor") for part in own])
            found[name] = "row"
    return found.__getitem__


def _check_fused(name: str, asked: list[Granularity]) -> None:
    if other := set(asked) - {"tensor"}:
        raise ValueError(
            f"Expected weights that are not fused to take their norms by {other.pop()}, got "
            f"{name!r}: call `unfuse_qkv_projections()`."
        )


def _checked_size(batch: Batch, group: int, chunk_size: int | None) -> int:
    size, group = batch_size(batch), whole("group", group, 1)
    if size == 0 or size % group:
        raise ValueError(f"Expected a multiple of group={group} samples, got {size}.")
    if chunk_size is not None and whole("chunk_size", chunk_size, 1) % group:
        raise ValueError(
            f"Expected chunk_size to be a multiple of group={group}, got {chunk_size}."
        )
    bad = ~finite_samples(batch)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected finite values, got NaN or infinity in {int(bad.sum())} of {size} samples, "
            f"the first at index {first}, in {describe(batch)}."
        )
    return size


def finite_samples(batch: Batch) -> Tensor:
    """Which samples hold finite values only, shape (B,), bool."""
    finite = [t.isfinite().reshape(len(t), -1).all(1).cpu() for t in tensors_in(batch)]
    return torch.stack(finite).all(0)


def _chunk_norms(
    passes: Passes[Adapter],
    chunk: Batch,
    group: int,
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
    facts: Facts,
) -> GradientNorms:
    n = batch_size(chunk) // group
    if (found := _by_vmap_alone(passes, chunk, n, selected, by, facts)) is not None:
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
    names = [name for name, _ in passes.module.named_parameters() if selected(name)]
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
    selected: Callable[[str], bool],
    by: Callable[[str], Granularity],
    facts: Facts,
) -> GradientNorms | None:
    """Of all parameters, where one of them has no rule, and `vmap` is right and quick; or None."""
    module = passes.module
    chosen = {name for name, _ in module.named_parameters() if selected(name)}
    has_rules = chosen.isdisjoint(facts.looped | facts.owned)
    if has_rules or n <= _FEWEST_VMAPPED or not chosen <= facts.vmapped:
        return None
    if not is_quick_alone(module, n, chosen):
        return None
    # What a pass of all samples checks, and gives.
    values = {term: value.detach() for term, value in checked_terms(passes.fresh(), chunk)}
    found = vmapped_norms(passes, chunk, n, chosen.__contains__, by)
    if found is None or not agree(found[0], values):
        return None
    reasons = {**dict.fromkeys(chosen, _BESIDE), **dict.fromkeys(facts.owned, _OWNED)}
    reasons |= facts.reasons
    names = [name for name, _ in module.named_parameters() if name in chosen]
    norms = {f"{term}/{name}": found[1][f"{term}/{name}"] for term in values for name in names}
    return GradientNorms(values, norms, {name: Way("vmap", reasons[name]) for name in names})


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
        if found is not None and agree(found[0], log_likelihood):
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


def _joined(parts: list[GradientNorms]) -> GradientNorms:
    def joined(of: Callable[[GradientNorms], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.cat([of(part)[key] for part in parts]) for key in of(parts[0])}

    ways = {
        name: max((part.ways[name] for part in parts), key=lambda way: _WAYS.index(way.name))
        for name in parts[0].ways
    }
    return GradientNorms(joined(lambda p: p.log_likelihood), joined(lambda p: p.norms), ways)
