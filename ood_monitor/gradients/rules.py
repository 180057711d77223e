r"""Per-sample parameter gradients of single operations, by closed form.

For an operation y = f(x, w) inside a network and the gradient G = d log p / d y that the backward
pass brings, the gradient of sample i with respect to w needs only x_i and G_i. A rule says so as
*factors*: objects that give the per-sample gradients when asked, and the squared norms of their
rows by the cheapest exact form. For a linear map with T positions a sample the gradient is
:math:`G_i^T X_i`, and its squared norm also :math:`\sum (X_i X_i^T) \odot (G_i G_i^T)`, the Gram
form, cheaper when T is small (Goodfellow 2015, https://arxiv.org/abs/1510.01799; Rochette et al.
2019, https://arxiv.org/abs/1912.06015).

Throughout n is the number of gradients asked for: the batch size, or the number of groups of
consecutive samples, whose positions then simply belong together. A *row* is an index of a
parameter's first dimension: an output channel, an output unit, an element of a bias.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["POINTWISE", "RULES", "Factor", "Materialised", "Rule", "pointwise", "rows_of"]

#: At most this many output positions for the Gram form of a convolution; above it the weight-only
#: backward, sample by sample, measured faster on a CPU although it does more arithmetic.
_GRAM_POSITIONS = 64


class Factor(Protocol):
    """The per-sample gradient of one parameter through one use, not yet multiplied out."""

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of samples start to stop, shape (stop - start, *parameter.shape)."""

    def row_norms(self) -> Tensor:
        """Squared norms by row, shape (n, rows)."""

    def norms(self) -> Tensor:
        """Squared norms of the whole, shape (n,)."""


def rows_of(gradient: Tensor) -> Tensor:
    """Squared norm of each row of one gradient, shape (rows,); one row for a scalar."""
    return gradient.reshape(gradient.shape[0] if gradient.ndim else 1, -1).square().sum(1)


@dataclass(frozen=True)
class Materialised:
    """Gradients that are small enough to be held: of biases, scales, broadcast parameters."""

    values: Tensor  # (n, *parameter.shape)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def row_norms(self) -> Tensor:
        rows = self.values.shape[1] if self.values.ndim > 1 else 1
        return self.values.reshape(len(self.values), rows, -1).square().sum(2)

    def norms(self) -> Tensor:
        return self.values.flatten(1).square().sum(1) if self.values.ndim > 1 else self.values**2


@dataclass(frozen=True)
class Outer:
    """G^T X over T positions: of a linear map, and of a convolution seen as one."""

    x: Tensor  # (n, T, inputs)
    g: Tensor  # (n, T, outputs)
    shape: torch.Size

    def gradients(self, start: int, stop: int) -> Tensor:
        product = self.g[start:stop].transpose(1, 2) @ self.x[start:stop]
        return product.reshape(stop - start, *self.shape)

    def row_norms(self) -> Tensor:
        if self._gram_is_cheaper():
            # |row o|^2 = sum_st G_so K_st G_to, with K the Gram matrix of the inputs.
            return ((_gram(self.x) @ self.g) * self.g).sum(1)
        return (self.g.transpose(1, 2) @ self.x).square().sum(2)

    def norms(self) -> Tensor:
        if self._gram_is_cheaper():
            return ((self.x @ self.x.transpose(1, 2)) * (self.g @ self.g.transpose(1, 2))).sum(
                (1, 2)
            )
        return (self.g.transpose(1, 2) @ self.x).square().sum((1, 2))

    def _gram_is_cheaper(self) -> bool:
        (_, t, inputs), outputs = self.x.shape, self.g.shape[2]
        return t * (inputs + outputs) < inputs * outputs


