r"""Per-sample parameter gradients of single operations, by closed form.

For an operation y = f(x, w) inside a network and the gradient G = d log p / d y that the backward
pass brings, the gradient of sample i with respect to w needs only x_i and G_i. A rule says so as
:mod:`factors <ood_monitor.gradients.factors>`, which give norms by the cheapest exact form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_monitor.gradients.attention import multi_head_attention
from ood_monitor.gradients.call import functions
from ood_monitor.gradients.factors import (
    EmbeddingWeight,
    Factor,
    Materialised,
    Outer,
    Shifted,
)

__all__ = [
    "ADDING",
    "IN_PLACE",
    "JOINING",
    "MULTIPLYING",
    "POINTWISE",
    "REWRITES",
    "RULES",
    "SPREADING",
    "SUMS",
    "Rule",
]


@dataclass(frozen=True)
class Rule:
    """An operation's arguments, in the order of its signature, and its parameters' factors.

    ``factors(n, g, arguments)`` gives factors by argument name, or raises NotImplementedError for
    a variant that it does not know; the engine then loops over the samples.

    ``leading(arguments)`` is the number of the input's first dimensions along which the operation
    does the same to each element on its own: the batch alone for an image, all but the last for a
    linear map.
    """

    arguments: tuple[str, ...]
    factors: Callable[[int, Tensor, Mapping[str, Any]], dict[str, Factor]]
    leading: Callable[[Mapping[str, Any]], int] = lambda arguments: 1


def _summed(n: int, values: Tensor, keep: int) -> Materialised:
    """Sum (B, ..., *kept) over a group's samples and all but the last ``keep`` dimensions."""
    return Materialised(values.reshape(n, -1, *values.shape[values.ndim - keep :]).sum(1))


def _linear(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    x, weight = a["input"], a["weight"]
    if weight.ndim != 2:
        raise NotImplementedError("a linear map to a single number")
    outer = Outer(g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1]), weight.shape)
    return {"weight": outer, "bias": _summed(n, g, 1)}


