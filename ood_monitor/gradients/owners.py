r"""Whose row it is, found from two backward passes of one graph.

Where a model regroups rows (a spline's mask, experts, packed sequences, the edges of graphs), no
place in a tensor says whose a row is. The gradients do. Let :math:`a_{ri} = \partial L_i /
\partial y_r` be what sample i's term asks of row r. A backward pass from :math:`\sum_i L_i` brings
:math:`g_r = \sum_i a_{ri}`, and one from :math:`\sum_i w_i L_i` brings
:math:`g'_r = \sum_i w_i a_{ri}`. A row of one sample alone has :math:`g'_r = w_i g_r` in all its
elements, which names the sample; its gradient is then :math:`a_{ri} = g_r` itself. A row of two
samples has in general no such quotient, and then the rows are refused, all of that call.

Both passes go through the graph of one forward pass, so whatever was drawn in it is the same. The
weights are in [1, 2], apart by at least half of 1 / n, and irregular. A row of several samples
whose gradients are parallel, as of equal samples that a model computes once, has the mean of their
weights as its quotient, which single precision cannot always tell from another sample's weight. So
there, on the first use of a shape, and wherever rounding leaves a doubt, further passes have to
name the same owner by other weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ood_monitor.gradients.factors import Factor

__all__ = ["MOST_PASSES", "Among", "Owners", "Weighted", "weights_of"]

#: Relative difference up to which a row's two gradients have a weight as their quotient, with no
#: doubt and at all. Rounding of a deep model in single precision leaves 1e-4 in some rows.
_TIGHT = {torch.float64: 1e-11, torch.float32: 2e-5}
_LOOSE = {torch.float64: 1e-6, torch.float32: 1e-3}

#: Weighted passes that have to name an owner: where none leaves a doubt, and where one does. By
#: chance all of them would name one for a row of samples whose gradients are parallel in about
#: n / 5e10 of cases in double precision, n / 6e8 in single precision, and 1e-7 with a doubt.
_PASSES = {torch.float64: 1, torch.float32: 2}
MOST_PASSES = 3

#: A part of the distance between weights that the looser tolerance may be.
_PART_OF_DISTANCE = 0.02

#: Times 1 / n, the least distance of weights: rounding to a term's precision puts some together.
_LEAST_DISTANCE = 0.25

#: What rows without an owner may have of the gradient of the sample that has least, as rounding.
_NEGLIGIBLE = {torch.float64: 1e-12, torch.float32: 1e-6}

#: Samples with up to so many times more rows than others are padded together.
_LARGER = 4


def weights_of(n: int, number: int) -> Tensor:
    """The weights of n gradients in the pass of that number, shape (n,), float64, on the CPU.

    Their mean, which a row that all share equally has as its quotient, is far from each of them.
    """
    generator = torch.Generator("cpu").manual_seed(1_000_003 * number + n)
    while True:
        places = torch.randperm(n, generator=generator, device="cpu")
        offsets = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        weights = 1 + (places + 0.25 + 0.5 * offsets) / n
        if n == 1 or (weights - weights.mean()).abs().min() > 0.1 / n:
            return weights


@dataclass(frozen=True)
class Weighted:
    """The gradient of rows in a pass of weighted terms.

    Attributes:
        g: Shape (U, width).
        weights: Shape (n,), as the terms had them.
    """

    g: Tensor
    weights: Tensor

    def tells_apart(self) -> bool:
        """Whether no two weights are the same, or nearly so."""
        distances = self.weights.sort().values.diff()
        return not (distances < _LEAST_DISTANCE / len(self.weights)).any()


@dataclass(frozen=True)
class Owners:
    """The gradient, of n, that each of U rows belongs to.

    Attributes:
        of_row: Shape (U,), int64; of a row without any gradient some number.
        n: Number of gradients.
        certain: Whether a further pass would show nothing new, but for a coincidence.
    """

    of_row: Tensor
    n: int
    certain: bool = True

    @classmethod
    def found(cls, g: Tensor, passes: list[Weighted]) -> "Owners | None":
        """From the plain gradient, shape (U, width), and those of weighted passes.

        Returns:
            None where a row that matters has no owner, or another one in each pass.
        """
        if g.dtype not in _TIGHT or not all(each.tells_apart() for each in passes):
            return None
        n = len(passes[0].weights)
        own, error = _nearest(g, passes[0])
        for other in passes[1:]:
            again, further = _nearest(g, other)
            error = torch.where(own == again, torch.maximum(error, further), torch.inf)
        loose = min(_LOOSE[g.dtype], _PART_OF_DISTANCE / n)
        is_open = ~(error <= loose)  # of what is not a number, too
        if is_open.any():
            # By the larger of the passes: where two samples' parts cancel in one, they do not in
            # another.
            sizes = torch.stack([each.norm(dim=1) for each in (g, *(p.g for p in passes))]).amax(0)
            if not _are_negligible(sizes, own, is_open, n, _NEGLIGIBLE[g.dtype]):
                return None
        tight = bool(((error <= _TIGHT[g.dtype]) | is_open).all())
        return cls(own, n, len(passes) >= (_PASSES[g.dtype] if tight else MOST_PASSES))

    def added(self, rows: Tensor, places: Tensor, count: int) -> Tensor:
        """Rows (U, width) added by owner and place (U,) of ``count``: (n, count, width)."""
        sums = rows.new_zeros(self.n * count, rows.shape[1])
        return sums.index_add_(0, self.of_row * count + places, rows).view(self.n, count, -1)

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Samples (m,) of about as many rows, their rows (m, T), and which of these there are."""
        counts = self.of_row.bincount(minlength=self.n)
        order, ends = self.of_row.argsort(stable=True), counts.cumsum(0)
        found = []
        for samples in _of_similar(counts):
            own = counts[samples]
            places = torch.arange(int(own.max()), device=counts.device)
            rows = (ends - counts)[samples, None] + places
            found.append((samples, order[rows.clamp(max=len(order) - 1)], places < own[:, None]))
        return found