@dataclass(frozen=True)
class ConvolutionWeight:
    """A convolution's weight by the weight-only backward, sample by sample."""

    x: Tensor  # (n, B/n, C_in, ...)
    g: Tensor  # (n, B/n, C_out, ...)
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def gradients(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._gradient(i) for i in range(start, stop)])

    def row_norms(self) -> Tensor:
        return torch.stack([rows_of(self._gradient(i)) for i in range(len(self.x))])

    def norms(self) -> Tensor:
        return torch.stack([self._gradient(i).square().sum() for i in range(len(self.x))])

    def _gradient(self, i: int) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            self.g[i],
            self.x[i],
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]
        return gradient


@dataclass(frozen=True)
class EmbeddingWeight:
    """A table's rows: each gets the sum of the gradients at the positions that look it up."""

    index: Tensor  # (n, T)
    g: Tensor  # (n, T, width)
    shape: torch.Size

    def gradients(self, start: int, stop: int) -> Tensor:
        table = self.g.new_zeros(stop - start, *self.shape)
        index = self.index[start:stop, :, None].expand_as(self.g[start:stop])
        return table.scatter_add(1, index, self.g[start:stop])

    def row_norms(self) -> Tensor:
        return torch.cat([self.gradients(i, i + 1).square().sum(2) for i in range(len(self.g))])

    def norms(self) -> Tensor:
        same = self.index[:, :, None] == self.index[:, None, :]
        return (_gram(self.g) * same).sum((1, 2))


@dataclass(frozen=True)
class Rule:
    """An operation's arguments, in the order of its signature, and its parameters' factors.

    ``factors(n, g, arguments)`` gives factors by argument name, or raises NotImplementedError for
    a variant that it does not know; the engine then loops over the samples.
    """

    arguments: tuple[str, ...]
    factors: Callable[[int, Tensor, Mapping[str, Any]], dict[str, Factor]]


def _summed(n: int, values: Tensor, keep: int) -> Materialised:
    """Sum (B, ..., *kept) over a group's samples and all but the last ``keep`` dimensions."""
    return Materialised(values.reshape(n, -1, *values.shape[values.ndim - keep :]).sum(1))


def _linear(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    x, weight = a["input"], a["weight"]
    outer = Outer(x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1]), weight.shape)
    return {"weight": outer, "bias": _summed(n, g, 1)}


def _convolution(n: int, g: Tensor, a: Mapping[str, Any]) -> dict[str, Factor]:
    x, weight = a["input"], a["weight"]
    spatial = weight.ndim - 2
    if x.ndim != weight.ndim:
        raise NotImplementedError("a convolution without a batch dimension")
    stride, dilation = _tuple(a.get("stride", 1), spatial), _tuple(a.get("dilation", 1), spatial)
    padding, groups = a.get("padding", 0), a.get("groups", 1)
    if isinstance(padding, str):
        x, padding = _explicit_padding(padding, x, weight, dilation)
    padding = _tuple(padding, spatial)
    settings = (stride, padding, dilation, groups)
    return {
        "weight": _convolution_weight(n, x, g, weight, settings),
        "bias": _by_channel(n, g),
    }


def _convolution_weight(
    n: int, x: Tensor, g: Tensor, weight: Tensor, settings: tuple[Any, ...]
) -> Factor:
    stride, padding, dilation, groups = settings
    positions = math.prod(g.shape[2:]) * (len(g) // n)
    outputs, inputs = weight.shape[0], weight[0].numel()
    pointwise = inputs == weight.shape[1] and set(stride) == {1} and set(padding) == {0}
    gram = positions <= _GRAM_POSITIONS and positions * (inputs + outputs) < inputs * outputs
    if groups == 1 and (pointwise or (gram and weight.ndim == 4)):
        patches = (
            x.flatten(2) if pointwise else F.unfold(x, weight.shape[2:], dilation, padding, stride)
        )
        return Outer(_positions_last(n, patches), _positions_last(n, g.flatten(2)), weight.shape)
    x, g = x.reshape(n, -1, *x.shape[1:]), g.reshape(n, -1, *g.shape[1:])
    return ConvolutionWeight(x, g, weight, stride, padding, dilation, groups)


def _gram(values: Tensor) -> Tensor:
    """Inner products between a sample's positions, (n, T, T)."""
    return values @ values.transpose(1, 2)


def _positions_last(n: int, values: Tensor) -> Tensor:
    """(B, channels, positions) to (n, group * positions, channels)."""
    return values.transpose(1, 2).reshape(n, -1, values.shape[1])


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))