def _convolution(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    return _correlation(n, g, a["input"], a) | {"bias": _by_channel(n, g)}


def _transposed_convolution(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    # Input and output change places, in the operation and so in its weight's gradient.
    return _correlation(n, a["input"], g, a) | {"bias": _by_channel(n, g)}


def _correlation(n: int, small: Tensor, large: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    """The factor of a kernel that takes an image ``large`` to ``small``, or back."""
    kernel, groups = tuple(a["weight"].shape[2:]), a.get("groups", 1)
    if large.ndim != a["weight"].ndim:
        raise NotImplementedError("a convolution without a batch dimension")
    stride, dilation = (_tuple(a.get(k, 1), len(kernel)) for k in ("stride", "dilation"))
    padding = a.get("padding", 0)
    if padding == "same":  # of an odd sum, the end gets more
        padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = _tuple(0 if padding == "valid" else padding, len(kernel))
    rows, columns = (
        x.reshape(n, -1, groups, x.shape[1] // groups, *x.shape[2:]) for x in (small, large)
    )
    return {"weight": Shifted(rows, columns, kernel, stride, padding, dilation)}


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))


def _by_channel(n: int, values: Tensor) -> Materialised:
    """Sum (B, channels, ...) over a group's samples and all positions."""
    return _summed(n, values.reshape(*values.shape[:2], -1).sum(2), 1)


def _group_norm(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    x_hat = F.group_norm(a["input"], a["num_groups"], eps=a.get("eps", 1e-5))
    return {"weight": _by_channel(n, x_hat * g), "bias": _by_channel(n, g)}


def _layer_norm(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    shape = a["normalized_shape"]
    x_hat = F.layer_norm(a["input"], shape, eps=a.get("eps", 1e-5))
    return {"weight": _summed(n, x_hat * g, len(shape)), "bias": _summed(n, g, len(shape))}


def _rms_norm(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    shape = a["normalized_shape"]
    x_hat = F.rms_norm(a["input"], shape, eps=a.get("eps"))
    return {"weight": _summed(n, x_hat * g, len(shape))}


def _batch_norm(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    if a.get("training", False):
        raise NotImplementedError("batch statistics mix samples")
    x_hat = F.batch_norm(a["input"], a["running_mean"], a["running_var"], eps=a.get("eps", 1e-5))
    return {"weight": _by_channel(n, x_hat * g), "bias": _by_channel(n, g)}


def _embedding(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    if a.get("max_norm") is not None or a.get("scale_grad_by_freq"):
        raise NotImplementedError("an embedding that renormalises or rescales")
    index, padding = a["input"].reshape(n, -1), a.get("padding_idx")
    g = g.reshape(*index.shape, g.shape[-1])
    if padding is not None:
        g = g * (index != padding % len(a["weight"])).unsqueeze(-1)
    return {"weight": EmbeddingWeight(index, g, a["weight"].shape)}


def _all_but_last(a: Mapping[str, Any]) -> int:
    return int(a["input"].ndim) - 1


def _before_normalised(a: Mapping[str, Any]) -> int:
    return int(a["input"].ndim) - len(a["normalized_shape"])


def _all(a: Mapping[str, Any]) -> int:
    return int(a["input"].ndim)


_CONVOLUTION = Rule(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _convolution
)
_TRANSPOSED = Rule(
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    _transposed_convolution,
)

#: The operations known, by the function that PyTorch is asked for.
RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(("input", "weight", "bias"), _linear, _all_but_last),
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
    torch.conv_transpose1d: _TRANSPOSED,
    torch.conv_transpose2d: _TRANSPOSED,
    torch.conv_transpose3d: _TRANSPOSED,
    F.embedding: Rule(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        _embedding,
        _all,
    ),
    F.group_norm: Rule(("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    F.layer_norm: Rule(
        ("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm, _before_normalised
    ),
    F.rms_norm: Rule(("input", "normalized_shape", "weight", "eps"), _rms_norm, _before_normalised),
    F.batch_norm: Rule(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
}

#: Operations that are made of others, by a function that makes them of those above; it may decline
#: with NotImplemented.
REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    # An iterator's tensors would not be seen.
    Tensor.__iter__: lambda x: iter(x.unbind(0)),
}

#: Operations (tensors, dimension) that put tensors side by side.
JOINING: frozenset[Callable[..., Any]] = frozenset(functions("cat concat concatenate"))

#: Operations that write their result into their first argument, and those that give it.
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(Tensor, form.format(name)): getattr(torch, name)
    for name in ("add", "sub", "mul", "div")
    for form in ("{}_", "__i{}__")
    if hasattr(Tensor, form.format(name))
} | {Tensor.__itruediv__: torch.div}

#: Views and copies that put a tensor in rows that are all the same.
SPREADING: frozenset[Callable[..., Any]] = frozenset(
    functions("broadcast_to expand expand_as repeat repeat_interleave tile")
)

#: Sums of two tensors, and their products: an operand's gradient is that of the result, or that
#: times the other.
SUMS: frozenset[Callable[..., Any]] = frozenset(functions("add __add__ __radd__"))
MULTIPLYING: frozenset[Callable[..., Any]] = frozenset(functions("mul __mul__ __rmul__"))

#: Those of which no operand's gradient needs another's value.
ADDING: frozenset[Callable[..., Any]] = SUMS | set(functions("sub __sub__ __rsub__"))

#: Broadcasting operations of tensors: scales, shifts, positional embeddings, layer scales.
POINTWISE: frozenset[Callable[..., Any]] = (
    ADDING
    | MULTIPLYING
    | set(
        functions(
            "addcdiv addcmul atan2 div lerp logaddexp maximum minimum pow true_divide where "
            "__pow__ __rtruediv__ __truediv__"
        )
    )
)
