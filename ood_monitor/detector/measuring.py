"""From a batch to what a plan's parts are of: a forward pass, gradients, or both."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch, batch_size
from ood_monitor.densities.features import table
from ood_monitor.densities.measurements import GRADIENT_NORMS, Measurements, Table
from ood_monitor.detector.plan import Plan
from ood_monitor.gradients import Granularity, terms_and_norms
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.statistics import expected_layers, forward_statistics
from ood_monitor.statistics.png import PNG_BITS, in_range

__all__ = ["measured_by"]

_log = logging.getLogger(__name__)


def measured_by(
    plan: Plan,
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers,
    granularity: Granularity,
    chunk_size: int | None,
    columns: Mapping[str, Mapping[str, int]],
) -> Measurements:
    """Terms and statistics of a batch of B samples.

    Args:
        plan: What is measured.
        adapter: The model.
        batch: The samples.
        layers: Which parameters are features.
        granularity: Of gradient norms.
        chunk_size: Samples a pass.
        columns: What a fitted detector's columns are of, and how many each has, by kind of part.

    Raises:
        ValueError: A batch or a model that :func:`~ood_monitor.gradient_norms` or
            :func:`~ood_monitor.statistics.forward_statistics` refuses.
    """
    tables: dict[str, Table] = {}
    likelihoods: dict[str, Tensor] = {}
    if plan.of_forward:
        likelihoods, tables = _forward(plan, adapter, batch, layers, chunk_size, columns)
    if plan.needs_gradients:
        found = terms_and_norms(
            adapter, batch, layers=layers, granularity=granularity, chunk_size=chunk_size
        )
        tables[GRADIENT_NORMS], likelihoods = Table(*table(found.norms)), found.log_likelihood
    terms, values = table(likelihoods)
    return Measurements(terms, values, tables)


def _forward(
    plan: Plan,
    adapter: Adapter,
    batch: Batch,
    layers: Layers,
    chunk_size: int | None,
    columns: Mapping[str, Mapping[str, int]],
) -> tuple[dict[str, Tensor], dict[str, Table]]:
    kinds = plan.of_forward
    # All of them are known after the first pass; which ones a pattern chooses is looked up.
    watched: Mapping[str, int] | None = columns.get("expected_norms")
    if "expected_norms" in kinds and watched is None and layers is not None:
        watched = _layers(adapter, batch, layers)
    found = forward_statistics(
        adapter,
        batch,
        sample=plan.sample,
        layers=watched,
        norms="expected_norms" in kinds,
        values="values" in kinds,
        map="map" in kinds,
        chunk_size=chunk_size,
    )
    given = {"values": found.values, "map": found.map, "expected_norms": found.expected_norms}
    if PNG_BITS in found.values and not columns:
        found.values[PNG_BITS] = _bits_in_range(found.values[PNG_BITS], adapter, batch)
    size = batch_size(batch)
    tables: dict[str, Table] = {k: _table(given[k], size) for k in given if k in kinds}
    if "log_likelihood" in kinds:
        _, values = table(found.log_likelihood)
        tables["log_likelihood"] = Table(("total",), values.sum(1, keepdims=True))
    return found.log_likelihood, tables


def _bits_in_range(bits: Tensor, adapter: Adapter, batch: Batch) -> Tensor:
    """Bits (B,) of held-out images, nan of those that would be shown with values clipped."""
    images = adapter.images(batch)
    assert images is not None
    shown = in_range(images).to(bits.device)
    if not shown.all():
        _log.warning(
            "%d of %d held-out images have values outside the range that they are shown in, so "
            "that the bits of their PNG are no column; give the adapter its `value_range=`.",
            int((~shown).sum()),
            len(shown),
        )
    return torch.where(shown, bits, torch.nan)


def _table(columns: Mapping[str, Tensor], size: int) -> Table:
    """Columns of B samples, of which a model may have none."""
    return Table(*table(columns)) if columns else Table((), np.empty((size, 0)))


def _layers(adapter: Adapter, batch: Batch, layers: Layers) -> Mapping[str, int]:
    """The layers with an expected norm whose weight is among the chosen parameters."""
    found = expected_layers(adapter, batch)
    chosen = selection(adapter.module, layers)
    return {name: width for name, width in found.items() if chosen(f"{name}.weight")}
