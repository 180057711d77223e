"""What a denoiser leaves of samples without noise: its last layer's gradient, and energies.

One forward pass a level, and no backward pass over the network. With noise that all samples share a
draw decides what is seen; without it nothing does.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import (
    NULL_SUFFIX,
    Adapter,
    Batch,
    batch_size,
    describe,
    map_tensors,
    pieces,
    tensors_in,
    usable_by,
)
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.checks import flag, whole
from ood_monitor.gradients.factors import full_precision
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.modules import Passes, scored
from ood_monitor.statistics.hooks import Sums, Taken
from ood_monitor.statistics.layers import Discovery, Layer
from ood_monitor.statistics.output_layer import OutputLayer
from ood_monitor.statistics.rows import Layout, Single, close, layout_of, precision_of_weights
from ood_monitor.statistics.spectrum import band_energies, is_image, lag_cosines

__all__ = ["DenoiserStatistics", "denoiser_statistics", "has_statistics_without_noise"]

_log = logging.getLogger(__name__)

#: Numbers of a batch at all its levels, up to which these are passed at once: a small model spends
#: as long between layers as in them.
_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class DenoiserStatistics:
    """What passes without noise give of B samples, in columns by level.

    Attributes:
        output_layer: ``{"t=1/expected": (B, G)}``, and ``apart`` and ``norm``, sums of squares by
            group of the last layer's input channels, as
            :mod:`~ood_monitor.statistics.output_layer` defines them.
        energies: ``{"t=1/input.<layer>": (B,)}``, sums of squares of what each layer was given, and
            ``{"t=1/band": (B, bands)}`` of residuals that are images.
        cosines: ``{"t=1/lag": (B, 6)}``, of residuals that are images, with themselves shifted.
        condition: ``{"t=500": (B,)}``: by how much a sample's condition lowers half its squared
            residual, against the null condition.
    """

    output_layer: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)
    cosines: dict[str, Tensor] = field(default_factory=dict)
    condition: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Known:
    """What was found of an adapter's passes, and how their sums are taken.

    Attributes:
        layers: By name.
        last: By level, the one that was called last and what is known of it.
        called: By level, the names of those that were called: a model may have a network for each.
        parts: Of what the model was made then.
        at_once: Whether a pass of all levels gives the same; None where it was not tried.
        any_size: Whether means over positions are taken in place of sums.
    """

    layers: Mapping[str, Layer]
    last: Mapping[str, tuple[str, Layer]]
    called: Mapping[str, frozenset[str]]
    parts: int
    at_once: bool | None = None
    any_size: bool = False

    @property
    def levels(self) -> int:
        """How many residuals there are."""
        return len(self.last)


#: By adapter; and whether there are such statistics of it.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_measurable: WeakIdKeyDictionary = WeakIdKeyDictionary()


def denoiser_statistics(
    adapter: Adapter,
    batch: Batch,
    *,
    layers: Layers = None,
    chunk_size: int | None = None,
    any_size: bool = False,
) -> DenoiserStatistics:
    """The last layer's gradient and the energies of each sample, without noise.

    The model is left as it was. A sample whose pass is not finite has columns that are not, and
    changes none of the others'.

    With ``any_size`` all sums over positions are means, so that samples of several sizes can be
    compared: each layer's by the number of positions, or rows, that it is given of that sample, a
    band's by that of its frequencies, and the condition's gain by that of the residual's numbers.
    The last layer's realised gradient is that of the mean over its positions.

    Args:
        adapter: One with :meth:`~ood_monitor.Adapter.residuals`, as of a denoising bound.
        batch: B samples, on any device.
        layers: Whose inputs' energies are taken, by the names of their weights; all by default.
        chunk_size: Samples a pass, to bound memory.
        any_size: Whether means over positions are taken in place of sums.

    Raises:
        ValueError: The batch is empty, the adapter is no denoiser, no layer is called as a module,
            or the last one is not called once in a pass; or ``any_size``, and images of fewer than
            6 by 6 positions.

    Example:
        >>> import ood_monitor as om
        >>> network = torch.nn.Conv2d(1, 1, 3, padding=1)
        >>> network.forward = lambda x, t, forward=network.forward: forward(x)
        >>> bound = om.DenoisingBound(network, torch.linspace(0.9999, 0.01, 1000))
        >>> found = denoiser_statistics(bound, torch.rand(3, 1, 8, 8))
        >>> {name: tuple(values.shape) for name, values in found.energies.items()}
        {'t=0/input.': (3,), 't=0/band': (3, 6), 't=929/input.': (3,), 't=929/band': (3, 6)}
    """
    any_size, batch = flag("any_size", any_size), without_ignored(adapter, batch)
    size = batch_size(batch)
    if size == 0:
        raise ValueError(f"Expected samples, got {describe(batch)}.")
    if chunk_size is not None:
        whole("chunk_size", chunk_size, 1)

    def measured(passes: Passes[Adapter]) -> DenoiserStatistics:
        usable = usable_by(adapter.module, batch)
        chunks = list(pieces(usable, chunk_size or size))
        known = _chosen(_found(passes, chunks[0]), adapter.module, layers)
        known = replace(known, any_size=any_size)
        return _joined([part for chunk in chunks for part in _parts(passes, chunk, known)])

    return scored(measured, adapter, adapter.module)


def has_statistics_without_noise(adapter: Adapter, batch: Batch) -> bool:
    """Whether :func:`denoiser_statistics` measures an adapter, tried on a sample the first time.

    Where it does not, the log says why.

    Raises:
        ValueError: The sample is at fault, of which the adapter has no likelihood either.
    """
    if adapter not in _measurable:
        own = next(pieces(batch, 1))
        try:
            denoiser_statistics(adapter, own)
            _measurable[adapter] = True
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:  # also PyTorch's, of what it cannot run so
            usable = usable_by(adapter.module, own)
            scored(lambda p: list(p.fresh().log_likelihood(usable)), adapter, adapter.module)
            _log.warning("Gradient norms are watched, since without noise: %s [OOD113]", error)
            _measurable[adapter] = False
    found: bool = _measurable[adapter]
    return found


@dataclass(frozen=True)
class _Level:
    """What a pass at one level gave of a batch, whose residuals have so many numbers each."""

    name: str
    single: Single
    squares: Mapping[str, Tensor]
    numbers: int
    bands: Tensor | None
    lags: Tensor | None

    def of(self, name: str, rows: slice) -> "_Level":
        """Some of its rows, as those of a level."""
        taken = {k: replace(it, sums=it.sums[rows]) for k, it in self.single.taken.items()}
        terms = {name: self.single.terms[self.name][rows]}
        squares = {k: each[rows] for k, each in self.squares.items()}
        bands, lags = (None if it is None else it[rows] for it in (self.bands, self.lags))
        return _Level(name, Single(taken, terms), squares, self.numbers, bands, lags)


def _parts(passes: Passes[Adapter], chunk: Batch, known: _Known) -> list[DenoiserStatistics]:
    """The statistics of a chunk, or of each of its samples where they must be alone."""
    size, found, layout = batch_size(chunk), DenoiserStatistics(), Layout()

    def alone(index: int) -> Single:
        own = map_tensors(lambda tensor: tensor[index : index + 1], chunk)
        return _of_all(_levels(passes, own, known))

    levels = list(_levels(passes, chunk, known))  # a pass of one sample would take its hooks
    if known.at_once is None and _is_small(chunk, known.levels):
        known, levels = _tried(passes, chunk, known, levels)
    if size > 1:
        layout = layout_of(passes.holder, size, _of_all(levels), alone)
    if layout.alone:
        return [part for own in pieces(chunk, 1) for part in _parts(passes, own, known)]
    energies = {level.name: level.single.terms[level.name] for level in levels}
    for level in levels:
        if level.name.endswith(NULL_SUFFIX):
            own = level.name.removesuffix(NULL_SUFFIX)
            gain = (energies[level.name] - energies[own]) / 2
            found.condition[own] = gain / level.numbers if known.any_size else gain
        else:
            _add(found, level, _inputs(level, layout, known, size))
    return [found]


def _of_all(levels: Iterable[_Level]) -> Single:
    """What is compared of samples alone and in a batch: of every level, by its name."""
    taken: dict[str, Taken] = {}
    terms: dict[str, Tensor] = {}
    for level in levels:
        taken |= {f"{level.name}/{name}": each for name, each in level.single.taken.items()}
        terms |= level.single.terms
    return Single(taken, terms)


def _inputs(level: _Level, layout: Layout, known: _Known, size: int) -> dict[str, Tensor]:
    """Sums or means of squares of each of a level's layers' input, (B,); else zeros."""
    energy = next(iter(level.single.terms.values()))
    own = [name for name in known.layers if name in known.called[level.name]]
    found = {name: torch.zeros_like(energy) for name in own}
    for name in own:
        taken = level.single.taken.get(name)
        if taken is None:
            continue
        key = f"{level.name}/{name}"
        sums = layout.sums(key, taken, size).sum(1)
        found[name] = sums / layout.positions(key, taken) if known.any_size else sums
    return found


def _add(found: DenoiserStatistics, level: _Level, inputs: Mapping[str, Tensor]) -> None:
    """Put a level's columns under its name."""
    for name, squares in level.squares.items():
        found.output_layer[f"{level.name}/{name}"] = squares
    for name, sums in inputs.items():
        found.energies[f"{level.name}/input.{name}"] = sums
    if level.bands is not None and level.lags is not None:
        found.energies[f"{level.name}/band"] = level.bands
        found.cosines[f"{level.name}/lag"] = level.lags


