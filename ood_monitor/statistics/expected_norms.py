r"""Expected gradient norms: what a layer's input alone says of its gradient, by one forward pass.

Of weights W with input h(p) at position p and residual r(p) at the output,

.. math:: \mathbb E \| \nabla_W \log p(x) \|^2 = \sum_p \mathbb E |r(p)|^2 \, |h(p)|^2

where residuals are uncorrelated between positions. Where they are white too, that is
:math:`\sum_p |h(p)|^2` up to a factor that is the same for all samples. It is taken by groups of
input channels, as :mod:`~ood_monitor.statistics.hooks` defines them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, batch_size, checked_elements
from ood_monitor.adapters.elements import Elements
from ood_monitor.modules import Passes, gradless
from ood_monitor.statistics.hooks import Sums
from ood_monitor.statistics.layers import Discovery, Layer
from ood_monitor.statistics.rows import Layout, Single

__all__ = [
    "LayersOfAPass",
    "WithoutLayersError",
    "discovered",
    "known_layers",
    "known_so_far",
    "norms_of",
    "one_pass",
]

_log = logging.getLogger(__name__)

#: Layers of a pass by name; None for one that no pass has called yet.
LayersOfAPass: TypeAlias = Mapping[str, Layer | None]

#: By adapter: the layers that were found so far.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Adapters of which it was told which layers are left out.
_told: WeakIdKeyDictionary = WeakIdKeyDictionary()


class WithoutLayersError(ValueError):
    """A pass calls no layer, of which there were expected norms."""


def discovered(passes: Passes[Adapter], batch: Batch) -> dict[str, Layer]:
    """The layers that a pass over a batch calls, in module order.

    Raises:
        WithoutLayersError: It calls none.
    """
    view, positions, discovery = gradless(passes.holder, lambda: _looked_at(passes, batch))
    found = discovery.found
    if positions is not None:
        kept = {
            n: layer for n, layer in found.items() if _fits(layer, discovery.shapes[n], positions)
        }
        _tell_left_out(passes.holder, found.keys() - kept.keys())
        found = kept
    if not found:
        raise WithoutLayersError(_without_layers(view, discovery.called))
    order = {name: index for index, (name, _) in enumerate(view.module.named_modules())}
    found = {name: found[name] for name in sorted(found, key=order.__getitem__)}
    _known[passes.holder] = {**_found_of(passes.holder), **found}
    return found


def _looked_at(passes: Passes[Adapter], batch: Batch) -> tuple[Adapter, Tensor | None, Discovery]:
    view = passes.fresh()
    positions = view.positions(batch)
    discovery = Discovery(view.module)
    with discovery.looking():
        for _ in checked_elements(view, batch):
            pass
    return view, positions, discovery


def known_layers(
    passes: Passes[Adapter], batch: Batch, layers: Sequence[str] | Mapping[str, int] | None
) -> LayersOfAPass:
    """The layers of these names, or all if None, by what was found so far or is on this batch.

    Raises:
        ValueError: A name is no module's, or no layer's.
    """
    known = _found_of(passes.holder)
    if layers is None:
        return known or discovered(passes, batch)
    new = [name for name in layers if name not in known]
    parts = dict(passes.module.named_modules()) if new else {}
    strange = [name for name in new if name not in parts]
    if strange:
        raise ValueError(
            f"Expected `layers` to be names of modules of {type(passes.module).__name__}, got "
            f"{strange}: take those that `expected_layers` gives."
        )
    if new:
        known = {**known, **discovered(passes, batch)}
    return {name: known.get(name) for name in layers}


def one_pass(
    passes: Passes[Adapter],
    batch: Batch,
    layers: LayersOfAPass,
    of_term: Callable[[str, Tensor | Elements], None] = lambda term, value: None,
) -> Single:
    """Terms and sums of a batch by one forward pass.

    Args:
        passes: The model.
        batch: B samples.
        layers: Whose sums; none if empty.
        of_term: Is given each term as soon as there is one.

    Raises:
        ValueError: None of the layers was called.
    """
    view, sums, terms = gradless(passes.holder, lambda: _passed(passes, batch, layers, of_term))
    if sums.unknown:
        found = discovered(passes, batch)
        both = {name: found.get(name, layer) for name, layer in layers.items()}
        if any(both[name] != layer for name, layer in layers.items()):
            return one_pass(passes, batch, both, of_term)
    if layers and not sums.taken:
        raise WithoutLayersError(_without_layers(view, called=False))
    return Single(sums.taken, terms)


def _passed(
    passes: Passes[Adapter],
    batch: Batch,
    layers: LayersOfAPass,
    of_term: Callable[[str, Tensor | Elements], None],
) -> tuple[Adapter, Sums, dict[str, Tensor]]:
    view = passes.fresh()
    counted = view.positions(batch) if layers else None
    sums = Sums(view.module, layers, batch_size(batch), counted)
    terms: dict[str, Tensor] = {}
    with sums.hooked():
        for term, value in _taken(sums, checked_elements(view, batch)):
            with torch.no_grad():
                terms[term] = (value.total() if isinstance(value, Elements) else value).detach()
                of_term(term, value)
            del value  # before the next term's pass, if it has one
    return view, sums, terms


def norms_of(
    single: Single, layout: Layout, layers: LayersOfAPass, groups: Mapping[str, int], size: int
) -> dict[str, Tensor]:
    """Sums of each sample by layer, (B, G); zeros of a layer that was not called.

    Args:
        single: What a pass gave.
        layout: How its rows lie.
        layers: Whose sums.
        groups: G of layers that may be unknown.
        size: B.

    Raises:
        ValueError: G is not known of a layer that was not called.
    """
    like = next(iter(single.terms.values()))
    found = {}
    for name, layer in layers.items():
        taken = single.taken.get(name)
        if taken is not None:
            found[name] = layout.sums(name, taken, size).to(like.device)
            continue
        count = groups.get(name) if layer is None else layer.groups
        if count is None:
            raise ValueError(
                f"Expected a call of layer {name!r}, which tells its width, got none so far: pass "
                "as `layers` all that `expected_layers` gave, names with widths."
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        found[name] = like.new_zeros((size, count), dtype=dtype)
    return found


def known_so_far(adapter: Adapter) -> Mapping[str, Layer]:
    """The layers that passes of an adapter have called so far."""
    return _found_of(adapter)


def _found_of(adapter: Adapter) -> dict[str, Layer]:
    found: dict[str, Layer] = _known.get(adapter, {})  # type: ignore[no-untyped-call]
    return found


def _taken(
    sums: Sums, terms: Iterator[tuple[str, Tensor | Elements]]
) -> Iterator[tuple[str, Tensor | Elements]]:
    """The terms, with sums taken only while the adapter makes them."""
    while True:
        with sums.taking():
            item = next(terms, None)
        if item is None:
            return
        yield item
        del item


def _fits(layer: Layer, shapes: Sequence[torch.Size], positions: Tensor) -> bool:
    """Whether a layer's inputs have a row of channels for each position."""
    rows = torch.Size([positions.numel()])
    return layer.axis == -1 and all(shape[:-1] in (positions.shape, rows) for shape in shapes)


def _tell_left_out(adapter: Adapter, names: set[str]) -> None:
    if names and adapter not in _told:
        _told[adapter] = True
        _log.warning(
            "Expected norms leave out %s of %s: their inputs have no row for each position of a "
            "sequence, so that padding could not be left out. [OOD112]",
            sorted(names),
            type(adapter.module).__name__,
        )


def _without_layers(view: Adapter, called: bool) -> str:
    name = type(view.module).__name__
    got = "none of them a convolution or a linear map" if called else "no call of any"
    return (
        f"Expected {type(view).__name__} to call modules of {name} that are convolutions or linear "
        f"maps, whose inputs expected norms are taken of, got {got}. Call layers as modules, not "
        "their weights by functions, or use gradient norms."
    )
