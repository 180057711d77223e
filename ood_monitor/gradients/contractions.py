"""Where the samples lie after operations along other dimensions: sums, products, layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ood_monitor.gradients.call import Call, Found, listed
from ood_monitor.gradients.moves import pointwise
from ood_monitor.gradients.products import spelled
from ood_monitor.gradients.tracking import tensors_of

__all__ = [
    "along",
    "attention",
    "batch_first",
    "convolved",
    "extremes",
    "leading",
    "loss",
    "matrices",
    "normalised",
    "product",
    "recurrent",
    "searched",
    "time_first_attention",
]


def along(position: int, default: Any = None) -> Callable[[Call], Found]:
    """Of an operation along dimensions that are given there, which it may take away."""

    def found(call: Call) -> Found:
        d, x = call.common(), call.args[0]
        given = call.argument(position, "dim", "dims", "axis", default=default)
        if d is None or given is None or given == () or not isinstance(x, Tensor):
            return None
        dims = {i % x.ndim for i in ([given] if isinstance(given, int) else given)}
        if d in dims or call.dimension_of(x) is None or call.result.ndim > x.ndim:
            return None
        return d if call.result.ndim == x.ndim else d - sum(i < d for i in dims)

    return found


def extremes(call: Call) -> Found:
    """`max` and `min`, of two tensors or along a dimension."""
    both = isinstance(call.argument(1, "other"), Tensor)
    return pointwise(call) if both else along(1)(call)


def loss(call: Call) -> Found:
    """Of elements, not of their mean."""
    return pointwise(call) if call.kwargs.get("reduction") == "none" else None


def product(call: Call) -> Found:
    """Of tensors that are multiplied and summed: by the name that the samples' dimension has."""
    found = spelled(call.func, call.args, call.kwargs)
    named = {
        names[d]
        for x, names in zip(found.operands, found.names, strict=True)
        if (d := call.dimension_of(x)) is not None
    }
    places = {found.result.index(name) for name in named}
    if found.added is not None and (d := call.dimension_of(found.added)) is not None:
        place = call.result.ndim - found.added.ndim + d
        places.add(place if found.added.shape[d] == call.result.shape[place] else -1)
    return places.pop() if len(places) == 1 else None


def attention(call: Call) -> Found:
    """Of queries, keys, values and a mask, of which only the last two dimensions meet."""
    meets = any(tensor.ndim - d <= 2 for tensor, d in call.data)
    return None if meets else pointwise(call)


def time_first_attention(call: Call) -> Found:
    """The output (L, B, E) and weights (B, L, S) of `multi_head_attention_forward`."""
    queries, keys, values = call.args[:3]
    own = [call.dimension_of(x) for x in (queries, keys, values)]
    if own[0] != 1 or set(own) - {1, None} or queries.ndim != 3:
        return None
    masks = [call.kwargs.get(name) for name in ("key_padding_mask", "attn_mask")]
    if any(all(t is not given for given in (queries, keys, values, *masks)) for t, _ in call.data):
        return None
    return [1, 0] if call.kwargs.get("need_weights", True) else [1]


def recurrent(call: Call) -> Found:
    """Outputs, and last states (layers, B, H). Packed sequences come in other arguments."""
    x, state, parameters = call.args[:3]
    packed = isinstance(state, Tensor) and state.ndim < 3  # the sizes of its batches
    if packed or not isinstance(parameters, list | tuple):
        return None
    d = 0 if call.args[-1] else 1
    states = {id(tensor) for tensor in listed(state)}
    others = [(t, k) for t, k in call.data if t is not x]
    if call.dimension_of(x) != d or any(k != 1 or id(t) not in states for t, k in others):
        return None
    return [d, *[1] * len(listed(state))]


def leading(last: int) -> Callable[[Call], Found]:
    """Of an operation on so many last dimensions of its first argument."""
    return lambda call: _before(call, last)


def normalised(call: Call) -> Found:
    """Of a normalisation over the last dimensions, of a given shape."""
    return _before(call, len(call.argument(1, "normalized_shape")))


def _before(call: Call, last: int) -> int | None:
    x = call.args[0]
    d = call.only(x)
    return None if d is None or d >= x.ndim - last else d


def matrices(call: Call) -> Found:
    """Of linear algebra on the last two dimensions."""
    d, x = call.common(), call.data[0][0]
    return None if d is None or d >= x.ndim - 2 or call.result.ndim > x.ndim else d


def searched(call: Call) -> Found:
    """Of values, sorted into sequences along the last dimension."""
    d, values = call.common(), call.argument(1, "input", "values")
    return None if d is None or d >= values.ndim - 1 else d


def batch_first(least: int, inputs: int = 1) -> Callable[[Call], Found]:
    """Of layers whose input is (B, ...), of so many dimensions at least; fewer are no batch.

    Data among the first arguments, ``inputs`` of them, have the samples first too. Others are
    weights: of a table that has as many rows as the batch, those are no samples.
    """

    def found(call: Call) -> Found:
        x = call.args[0]
        named = [call.kwargs.get(name) for name in ("target", "hx", "grid")]
        given = {id(tensor) for tensor in tensors_of([*call.args[:inputs], *named])}
        first = call.dimension_of(x) == 0 and all(d == 0 and id(t) in given for t, d in call.data)
        return 0 if first and x.ndim >= least and len(call.result) == len(x) else None

    return found


def convolved(call: Call) -> Found:
    """Of a batch; an input of one dimension less has none."""
    x, weight = call.args[0], call.argument(1, "weight")
    return 0 if call.only(x) == 0 and x.ndim == weight.ndim else None