def _tried(
    passes: Passes[Adapter], batch: Batch, known: _Known, levels: list[_Level]
) -> tuple[_Known, list[_Level]]:
    """Whether a pass of all levels gives what a pass of each gave; and what counts, to the bit."""
    try:
        together = list(_at_once(passes, batch, known))
    except Exception:  # of any kind: a network may take one time a batch
        together = []
    dtype = precision_of_weights(passes.holder)
    pairs = zip(together, levels, strict=False)
    is_same = len(together) == len(levels) and all(_same(a, b, dtype) for a, b in pairs)
    _known[passes.holder] = replace(_known[passes.holder], at_once=is_same)
    return replace(known, at_once=is_same), together if is_same else levels


def _same(a: _Level, b: _Level, dtype: torch.dtype) -> bool:
    """Whether two passes gave the same of a level, but for rounding."""
    if a.name != b.name or a.single.taken.keys() != b.single.taken.keys():
        return False
    pairs = [(a.squares[name], b.squares[name]) for name in b.squares]
    pairs.append((a.single.terms[b.name], b.single.terms[b.name]))
    for name, taken in b.single.taken.items():
        if a.single.taken[name].rows != taken.rows:
            return False
        pairs.append((a.single.taken[name].sums, taken.sums))
    return all(x.shape == y.shape and close(x, y, dtype) for x, y in pairs)