def _of_similar(counts: Tensor) -> Iterator[Tensor]:
    """Samples with a row, in parts that have about as many, so that padding takes little."""
    most, some = int(counts.max()), int((counts > 0).sum())
    larger = most + 1 if most * some <= _LARGER * int(counts.sum()) else _LARGER
    least = 1
    while least <= most:
        samples = ((counts >= least) & (counts < larger * least)).nonzero().flatten()
        if len(samples):
            yield samples
        least *= larger


def _nearest(g: Tensor, weighted: Weighted) -> tuple[Tensor, Tensor]:
    """The owner that a pass names for each row, and how far the row is from being its alone.

    A row without a gradient in both passes is nobody's, and at no distance.
    """
    scale = torch.maximum(g.abs().amax(1), weighted.g.abs().amax(1))[:, None]
    scale = torch.where(scale == 0, 1, scale)  # squares of very small numbers would be none
    a, b = g / scale, weighted.g / scale
    weights, order = weighted.weights.to(g).sort()
    quotient = (a * b).sum(1) / a.square().sum(1)
    between = (weights[1:] + weights[:-1]) / 2
    place = torch.searchsorted(between, quotient)
    size = b.square().sum(1).sqrt()
    distance = (b - weights[place, None] * a).square().sum(1).sqrt()
    return order[place], torch.where((size == 0) & (distance == 0), 0, distance / size)


def _are_negligible(sizes: Tensor, own: Tensor, is_open: Tensor, n: int, share: float) -> bool:
    """Whether rows are rounding even beside the rows of the sample whose gradient is least.

    They are not where a sample has no other: all of its gradient may be in them.
    """
    squares = sizes.square()
    left = squares[is_open].sum()
    of_sample = squares.new_zeros(n).index_add_(0, own[~is_open], squares[~is_open])
    return bool(left == 0) or bool(left <= share**2 * of_sample.min())


@dataclass(frozen=True)
class Among:
    """Gradients of which each sample has its own in one of several factors, or none.

    Attributes:
        parts: Samples, ascending, and the factor of theirs.
        n: Number of gradients.
        zeros: Of the parameter's shape.
    """

    parts: list[tuple[Tensor, Factor]]
    n: int
    zeros: Tensor

    def gradients(self, start: int, stop: int) -> Tensor:
        found = self.zeros.expand(stop - start, *self.zeros.shape).clone()
        for samples, factor in self.parts:
            low, high = (int((samples < at).sum()) for at in (start, stop))
            if low < high:
                found[samples[low:high] - start] = factor.gradients(low, high)
        return found

    def row_norms(self) -> Tensor:
        rows = self.zeros.shape[0] if self.zeros.ndim else 1
        found = self.zeros.new_zeros(self.n, rows)
        for samples, factor in self.parts:
            found[samples] = factor.row_norms()
        return found

    def column_norms(self) -> Tensor:
        columns = self.zeros.shape[1] if self.zeros.ndim > 1 else 1
        found = self.zeros.new_zeros(self.n, columns)
        for samples, factor in self.parts:
            found[samples] = factor.column_norms()
        return found
