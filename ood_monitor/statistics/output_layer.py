r"""A denoiser's last layer: its gradient by input channel, with no backward pass over the network.

Of the squared residual :math:`\tfrac12 \lVert r \rVert^2` let R(p) be the derivative by the layer's
output at position p, and h(p) its input. By input channel c, with d the offsets of its kernel and o
its outputs,

.. math::

    e_c &= \sum_p h_c(p)^2 & \text{expected} \\
    s_c &= \sum_p |R(p)|^2 \sum_d h_c(p + d)^2 & \text{realised, without interference} \\
    g_c &= \sum_{d, o} \Bigl( \sum_p R_o(p) \, h_c(p + d) \Bigr)^2 & \text{realised}

so that g is what automatic differentiation gives. R comes from what runs after the layer alone:
tokens that become an image, the channels of a learned variance.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_monitor.gradients.factors import Outer, Shifted, full_precision
from ood_monitor.modules import is_sharded, part_of
from ood_monitor.statistics.hooks import grouped
from ood_monitor.statistics.layers import Layer, first_tensor_of

__all__ = ["OutputLayer"]

#: Numbers of a layer's input that are squared at once.
_AT_ONCE = 1 << 18

#: Attributes of a convolution that tell which of its inputs an output sees.
_OF_CONVOLUTIONS = ("groups", "kernel_size", "stride", "padding", "dilation")

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class OutputLayer:
    """Sees the last layer of a view's pass, and takes its sums.

    Args:
        module: The scoring view.
        name: The layer's name.
        layer: What is known of it.

    Attributes:
        calls: How often it was called in this thread since the last :meth:`squares`.
    """

    def __init__(self, module: nn.Module, name: str, layer: Layer) -> None:
        self.calls = 0
        self._part, self._name, self._layer = part_of(module, name), name, layer
        self._thread = threading.get_ident()
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator["OutputLayer"]:
        """Put the hook on, and take it off at the end."""
        # Before FSDP puts the layer's shard back, where it is a part of its own.
        first = is_sharded(self._part)
        handle = self._part.register_forward_hook(self._see, prepend=first, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def squares(self, residual: Tensor, *, any_size: bool = False) -> dict[str, Tensor]:
        """The sums of the pass that gave a residual, by group of channels, (B, G) each.

        Args:
            residual: Prediction less target, shape (B, ...), as that pass made it.
            any_size: Whether means over positions are taken in place of sums: the gradient is then
                that of the mean over positions, and g by so much squared smaller.

        Raises:
            ValueError: The layer was not called once, or the residual does not come from it.
        """
        h, output = self._taken(residual)
        r = full_precision(self._derivative(residual, output))
        size, h = len(residual), full_precision(h)
        count = len(h) if self._layer.axis == 1 else h[..., 0].numel()
        if count % size:
            raise ValueError(self._refusal(f"inputs {tuple(h.shape)} of {size} samples"))
        if self._layer.axis == 1:
            weights, realised = _of_convolution(self._part, self._layer, size, h, r)
            h = h.flatten(2)
        else:
            rows = r.reshape(size, -1, r.shape[-1])
            h = h.reshape(size, -1, h.shape[-1])
            shape = torch.Size([r.shape[-1], h.shape[-1]])
            weights, realised = rows.square().sum(2), Outer(rows, h, shape).column_norms()
            h = h.transpose(1, 2)
        # A sample may have several rows, such as a video's frames.
        expected, apart = (
            _weighted(h, each).view(size, -1, h.shape[1]).sum(1) for each in (None, weights)
        )
        if any_size:
            positions = len(h) // size * h.shape[2]
            expected, apart = expected / positions, apart / positions
            realised = realised / positions**2
        found = {"expected": expected, "apart": apart, "norm": realised}
        return {name: grouped(sums) for name, sums in found.items()}

    def forget(self) -> None:
        """Drop what was seen of a pass that another layer ends."""
        self.calls, self._input, self._output = 0, None, None

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Keep a call's input, and start a graph of what comes after it."""
        if threading.get_ident() != self._thread:
            return None
        self.calls += 1
        h = first_tensor_of(args, kwargs)
        if h is None or not isinstance(output, Tensor):
            raise ValueError(self._refusal(f"one that gives {type(output).__name__}"))
        self._check_call(h, output)
        self._input = h.detach().clone()  # what follows may write into it
        # Until the pass's own `no_grad` ends: nothing before the layer is in the graph.
        torch.set_grad_enabled(True)
        self._output = output.detach().requires_grad_()
        return self._output.clone()

    def _check_call(self, h: Tensor, output: Tensor) -> None:
        """That the layer gives the linear map of its input and its weight that the sums assume."""
        expected = (_mapped if _has_weight(self._part, h) else _affine)(self._part, self._layer, h)
        if expected is None or expected.shape != output.shape:
            raise ValueError(self._refusal("one that is no plain convolution or linear map"))
        eps = torch.finfo(output.dtype).eps
        finite = output.detach()[output.isfinite()]
        largest = float(finite.abs().max()) if len(finite) else 0.0
        rtol = max(1e-3, 8 * eps)
        if not torch.allclose(expected, output, rtol=rtol, atol=rtol * largest, equal_nan=True):
            raise ValueError(self._refusal("one that gives more than its weight times its input"))

    def _taken(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        calls, h, output = self.calls, self._input, self._output
        self.forget()
        if calls != 1 or h is None or output is None:
            raise ValueError(self._refusal(f"{calls} calls"))
        if not residual.requires_grad:
            raise ValueError(self._refusal("a residual that was computed without gradients"))
        return h, output

    def _derivative(self, residual: Tensor, output: Tensor) -> Tensor:
        """Of half the squared residual by the layer's output."""
        [found] = torch.autograd.grad(residual, output, residual.detach(), allow_unused=True)
        if found is None or (residual.any() and not found.any()):  # of another head, say
            raise ValueError(self._refusal("a residual that does not come from it"))
        return found

    def _refusal(self, got: str) -> str:
        return (
            f"Expected {self._name!r}, the last layer of a pass, to be called once by it and to "
            f"give what the prediction is made of, got {got}: use method='gradient_norms'."
        )


def _has_weight(part: Any, h: Tensor) -> bool:
    """Whether the weight is at hand after a call: not quantised, cast or moved away until the next.

    What has none by that name counts as having it.
    """
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        return not callable(weight)
    return (weight.device, weight.dtype) == (h.device, h.dtype)


def _affine(part: Any, layer: Layer, h: Tensor) -> Tensor | None:
    """What the layer gives of an input if it is an affine map there; None if it is not."""
    # Its forward alone, which brings the weight back and calls no hook of ours.
    once, twice, none = (part.forward(factor * h).detach() for factor in (1, 2, 0))
    is_plain = layer.axis != 1 or all(hasattr(part, name) for name in _OF_CONVOLUTIONS)
    largest = float(once.abs().nan_to_num(0.0, 0.0).max())
    close = torch.allclose(
        twice - once, once - none, rtol=1e-3, atol=1e-3 * largest, equal_nan=True
    )
    return once if is_plain and close else None


def _mapped(part: Any, layer: Layer, h: Tensor) -> Tensor | None:
    """The layer's weight times an input, and its bias; None of what has not these by name."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return None
    if layer.axis != 1:
        matrix = weight if layer.weight_dimension == 1 else weight.T
        fits = weight.ndim == 2 and matrix.shape[1] == h.shape[-1]
        return F.linear(h, matrix, bias) if fits else None
    if not all(hasattr(part, name) for name in _OF_CONVOLUTIONS):
        return None
    padded, settings = _padded(part, h)
    if layer.weight_dimension == 0:
        output_padding = getattr(part, "output_padding", 0)
        given = (weight, bias, part.stride, part.padding, output_padding, part.groups)
        return _TRANSPOSED[h.ndim](h, *given, part.dilation)
    return _CONVOLUTIONS[h.ndim](padded, weight, bias, groups=part.groups, **settings)


def _of_convolution(
    part: Any, layer: Layer, size: int, h: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """What weighs each position of h, (B, P), and squared norms by input channel, (B, C)."""
    if part.groups != 1:
        raise ValueError(
            f"Expected the last layer's groups to be 1, got {part.groups}: use "
            "method='gradient_norms'."
        )
    padded, settings = _padded(part, h)
    small, large = (h, r) if layer.weight_dimension == 0 else (r, padded)
    rows, columns = (x.reshape(size, -1, 1, *x.shape[1:]) for x in (small, large))
    padding = _before(part, settings["padding"])
    factor = Shifted(rows, columns, part.kernel_size, part.stride, padding, part.dilation)
    realised = factor.row_norms() if layer.weight_dimension == 0 else factor.column_norms()
    return _weights(part, layer, h, r.square().sum(1, keepdim=True)), realised


def _weights(part: Any, layer: Layer, h: Tensor, met: Tensor) -> Tensor:
    """What the outputs that see a position have together, (B, P).

    It is the derivative of the same convolution with a kernel of ones by its image.
    """
    with torch.enable_grad():
        image = h.new_zeros(len(h), 1, *h.shape[2:], requires_grad=True)
        padded, settings = _padded(part, image)
        ones = h.new_ones(1, 1, *part.kernel_size)
        if layer.weight_dimension == 0:
            settings["output_padding"] = part.output_padding
        convolution = (_TRANSPOSED if layer.weight_dimension == 0 else _CONVOLUTIONS)[h.ndim]
        seen = convolution(padded, ones, **settings)
        [weights] = torch.autograd.grad(seen, image, met)
    return weights.flatten(1)


def _padded(part: Any, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The image as a convolution meets it, and the settings that are left."""
    settings = {"stride": part.stride, "padding": part.padding, "dilation": part.dilation}
    if getattr(part, "padding_mode", "zeros") == "zeros":
        return image, settings
    image = F.pad(image, part._reversed_padding_repeated_twice, mode=part.padding_mode)
    return image, settings | {"padding": (0,) * len(part.kernel_size)}


def _before(part: Any, padding: Any) -> tuple[int, ...]:
    """The padding before the first position, in numbers."""
    if padding == "same":
        pairs = zip(part.kernel_size, part.dilation, strict=True)
        return tuple(d * (k - 1) // 2 for k, d in pairs)
    return (0,) * len(part.kernel_size) if padding == "valid" else tuple(padding)


def _weighted(h: Tensor, weights: Tensor | None) -> Tensor:
    """Sums over positions of squares (B, C, P), each times its position's weight (B, P)."""
    size = max(1, _AT_ONCE // math.prod(h.shape[1:]))
    pieces = torch.split(h, size)
    if weights is None:
        return torch.cat([piece.square().sum(2) for piece in pieces])
    pairs = zip(pieces, torch.split(weights, size), strict=True)
    return torch.cat([torch.einsum("bcp,bp->bc", piece.square(), w) for piece, w in pairs])
