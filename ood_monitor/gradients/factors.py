r"""Per-sample gradients of one parameter, kept as factors and never multiplied out for a norm.

With R rows and C columns of a weight and T positions of a sample, a linear map's gradient is
:math:`\sum_t r_t c_t^\top`. Two exact forms give its squared norm by row:

- *direct*, :math:`\| (r^\top c)_{i \cdot} \|^2`, in :math:`T R C` operations;
- *Gram*, :math:`\sum_{st} r_{si} K_{st} r_{ti}` with :math:`K_{st} = c_s \cdot c_t`, in
  :math:`T^2 (R + C)`, cheaper when T is small (Goodfellow 2015, https://arxiv.org/abs/1510.01799;
  Rochette et al. 2019, https://arxiv.org/abs/1912.06015).

A convolution is such a map for each offset of its kernel, with the columns' image shifted by it. In
a flattened, padded image a shift is an offset into memory: no patch is ever copied, and the Gram
matrix of all patches is the sum of shifted blocks of the raw one, dimension by dimension.

Throughout n is the number of gradients asked for: the batch size, or the number of groups of
consecutive samples, whose positions then simply belong together. A *row* is an index of a
parameter's first dimension: an output channel, an output unit, an element of a bias. A *column* is
one of its second: an input channel, an input unit. Columns are the rows of the transposed map.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EmbeddingWeight",
    "Factor",
    "Granularity",
    "Materialised",
    "OfEachSample",
    "Outer",
    "Shifted",
    "count_of",
    "full_precision",
    "norms_by",
    "norms_of_gradient",
    "united",
]

#: ``"tensor"``: a feature per parameter tensor, as in the paper; ``"row"``: one per index of its
#: first dimension (output channel or unit, element of a bias); ``"column"``: one per index of its
#: second (input channel or unit), and one of a tensor without. Those of a tensor sum to its own.
Granularity: TypeAlias = Literal["tensor", "row", "column"]

#: Elements of an intermediate result held at once, by kind of device: on a CPU what stays in the
#: cache, on a GPU what keeps it busy.
_HELD_ELEMENTS = {"cpu": 2**18}
_HELD_ELEMENTS_ELSEWHERE = 2**26

#: Cost of adding an element of a shifted Gram matrix, in multiplications of a matrix product.
_SHIFT_COST = 16

#: Fewer columns than these are put side by side for all offsets of a kernel.
_FEW_COLUMNS = 16


class Factor(Protocol):
    """The per-sample gradient of one parameter through one use."""

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of samples start to stop, shape (stop - start, *parameter.shape)."""

    def row_norms(self) -> Tensor:
        """Squared norms by row, shape (n, rows)."""

    def column_norms(self) -> Tensor:
        """Squared norms by column, shape (n, columns)."""


def norms_by(granularity: Granularity, factor: Factor) -> Tensor:
    """Squared norms of a factor's gradients: (n,) of tensors, else (n, rows) or (n, columns)."""
    if granularity == "column":
        return factor.column_norms()
    return factor.row_norms().sum(1) if granularity == "tensor" else factor.row_norms()


def count_of(granularity: Granularity, shape: torch.Size) -> tuple[int, ...]:
    """The shape of one gradient's norms: () of a tensor, else (rows,) or (columns,)."""
    if granularity == "tensor":
        return ()
    dimension = 0 if granularity == "row" else 1
    return (shape[dimension] if len(shape) > dimension else 1,)


def full_precision(tensor: Tensor) -> Tensor:
    """At least single: squares of half precision overflow, and their sums round."""
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def norms_of_gradient(granularity: Granularity, gradient: Tensor) -> Tensor:
    """Squared norms of one gradient; one row or column for a scalar.

    A sparse gradient, as of ``nn.Embedding(sparse=True)``, is that of its dense form; of a complex
    one the absolute values are squared.
    """
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    gradient = gradient.abs() if gradient.is_complex() else gradient
    return norms_by(granularity, Materialised(gradient[None]))[0]


@dataclass(frozen=True)
class Materialised:
    """Gradients that are small enough to be held: of biases, scales, broadcast parameters."""

    values: Tensor  # (n, *parameter.shape)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def row_norms(self) -> Tensor:
        rows = self.values.shape[1] if self.values.ndim > 1 else 1
        each = self.values.reshape(len(self.values), rows, math.prod(self.values.shape[2:]))
        return each.square().sum(2)

    def column_norms(self) -> Tensor:
        if self.values.ndim < 3:
            return self.row_norms().sum(1, keepdim=True)
        others = [d for d in range(1, self.values.ndim) if d != 2]
        return self.values.square().sum(others)


@dataclass(frozen=True)
class OfEachSample:
    """Gradients of a tensor with rows for each sample, which a sample's gradient alone meets.

    So is one that a batch expands: a time embedding, a class token.
    """

    values: Tensor  # (B, ...)
    n: int

    def gradients(self, start: int, stop: int) -> Tensor:
        size = len(self.values) // self.n
        found = self.values.new_zeros(stop - start, *self.values.shape)
        for i in range(start, stop):
            own = slice(i * size, (i + 1) * size)
            found[i - start, own] = self.values[own]
        return found

    def row_norms(self) -> Tensor:
        return Materialised(self.gradients(0, self.n)).row_norms()

    def column_norms(self) -> Tensor:
        return Materialised(self.gradients(0, self.n)).column_norms()