def _is_small(batch: Batch, levels: int) -> bool:
    """Whether a pass of all levels costs no memory to speak of."""
    numbers = sum(tensor.numel() for tensor in tensors_in(batch))
    return levels * numbers <= _AT_ONCE


def _at_once(passes: Passes[Adapter], batch: Batch, known: _Known) -> Iterator[_Level]:
    """The levels by one pass, of which each has its rows; none if the adapter has no such pass."""
    view, size = passes.fresh(), batch_size(batch)
    ends = set(known.last.values())
    if len(ends) > 1:
        return
    last = OutputLayer(view.module, *ends.pop())
    sums = Sums(view.module, known.layers, size * known.levels, by_group=False)
    with sums.hooked(), last.hooked():
        with torch.no_grad(), sums.taking():
            found = view.residuals_at_once(map_tensors(torch.clone, batch))
        if found is None:
            return
        names, residual = found
        whole = _measured("", residual, sums, last, known.any_size)
        for i, name in enumerate(names):
            yield whole.of(name, slice(i * size, (i + 1) * size))


def _levels(passes: Passes[Adapter], batch: Batch, known: _Known) -> Iterator[_Level]:
    """A pass a level, or one of all, with hooks on the layers while the model runs."""
    if known.at_once and _is_small(batch, known.levels):
        yield from _at_once(passes, batch, known)
        return
    view, size = passes.fresh(), batch_size(batch)
    sums = Sums(view.module, known.layers, size, by_group=False)
    ends = {end: OutputLayer(view.module, *end) for end in set(known.last.values())}
    with ExitStack() as stack:
        stack.enter_context(sums.hooked())
        for last in ends.values():
            stack.enter_context(last.hooked())
        residuals = iter(_residuals(view, batch))
        while True:
            with torch.no_grad(), sums.taking():
                item = next(residuals, None)
            if item is None:
                return
            name, residual = item
            yield _measured(name, residual, sums, ends[known.last[name]], known.any_size)
            sums.taken = {}
            for last in ends.values():
                last.forget()


