"""All that one forward pass gives of a sample: values, what was expected, and layers' inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    SampleKind,
    batch_size,
    checked_sample,
    describe,
    map_tensors,
    pieces,
    usable_by,
)
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.checks import whole
from ood_monitor.modules import Names, Passes, part_of, scored
from ood_monitor.statistics.expected_norms import (
    LayersOfAPass,
    WithoutLayersError,
    discovered,
    known_layers,
    norms_of,
    one_pass,
)
from ood_monitor.statistics.live import LivePass
from ood_monitor.statistics.png import PNG_BITS, png_bits
from ood_monitor.statistics.rows import Layout, Single, layout_of
from ood_monitor.statistics.surprise import surprise_map, value_columns

__all__ = [
    "ForwardStatistics",
    "expected_layers",
    "forward_statistics",
    "has_layers",
    "input_dimensions",
]

#: Of adapters that were asked.
_has_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class ForwardStatistics:
    """What a forward pass gives of B samples.

    Attributes:
        log_likelihood: Each term's values, ``{term: (B,)}``, in nats.
        values: Columns of :func:`~ood_monitor.statistics.surprise.value_columns`, and
            ``"png_bits"`` if samples are images, ``{column: (B,)}``, float64.
        map: Those of :func:`~ood_monitor.statistics.surprise.surprise_map`, likewise.
        expected_norms: ``{layer: (B, G)}``, sums of squares of the layer's input by group of
            channels, over positions; float32, or float64 of a model in double precision.
    """

    log_likelihood: dict[str, Tensor]
    values: dict[str, Tensor]
    map: dict[str, Tensor]
    expected_norms: dict[str, Tensor]


def forward_statistics(
    adapter: Adapter,
    batch: Batch,
    *,
    sample: SampleKind | None,
    layers: Sequence[str] | Mapping[str, int] | None = None,
    norms: bool = True,
    values: bool = True,
    map: bool = False,
    chunk_size: int | None = None,
    live: LivePass | None = None,
) -> ForwardStatistics:
    """Terms, values and expected norms of each sample, without any gradient.

    The model is left as it was. A sample whose pass is not finite has columns that are not, and
    changes none of the others'.

    Args:
        adapter: The model.
        batch: B samples, on any device.
        sample: What a sample is. Values of a sequence are means over its elements; images have
            the bits of their PNG.
        layers: Names of layers, as :func:`expected_layers` gives them, with their widths or
            without; by default those that the adapter's passes have called so far. One that is not
            called has zeros.
        norms: Whether to take expected norms.
        values: Whether to make the columns of values.
        map: Whether to make those of the map.
        chunk_size: Samples a pass, to bound memory.
        live: A pass over the batch that the user has made, in the place of one; it takes no chunks.

    Raises:
        ValueError: The batch is empty, a term or its elements are of the wrong form, ``layers``
            names no layer, or no layer is called as a module.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> images = torch.rand(3, 1, 8, 8)
        >>> found = forward_statistics(om.LogLikelihood(flow), images, sample="image")
        >>> found.expected_norms["levels.0.step_0.coupling.network.2"].shape
        torch.Size([3, 4])
    """
    batch = without_ignored(adapter, batch)
    size = batch_size(batch)
    if size == 0:
        raise ValueError(f"Expected samples, got {describe(batch)}.")
    checked_sample(sample)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, 1)
    wanted = _Wanted(sample, values, map, layers if isinstance(layers, Mapping) else {})

    def measured(passes: Passes[Adapter]) -> ForwardStatistics:
        usable = usable_by(adapter.module, batch)
        chunks = [usable] if live else list(pieces(usable, chunk_size or size))
        known = known_layers(passes, chunks[0], layers) if norms else {}
        return _joined(
            part for chunk in chunks for part in _parts(passes, chunk, known, wanted, live)
        )

    return scored(measured, adapter, adapter.module)


def expected_layers(adapter: Adapter, batch: Batch) -> dict[str, int]:
    """The layers that have an expected norm, and how many groups of channels each has.

    They are what a pass over the batch calls of convolutions, transposed ones and linear maps,
    found by what they compute. A layer that none of these samples needs (an expert) is not found.

    Args:
        adapter: The model.
        batch: Samples of it.

    Returns:
        ``{layer: G}`` with module names, in module order, and G = min(32, input channels).

    Raises:
        ValueError: There is none.
    """
    batch = without_ignored(adapter, batch)

    def found(passes: Passes[Adapter]) -> dict[str, int]:
        usable = usable_by(adapter.module, batch)
        return {name: layer.groups for name, layer in discovered(passes, usable).items()}

    return scored(found, adapter, adapter.module)


def input_dimensions(adapter: Adapter, batch: Batch) -> dict[str, int]:
    """Weights of the layers that have an expected norm, and where their input channels are.

    Args:
        adapter: The model.
        batch: Samples of it.

    Returns:
        ``{parameter: dimension}``, 0 or 1, of the parameters of these layers that have two
        dimensions or more; of a depthwise convolution's, the one that has the channels. Those of
        a grouped one are summed over the groups. A tied one has its first name.

    Raises:
        ValueError: There is no such layer.
    """
    batch = without_ignored(adapter, batch)

    def found(passes: Passes[Adapter]) -> dict[str, int]:
        usable = usable_by(adapter.module, batch)
        known = known_layers(passes, usable, None)
        lasting = Names.of(passes.module)
        named = ((lasting.weights(name), p) for name, p in passes.module.named_parameters())
        # Of tied ones, once; of a fused layer each of those that it stands for.
        names = {id(p): parts[0].name for parts, p in named if len(parts) == 1}
        return {
            names.get(id(p), f"{layer}.{own}"): of.dimension_in(p.shape)
            for layer, of in known.items()
            if of is not None
            for own, p in part_of(passes.module, layer).named_parameters()
            if p.ndim > 1
        }

    return scored(found, adapter, adapter.module)


def has_layers(adapter: Adapter, batch: Batch) -> bool:
    """Whether an adapter's passes call a layer, of which there are expected norms.

    By a pass of one sample, the first time.
    """
    if adapter not in _has_layers:
        try:
            _has_layers[adapter] = bool(expected_layers(adapter, next(pieces(batch, 1))))
        except WithoutLayersError:
            _has_layers[adapter] = False
    found: bool = _has_layers[adapter]
    return found


@dataclass(frozen=True)
class _Wanted:
    """What is asked for beside norms, and the groups of layers that were told."""

    sample: SampleKind | None
    values: bool
    map: bool
    groups: Mapping[str, int]


@dataclass
class _Columns:
    """Gathers the columns of a pass, term by term: none is kept longer than it must be."""

    wanted: _Wanted
    values: dict[str, Tensor] = field(default_factory=dict)
    map: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, term: str, value: Tensor | Elements) -> None:
        if self.wanted.values:
            found = value_columns({term: value}, by_element=self.wanted.sample == "sequence")
            self.values = {**found, **self.values}
        if self.wanted.map:
            self.map |= surprise_map({term: value})


def _parts(
    passes: Passes[Adapter],
    chunk: Batch,
    layers: LayersOfAPass,
    wanted: _Wanted,
    live: LivePass | None = None,
) -> Iterable[ForwardStatistics]:
    """The statistics of a chunk, by one pass, or by one for each sample where it must be."""
    size, columns = batch_size(chunk), _Columns(wanted)
    if live is None:
        single = one_pass(passes, chunk, layers, columns)
    else:
        single = live.single(passes, columns)
    layout = Layout()
    if layers and size > 1:

        def alone(index: int) -> Single:
            own = map_tensors(lambda t: t[index : index + 1], chunk)
            return one_pass(passes, own, layers)

        layout = layout_of(passes.holder, size, single, alone)
    if layout.alone:
        return [part for own in pieces(chunk, 1) for part in _parts(passes, own, layers, wanted)]
    if wanted.values and wanted.sample == "image":
        images = passes.holder.images(chunk)
        if images is not None:
            columns.values[PNG_BITS] = png_bits(images).to(next(iter(single.terms.values())).device)
    expected = norms_of(single, layout, layers, wanted.groups, size)
    return [ForwardStatistics(dict(single.terms), columns.values, columns.map, expected)]


def _joined(parts: Iterable[ForwardStatistics]) -> ForwardStatistics:
    parts = list(parts)

    def joined(name: str) -> dict[str, Tensor]:
        columns: list[dict[str, Tensor]] = [getattr(part, name) for part in parts]
        if any(other.keys() != columns[0].keys() for other in columns):
            raise ValueError(
                f"Expected the same columns of all samples, got {sorted(columns[0])} and others."
            )
        if len(columns) == 1:
            return columns[0]
        return {key: torch.cat([of[key] for of in columns]) for key in columns[0]}

    return ForwardStatistics(
        joined("log_likelihood"), joined("values"), joined("map"), joined("expected_norms")
    )
