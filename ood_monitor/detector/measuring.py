"""From a batch to what a plan's parts are of: a forward pass, gradients, or both."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch, SampleKind, batch_size, tensors_in
from ood_monitor.densities.features import table
from ood_monitor.densities.measurements import GRADIENT_NORMS, Explaining, Measurements, Table
from ood_monitor.densities.parts import Kind
from ood_monitor.detector.channels import channel_norms
from ood_monitor.detector.plan import Plan
from ood_monitor.detector.summed import norms_of
from ood_monitor.gradients import Granularity
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.saving.fitted import Fitted
from ood_monitor.statistics import (
    ForwardStatistics,
    denoiser_statistics,
    expected_layers,
    forward_statistics,
    has_layers,
    has_statistics_without_noise,
    surprise_by_place,
)
from ood_monitor.statistics.live import LivePass
from ood_monitor.statistics.png import PNG_BITS, in_range

__all__ = ["explaining_of", "is_measurable", "measured_by"]

_log = logging.getLogger(__name__)

#: Samples of a pass that explains by layer, whatever it takes; the numbers in layers' outputs up to
#: which there are more, 256 MiB in single precision; the most places whose deviations are kept.
_EXPLAINED_AT_ONCE, _NUMBERS, _MOST_PLACES = 8, 1 << 26, 1 << 16


def is_measurable(plan: Plan, adapter: Adapter, batch: Batch) -> bool:
    """Whether an adapter's passes give what a plan's parts without gradients need."""
    if plan.has("expected_norms"):
        return has_layers(adapter, batch)
    return not plan.of_denoiser or has_statistics_without_noise(adapter, batch)


def measured_by(
    plan: Plan,
    adapter: Adapter,
    batch: Batch,
    *,
    differentiated: Adapter,
    layers: Layers,
    granularity: Granularity,
    chunk_size: int | None,
    any_size: bool = False,
    fitted: Fitted | None = None,
    live: LivePass | None = None,
) -> Measurements:
    """Terms and statistics of a batch of B samples.

    Args:
        plan: What is measured.
        adapter: The model.
        batch: The samples.
        differentiated: The same model, as gradients are taken of it.
        layers: Which parameters are features.
        granularity: Of gradient norms.
        chunk_size: Samples a pass.
        any_size: Whether a denoiser's sums over positions are means.
        fitted: What is to judge them; None of samples to fit on.
        live: A pass over the batch that was made already.

    Raises:
        ValueError: A batch or a model that :func:`~ood_monitor.gradient_norms` or
            :func:`~ood_monitor.statistics.forward_statistics` refuses.
    """
    tables: dict[str, Table] = {}
    likelihoods: dict[str, Tensor] = {}
    if plan.of_forward:
        found = _forward(plan, adapter, batch, layers, chunk_size, fitted, live)
        likelihoods, tables = found.log_likelihood, _tables(found, plan, batch_size(batch))
    if plan.of_denoiser:
        tables |= _without_noise(plan, adapter, batch, layers, chunk_size, any_size)
    if plan.has("own_calls"):
        tables["own_calls"] = _of_own_calls(adapter, batch)
    if plan.has("channel_norms"):
        norms = channel_norms(
            adapter,
            batch,
            differentiated=differentiated,
            layers=layers,
            chunk_size=chunk_size,
            fitted=() if fitted is None else _columns_of(fitted, "channel_norms"),
        )
        tables["channel_norms"] = Table(*table(_named("channel_norms", norms.norms)))
        likelihoods = norms.log_likelihood
    if plan.has("gradient_norms"):
        norms = norms_of(
            differentiated, batch, layers=layers, granularity=granularity, chunk_size=chunk_size
        )
        tables[GRADIENT_NORMS], likelihoods = Table(*table(norms.norms)), norms.log_likelihood
    if not likelihoods:
        return Measurements((), np.empty((batch_size(batch), 0)), tables)
    terms, values = table(likelihoods)
    return Measurements(terms, values, tables)


def _forward(
    plan: Plan,
    adapter: Adapter,
    batch: Batch,
    layers: Layers,
    chunk_size: int | None,
    fitted: Fitted | None,
    live: LivePass | None,
) -> ForwardStatistics:
    """What one forward pass gives of the plan's parts."""
    found = forward_statistics(
        adapter,
        batch,
        sample=plan.sample,
        layers=_expected(adapter, batch, layers) if fitted is None else fitted.expected_layers,
        norms=plan.has("expected_norms"),
        values=plan.has("values"),
        map=plan.has("map"),
        chunk_size=chunk_size,
        live=live,
    )
    if fitted is None and PNG_BITS in found.values:
        found.values[PNG_BITS] = _bits_in_range(found.values[PNG_BITS], adapter, batch)
    return found


