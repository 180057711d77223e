"""Squared gradient norms per sample and layer: the features that everything else rests on.

For a term L of the log-likelihood, a sample x and a parameter tensor theta_l (a *layer*),

    f_l(x) = || d L(x) / d theta_l ||^2,

in nats squared per parameter unit squared. References: Approximations to the Fisher Information
Metric of Deep Generative Models for Out-Of-Distribution Detection (Dauncey, Holmes, Williams,
Falck, 2024), https://arxiv.org/abs/2403.01485
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args, overload

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
from ood_monitor.gradients.check import Facts, check_last, facts_after, facts_of
from ood_monitor.gradients.factors import Granularity
from ood_monitor.gradients.fast import recorded_terms
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.gradients.recorder import Recorder
from ood_monitor.gradients.ways import GradientNorms, Way, chunk_norms, joined
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
        return joined([chunk_norms(passes, c, group, selected, by, facts) for c in chunks])

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