@dataclass(frozen=True)
class Outer:
    """The sum over T positions of row times column: of a matrix product's weight."""

    rows: Tensor  # (n, T, R)
    columns: Tensor  # (n, T, C)
    shape: torch.Size

    def gradients(self, start: int, stop: int) -> Tensor:
        return self._products(slice(start, stop)).reshape(stop - start, *self.shape)

    def row_norms(self) -> Tensor:
        (n, t, r), c = self.rows.shape, self.columns.shape[2]
        if gram_is_cheaper(t, t, r, c):
            return _in_slices(self._by_gram, n, t * max(t, r), self.rows)
        return _in_slices(lambda s: self._products(s).square().sum(2), n, r * c, self.rows)

    def column_norms(self) -> Tensor:
        return Outer(self.columns, self.rows, self.shape[::-1]).row_norms()

    def _products(self, samples: slice) -> Tensor:
        return self.rows[samples].transpose(1, 2) @ self.columns[samples]

    def _by_gram(self, samples: slice) -> Tensor:
        rows, columns = self.rows[samples], self.columns[samples]
        return ((columns @ columns.transpose(1, 2) @ rows) * rows).sum(1)


@dataclass(frozen=True)
class Shifted:
    """The correlation of two images at the offsets of a kernel: of a convolution's weight.

    Element (r, c, k) of the gradient is the sum over samples and positions o of
    ``rows[r, o] * columns[c, stride * o + dilation * k - padding]``, with c in the group of r.
    """

    rows: Tensor  # (n, samples, groups, R, *positions)
    columns: Tensor  # (n, samples, groups, C, *positions)
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # of the columns, with zeros; at the end it follows from the rows
    dilation: tuple[int, ...]

    def gradients(self, start: int, stop: int) -> Tensor:
        samples = slice(start, stop)
        each = torch.stack(list(self._products(self._shifts(samples), samples)), -1)
        return each.reshape(stop - start, -1, self.columns.shape[3], *self.kernel)

    def row_norms(self) -> Tensor:
        n, samples, groups, r = self.rows.shape[:4]
        c, t, p = self.columns.shape[3], self._flat_rows.shape[4], math.prod(self._sizes)
        if gram_is_cheaper(samples * t, samples * p, r, c, self.kernel, self.stride):
            by_group = _in_slices(self._by_gram, n, groups * (samples * p) ** 2, self.rows)
        else:
            by_group = _in_slices(self._direct, n, groups * r * c, self.rows)
        return by_group.flatten(1)

    def column_norms(self) -> Tensor:
        n, _, groups, r = self.rows.shape[:4]
        held = groups * r * self.columns.shape[3]
        return _in_slices(self._direct_by_column, n, held, self.rows)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Size of an image of which each shift is a part."""
        settings = zip(self.rows.shape[4:], self.kernel, self.stride, self.dilation, strict=True)
        return tuple(out + d * (k - 1) // s for out, k, s, d in settings)

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        """Distance in memory of neighbours along each dimension of such an image."""
        return tuple(math.prod(self._sizes[i + 1 :]) for i in range(len(self._sizes)))

    @cached_property
    def _flat_rows(self) -> Tensor:
        """The rows at the places of an image with these sizes, (n, samples, groups, R, T)."""
        positions = self.rows.shape[4:]
        short = [size - out for size, out in zip(self._sizes[1:], positions[1:], strict=True)]
        flat = F.pad(self.rows, [side for s in reversed(short) for side in (0, s)]).flatten(4)
        last = sum((out - 1) * step for out, step in zip(positions, self._steps, strict=True))
        return flat[..., : last + 1]

    @cached_property
    def _phases(self) -> dict[tuple[int, ...], Tensor]:
        """The columns' pixels that a strided kernel's offset can meet, by the offset's remainder.

        (n, samples, groups, C, P) each; for stride 1 all are in one.
        """
        sides: list[int] = []
        for i, (size, s, p) in enumerate(zip(self._sizes, self.stride, self.padding, strict=True)):
            sides[:0] = [p, size * s - p - self.columns.shape[4 + i]]
        image = F.pad(self.columns, sides)
        met = [
            {d * i % s for i in range(k)}
            for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        ]
        images = {}
        for phase in product(*met):
            strided = image
            for i, (start, s) in enumerate(zip(phase, self.stride, strict=True)):
                strided = strided[(slice(None),) * (4 + i) + (slice(start, None, s),)]
            images[phase] = strided.flatten(4)
        return images

    def _shifts(self, samples: slice) -> Iterator[Tensor]:
        """The columns at each offset of the kernel, (samples, b, groups, C, T), not copied."""
        length = self._flat_rows.shape[4]
        for offset in product(*map(range, self.kernel)):
            at = [d * i for d, i in zip(self.dilation, offset, strict=True)]
            phase = tuple(i % s for i, s in zip(at, self.stride, strict=True))
            whole = [i // s for i, s in zip(at, self.stride, strict=True)]
            start = sum(i * step for i, step in zip(whole, self._steps, strict=True))
            yield self._phases[phase][samples, ..., start : start + length]

    def _products(self, columns: Iterable[Tensor], samples: slice) -> Iterator[Tensor]:
        """Rows times columns, summed over a group's samples, (samples, groups, R, C)."""
        rows = self._flat_rows[samples]
        count, b, groups = rows.shape[:3]
        for shifted in columns:
            each = rows.flatten(0, 2) @ shifted.flatten(0, 2).transpose(1, 2)
            product = each.reshape(count, b, groups, *each.shape[1:])
            yield product[:, 0] if b == 1 else product.sum(1)

    def _direct(self, samples: slice) -> Tensor:
        """Squared norms by row, (samples, groups, R)."""
        columns: Iterable[Tensor] = self._shifts(samples)
        if self.columns.shape[3] < _FEW_COLUMNS:  # one wide product beats many thin ones
            columns = [torch.cat(list(columns), 3)]
        norms = (product.square().sum(3) for product in self._products(columns, samples))
        return reduce(Tensor.add_, norms)

    def _direct_by_column(self, samples: slice) -> Tensor:
        """Squared norms by column of a weight, whose groups share them: (samples, C)."""
        products = self._products(self._shifts(samples), samples)
        return reduce(Tensor.add_, (product.square().sum((1, 2)) for product in products))

    def _by_gram(self, samples: slice) -> Tensor:
        rows = self._flat_rows[samples]
        gram = reduce(torch.add, (self._gram(phase, samples) for phase in self._phases))
        weighted = torch.einsum("nbgrs,ngbsBt->nBgrt", rows, gram)
        return (weighted * rows).sum((1, 4))

    def _gram(self, phase: tuple[int, ...], samples: slice) -> Tensor:
        """Inner products of the patches' pixels of one phase, (samples, groups, b, T, b, T)."""
        columns = self._phases[phase][samples]
        gram = torch.einsum("nbgcs,nBgct->ngbsBt", columns, columns)
        for dimension, remainder in enumerate(phase):
            gram = self._summed_shifts(gram, dimension, remainder)
        return gram

    def _summed_shifts(self, gram: Tensor, dimension: int, remainder: int) -> Tensor:
        """Sum of a Gram matrix's blocks along its diagonal: one dimension of the kernel."""
        k, s, d = self.kernel[dimension], self.stride[dimension], self.dilation[dimension]
        step = self._steps[dimension]
        length = gram.shape[3] - d * (k - 1) // s * step
        starts = [d * i // s * step for i in range(k) if d * i % s == remainder]
        blocks = [gram[..., i : i + length, :, i : i + length] for i in starts]
        return reduce(torch.add, blocks)


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
        same = self.index[:, :, None] == self.index[:, None, :]
        by_position = ((self.g @ self.g.transpose(1, 2)) * same).sum(2)
        return by_position.new_zeros(len(self.g), self.shape[0]).scatter_add(
            1, self.index, by_position
        )

    def column_norms(self) -> Tensor:
        # Gradients of one row at all its positions add up before they are squared.
        same = (self.index[:, :, None] == self.index[:, None, :]).to(self.g.dtype)
        return ((same @ self.g) * self.g).sum(1)


def united(factors: Sequence[Factor]) -> Factor | None:
    """The sum of several factors as one, where it is one of matrix products or of held gradients.

    Where one is not, None: their gradients are then added up.
    """
    held = [factor for factor in factors if isinstance(factor, Materialised)]
    if len(held) == len(factors):
        return Materialised(reduce(torch.add, (factor.values for factor in held)))
    products = [factor for factor in factors if isinstance(factor, Outer)]
    if len(products) < len(factors):
        return None
    rows = torch.cat([factor.rows for factor in products], 1)
    columns = torch.cat([factor.columns for factor in products], 1)
    return Outer(rows, columns, products[0].shape)


def gram_is_cheaper(
    t: int, p: int, r: int, c: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()
) -> bool:
    """Whether the Gram form of a weight with r rows and c columns beats the direct one.

    Args:
        t: Positions of a gradient, over the samples of a group.
        p: The same of a padded image, or of each phase of it.
        r: Rows, within a group of channels.
        c: Columns, likewise.
        kernel: Of a convolution.
        stride: Likewise.
    """
    phases = math.prod(map(min, kernel, stride))
    shifts = sum(min(k, 1 + k // s) - 1 for k, s in zip(kernel, stride, strict=True))
    gram = phases * p * p * (c + _SHIFT_COST * shifts) + t * t * r
    return gram < t * r * c * math.prod(kernel)


def _in_slices(norms: Callable[[slice], Tensor], n: int, elements: int, like: Tensor) -> Tensor:
    """Norms of n samples, so many at a time that what each needs in between stays bounded."""
    held = _HELD_ELEMENTS.get(like.device.type, _HELD_ELEMENTS_ELSEWHERE)
    step = max(1, held // max(1, elements))
    return torch.cat([norms(slice(i, i + step)) for i in range(0, n, step)])