def _measured(name: str, residual: Tensor, sums: Sums, last: OutputLayer, any_size: bool) -> _Level:
    squares = last.squares(residual, any_size=any_size)
    residual = full_precision(residual.detach())
    energy = residual.flatten(1).square().sum(1)
    has_bands = is_image(residual)
    bands = band_energies(residual, any_size=any_size) if has_bands else None
    lags = lag_cosines(residual) if has_bands else None
    numbers = residual[0].numel()
    return _Level(name, Single(dict(sums.taken), {name: energy}), squares, numbers, bands, lags)


def _residuals(view: Adapter, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    yield from view.residuals(map_tensors(torch.clone, batch))  # a model may write into its input


def _found(passes: Passes[Adapter], batch: Batch) -> _Known:
    """The layers of a pass and the last of them, found once for each adapter."""
    before: _Known | None = _known.get(passes.holder)  # type: ignore[no-untyped-call]
    parts = _parts_of(passes.module)
    if before is None or before.parts != parts:
        view = passes.fresh()
        discovery = Discovery(view.module)
        last, called = dict[str, str | None](), dict[str, frozenset[str]]()
        with torch.no_grad(), discovery.looking():
            for name, _ in _residuals(view, batch):
                last[name] = discovery.last if discovery.called_layers else None
                called[name] = frozenset(discovery.called_layers)
                discovery.called_layers.clear()
        ends = {name: (at, discovery.found[at]) for name, at in last.items() if at is not None}
        if not ends or len(ends) < len(last):
            raise ValueError(
                f"Expected {type(view).__name__} to call modules that are convolutions or linear "
                "maps, got none: use method='gradient_norms'."
            )
        _known[passes.holder] = _Known(discovery.found, ends, called, parts)
    known: _Known = _known[passes.holder]
    return known


def _chosen(known: _Known, module: nn.Module, layers: Layers) -> _Known:
    """With those layers alone whose weight is among the chosen parameters."""
    if layers is None:
        return known
    is_chosen = selection(module, layers, shards=True)
    of = {name: layer for name, layer in known.layers.items() if is_chosen(f"{name}.weight")}
    return replace(known, layers=of)


def _parts_of(module: nn.Module) -> int:
    """A number that changes where a part is replaced, wrapped or added."""
    return hash((id(module), *((name, id(part)) for name, part in module.named_modules())))


def _joined(parts: list[DenoiserStatistics]) -> DenoiserStatistics:
    def joined(name: str) -> dict[str, Tensor]:
        columns: list[dict[str, Tensor]] = [getattr(part, name) for part in parts]
        return {key: torch.cat([of[key] for of in columns]) for key in columns[0]}

    return DenoiserStatistics(*(joined(each.name) for each in fields(DenoiserStatistics)))