def _explicit_padding(
    padding: str, x: Tensor, weight: Tensor, dilation: tuple[int, ...]
) -> tuple[Tensor, int]:
    """The input padded as ``padding`` names it, since "same" may be asymmetric."""
    if padding == "valid":
        return x, 0
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return F.pad(x, [side for t in reversed(totals) for side in (t // 2, t - t // 2)]), 0


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
    if a.get("max_norm") is not None or a.get("scale_grad_by_freq") or a.get("sparse"):
        raise NotImplementedError("an embedding that renormalises or rescales")
    index, padding = a["input"].reshape(n, -1), a.get("padding_idx")
    g = g.reshape(*index.shape, -1)
    if padding is not None:
        g = g * (index != padding % len(a["weight"])).unsqueeze(-1)
    return {"weight": EmbeddingWeight(index, g, a["weight"].shape)}


_CONVOLUTION = Rule(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _convolution
)

#: The operations known, by the function that PyTorch is asked for.
RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(("input", "weight", "bias"), _linear),
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
    F.embedding: Rule(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        _embedding,
    ),
    F.group_norm: Rule(("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    F.layer_norm: Rule(("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    F.rms_norm: Rule(("input", "normalized_shape", "weight", "eps"), _rms_norm),
    F.batch_norm: Rule(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
}

#: Broadcasting operations of two tensors: scales, shifts, positional embeddings, layer scales.
POINTWISE: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner, names in {
        torch: ("add", "mul", "sub", "div", "true_divide"),
        torch.Tensor: (
            *("add", "mul", "sub", "div", "__add__", "__mul__", "__sub__", "__truediv__"),
            *("__radd__", "__rmul__", "__rsub__", "__rtruediv__"),
        ),
    }.items()
    for name in names
)


def pointwise(
    function: Callable[..., Any], n: int, g: Tensor, args: tuple[Any, ...], position: int
) -> Factor:
    """The factor of the tensor argument at ``position`` of a broadcasting operation.

    Raises:
        NotImplementedError: The argument itself has a batch dimension, so that a row of it
            belongs to one sample; only the loop over samples tells which parameters that concerns.
    """
    argument: Tensor = args[position]
    if argument.ndim == g.ndim and argument.shape[0] > 1:
        raise NotImplementedError("a broadcast operand with a batch dimension")
    with torch.enable_grad():
        expanded = argument.detach().expand(g.shape).requires_grad_()
        output = function(*args[:position], expanded, *args[position + 1 :])
        (full,) = torch.autograd.grad(output, expanded, g)
    return Materialised(_reduced(n, full, argument.shape))


def _reduced(n: int, full: Tensor, shape: torch.Size) -> Tensor:
    """Sum (B, ...) over a group's samples and the dimensions along which ``shape`` broadcasts."""
    per_gradient = full.reshape(n, -1, *full.shape[1:]).sum(1)
    if len(shape) == full.ndim:
        shape = shape[1:]  # its leading dimension is 1 and stands for the batch
        return _reduced_to(per_gradient, shape).unsqueeze(1)
    return _reduced_to(per_gradient, shape)


def _reduced_to(values: Tensor, shape: torch.Size) -> Tensor:
    leading = values.ndim - 1 - len(shape)
    values = values.sum(tuple(range(1, 1 + leading))) if leading else values
    broadcast = [i + 1 for i, size in enumerate(shape) if size == 1 and values.shape[i + 1] != 1]
    return values.sum(broadcast, keepdim=True) if broadcast else values