def explaining_of(
    adapter: Adapter,
    batch: Batch,
    *,
    sample: SampleKind | None,
    layers: Layers,
    chunk_size: int | None,
    norms: Adapter | None,
) -> Explaining:
    """What explains others by place, and by norms of an adapter by layer, of n held-out samples.

    Gradients take the memory of a training step, so that few samples go into a pass of a large
    model. Whatever they fail of is kept as the reason: a detector that needs none goes without.
    """
    found = surprise_by_place(adapter, batch, chunk_size=chunk_size)
    # Places of sequences differ from text to text.
    kept = {term: each for term, each in found.items() if _is_small(each) and sample != "sequence"}
    places = {term: each.numpy() for term, each in kept.items()}
    of_layers, without = None, ""
    if norms is not None:
        try:
            size = _explained_at_once(norms, batch)
            size = min(chunk_size or size, size)
            given = norms_of(norms, batch, layers=layers, chunk_size=size)
            of_layers = Table(*table(given.norms))
        except Exception as error:  # of any kind, where a model can only run forward
            without = f"{type(error).__name__}: {error}"
    return Explaining(of_layers, places, batch_size(batch), without)


def _explained_at_once(adapter: Adapter, batch: Batch) -> int:
    """Samples a pass, by the numbers that layers make of each if they keep its positions."""
    inputs = sum(tensor.numel() for tensor in tensors_in(batch)) // batch_size(batch)
    outputs = sum(weights.shape[0] for weights in adapter.module.parameters() if weights.ndim)
    return max(_EXPLAINED_AT_ONCE, _NUMBERS // max(1, inputs * outputs))


def _without_noise(
    plan: Plan,
    adapter: Adapter,
    batch: Batch,
    layers: Layers,
    chunk_size: int | None,
    any_size: bool,
) -> dict[str, Table]:
    """Of each part of a denoiser, its columns; energies as logarithms, beside cosines."""
    found = denoiser_statistics(
        adapter, batch, layers=layers, chunk_size=chunk_size, any_size=any_size
    )
    logs = _logarithms(found.energies)
    given: dict[Kind, Mapping[str, Tensor]] = {
        "output_layer": found.output_layer,
        "energies": logs | found.cosines,
        "condition": found.condition,
    }
    if plan.has("condition") and not found.condition:
        raise ValueError(
            "Expected an adapter with a null condition for parts of 'condition', got one without: "
            "give DenoisingBound its `null_condition=`, or `fit_pipeline` condition_check=True."
        )
    return {kind: Table(*table(_named(kind, given[kind]))) for kind in plan.of_denoiser}


def _of_own_calls(adapter: Adapter, batch: Batch) -> Table:
    """What a batch's samples come with."""
    found = adapter.own_calls(batch)
    if not found:
        raise ValueError(
            "Expected samples with what was seen of the calls that made them, for the part "
            "'own_calls', got none: fit a pipeline's own samples, `fit_pipeline(pipe, call=...)`, "
            "and watch its outputs."
        )
    return Table(*table(_named("own_calls", found)))


def _logarithms(energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of columns (B,) or (B, k) each, all at once: a small model has as many as it has layers."""
    columns = [each if each.ndim > 1 else each[:, None] for each in energies.values()]
    logs = torch.cat(columns, 1).double().clamp_(min=np.finfo(float).tiny).log_()
    pieces = torch.split(logs, [each.shape[1] for each in columns], 1)
    pairs = zip(energies.items(), pieces, strict=True)
    return {name: piece.reshape(each.shape) for (name, each), piece in pairs}


def _named(kind: Kind, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns under the name of their part."""
    return {f"{kind}/{name}": values for name, values in columns.items()}


def _columns_of(fitted: Fitted, kind: Kind) -> list[str]:
    """The columns of a fitted part, without the name of its kind."""
    part = next(part for part in fitted.joined.parts if part.kind == kind)
    return [name.removeprefix(f"{kind}/") for name in part.columns.all_names]


def _is_small(values: Tensor) -> bool:
    return values[0].numel() <= _MOST_PLACES


def _expected(adapter: Adapter, batch: Batch, layers: Layers) -> Mapping[str, int] | None:
    """The layers whose weight is among the chosen parameters; None for all that a pass calls."""
    if layers is None:
        return None
    chosen = selection(adapter.module, layers, shards=True)
    found = expected_layers(adapter, batch)
    return {name: width for name, width in found.items() if chosen(f"{name}.weight")}


def _bits_in_range(bits: Tensor, adapter: Adapter, batch: Batch) -> Tensor:
    """Bits (B,) of held-out images, nan of those that would be shown with values clipped."""
    images = adapter.images(batch)
    assert images is not None
    shown = in_range(images).to(bits.device)
    if not shown.all():
        _log.warning(
            "%d of %d held-out images have values outside the range that they are shown in, so "
            "that the bits of their PNG are no column; give the adapter its `value_range=`. "
            "[OOD111]",
            int((~shown).sum()),
            len(shown),
        )
    return torch.where(shown, bits, torch.nan)


def _tables(found: ForwardStatistics, plan: Plan, size: int) -> dict[str, Table]:
    """Of each part, its columns under its name: "values/latent_1.surprise"."""
    terms = [value.double() for value in found.log_likelihood.values()]
    given: dict[Kind, Mapping[str, Tensor]] = {
        "values": found.values,
        "map": found.map,
        "expected_norms": found.expected_norms,
        "log_likelihood": {"total": torch.stack(terms).sum(0)},
    }
    tables: dict[str, Table] = {}
    for kind in given:
        if kind in plan.of_forward:
            columns = _named(kind, given[kind])
            # A model may have none of a kind.
            tables[kind] = Table(*table(columns)) if columns else Table((), np.empty((size, 0)))
    return tables
