r"""Contractions of a parameter with data: per-sample gradients of `einsum` and all that it can say.

A matrix product, a batched one and `tensordot` are sums over named indices, as
:math:`y_{btr} = \sum_c x_{btc} w_{rc}`. Of a parameter's indices some are in the result alone
(*rows*), some in the data alone (*columns*), some in both (*groups*, such as heads). What the
result has beyond them are *positions*, of which each belongs to a sample. The gradient of sample i
is then, for each group, the sum over its positions of row times column: a matrix product's.

In a grouped product the group of a position is given by where it lies, and each group, an expert,
has a matrix of its own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ood_monitor.gradients.call import functions
from ood_monitor.gradients.factors import Factor, Outer, full_precision
from ood_monitor.gradients.owners import Among, Owners

__all__ = ["GROUPED", "PRODUCTS", "Contraction", "InGroups", "Spelled", "experts", "spelled"]


@dataclass(frozen=True)
class Spelled:
    """A contraction's operands, with a name for each dimension, and those of its result.

    Attributes:
        operands: In the order of the call.
        names: Of each operand's dimensions. One that is repeated in an operand is its diagonal.
        result: Of the result's dimensions.
        added: What is added to it, of a shape that broadcasts, if anything.
        scales: By what the contraction and what is added are multiplied.
    """

    operands: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    added: Tensor | None = None
    scales: tuple[float, float] = (1, 1)

    def in_full_precision(self) -> "Spelled":
        """The same of operands in single precision at least."""
        return replace(self, operands=tuple(map(full_precision, self.operands)))


def spelled(func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Spelled:
    """A call of one of :data:`PRODUCTS`.

    Raises:
        NotImplementedError: A form of the call that is not known.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.keys() - _OPTIONS:
        raise NotImplementedError("a contraction of a form that is not known")
    return PRODUCTS[func](*args, **given)


def _matrix_product(x: Tensor, y: Tensor) -> Spelled:
    rows = () if x.ndim == 1 else ("row",)
    columns = () if y.ndim == 1 else ("column",)
    of_x, of_y = (_batch(t.ndim - 2) for t in (x, y))
    result = (*(of_x if len(of_x) > len(of_y) else of_y), *rows, *columns)
    return Spelled((x, y), ((*of_x, *rows, "inner"), (*of_y, "inner", *columns)), result)


def _batch(count: int) -> tuple[str, ...]:
    """Dimensions that are counted from the last."""
    return tuple(f"-{i}" for i in range(count, 0, -1))


def _reflected(y: Tensor, x: Tensor) -> Spelled:
    product = _matrix_product(x, y)
    return Spelled(product.operands[::-1], product.names[::-1], product.result)


def _added_to(added: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Spelled:
    product = _matrix_product(x, y)
    return Spelled(product.operands, product.names, product.result, added, (alpha, beta))


def _outer(x: Tensor, y: Tensor) -> Spelled:
    return Spelled((x, y), (("row",), ("column",)), ("row", "column"))


def _along(x: Tensor, y: Tensor, dims: Any = 2) -> Spelled:
    """`tensordot`: along so many dimensions, last of x and first of y, or along those named."""
    if isinstance(dims, int):
        dims = range(x.ndim - dims, x.ndim), range(dims)
    left, right = ([d] if isinstance(d, int) else list(d) for d in dims)
    names = [f"x{i}" for i in range(x.ndim)], [f"y{i}" for i in range(y.ndim)]
    for i, (d, e) in enumerate(zip(left, right, strict=True)):
        names[0][d] = names[1][e] = f"inner{i}"
    result = [name for name in (*names[0], *names[1]) if not name.startswith("inner")]
    return Spelled((x, y), (tuple(names[0]), tuple(names[1])), tuple(result))


def _einstein_sum(equation: Any, *given: Any) -> Spelled:
    if not isinstance(equation, str):
        raise NotImplementedError("an `einsum` without an equation")
    operands = tuple(given[0]) if isinstance(given[0], list | tuple) else given
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:  # what is there once, in alphabetical order
        letters = sorted(set(inputs) - {",", "."})
        dots = "..." if "..." in inputs else ""
        output = dots + "".join(k for k in letters if inputs.count(k) == 1)
    names = [_of_term(term, x.ndim) for term, x in zip(terms, operands, strict=True)]
    hidden = max(sum(name.startswith("-") for name in each) for each in names)
    ndim = hidden + len(output.replace("...", "")) if "..." in output else len(output)
    return Spelled(operands, tuple(names), _of_term(output, ndim))


def _of_term(term: str, ndim: int) -> tuple[str, ...]:
    head, dots, tail = term.partition("...")
    return (*head, *(_batch(ndim - len(head) - len(tail)) if dots else ()), *tail)


_OPTIONS = {"alpha", "beta", "dims"}

_SPELLERS: tuple[tuple[str, Callable[..., Spelled]], ...] = (
    ("matmul mm bmm mv dot __matmul__", _matrix_product),
    ("__rmatmul__", _reflected),
    ("addmm baddbmm addmv", _added_to),
    ("outer ger", _outer),
    ("tensordot", _along),
    ("einsum", _einstein_sum),
)

#: How a contraction is spelled, by function.
PRODUCTS: dict[Callable[..., Any], Callable[..., Spelled]] = {
    function: spell for names, spell in _SPELLERS for function in functions(names, (torch, Tensor))
}

#: Products (rows, matrices, offs) of rows with one of several matrices each.
GROUPED: frozenset[Callable[..., Any]] = frozenset(functions("_grouped_mm grouped_mm"))


# Factors


@dataclass(frozen=True)
class InGroups:
    """Gradients that are a matrix for each group.

    Attributes:
        each: Of n * groups gradients, each of rows by columns.
        n: Number of gradients.
        sizes: Of the dimensions that are groups, rows and columns.
        places: Which of these dimensions, counted through, each dimension of the parameter is, of
            those that have a size beyond one.
        shape: Of the parameter.
    """

    each: Factor
    n: int
    sizes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    shape: torch.Size

    def gradients(self, start: int, stop: int) -> Tensor:
        groups, rows, columns = self.sizes
        count = math.prod(groups)
        found = self.each.gradients(start * count, stop * count)
        found = found.reshape(stop - start, *groups, *rows, *columns)
        moved = found.permute(0, *(1 + place for place in self.places))
        return moved.reshape(stop - start, *self.shape)

    def row_norms(self) -> Tensor:
        return self._norms_along(0)

    def column_norms(self) -> Tensor:
        return self._norms_along(1)

    def _norms_along(self, dimension: int) -> Tensor:
        groups, rows, columns = self.sizes
        if len(self.shape) <= dimension or self.shape[dimension] == 1:
            return self.each.row_norms().reshape(self.n, -1).sum(1, keepdim=True)
        place = self.places[sum(size > 1 for size in self.shape[:dimension])]
        if place < len(groups) + len(rows):
            norms = self.each.row_norms().reshape(self.n, *groups, *rows)
        else:
            norms = self.each.column_norms().reshape(self.n, *groups, *columns)
            place -= len(rows)
        others = [1 + i for i in range(norms.ndim - 1) if i != place]
        return norms.sum(others) if others else norms


@dataclass(frozen=True)
class Contraction:
    """What an operand of a contraction is to it, by the names of its dimensions.

    Dimensions of size one are left out: whatever has them, broadcasts along them.
    """

    position: int  # of the operand
    groups: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    positions: tuple[str, ...]  # of the result
    names: tuple[str, ...]  # of the operand
    shape: torch.Size

    @classmethod
    def of(cls, call: Spelled, position: int, result: Sequence[int]) -> "Contraction":
        """Of the operand at that position.

        Raises:
            NotImplementedError: It is a diagonal, or summed up before it is multiplied.
        """
        names = _beyond_one(call.names, call.operands)
        own, output = names[position], _long(call.result, result)
        others = {name for i, each in enumerate(names) if i != position for name in each}
        if len(set(own)) < len(own) or not set(own) <= others | set(output):
            raise NotImplementedError("an operand that is summed up before it is multiplied")
        return cls(
            position,
            tuple(k for k in own if k in others and k in output),
            tuple(k for k in own if k not in others),
            tuple(k for k in own if k not in output),
            tuple(k for k in output if k not in own),
            own,
            call.operands[position].shape,
        )

    def order(self, names: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """The result's dimensions, positions first."""
        return tuple(
            sorted(range(len(shape)), key=lambda i: not self._is_position(names, shape, i))
        )

    def _is_position(self, names: Sequence[str], shape: Sequence[int], i: int) -> bool:
        return shape[i] > 1 and names[i] in self.positions

    def factor(self, call: Spelled, g: Tensor, n: int, rows: int | Owners) -> Factor:
        """From the gradient of the contraction, and where the samples' rows are in it."""
        first = self.positions
        if not isinstance(rows, Owners) and n > 1:
            sample = call.result[rows]
            if sample not in self.positions:
                raise NotImplementedError("a contraction with an operand of each sample")
            first = (sample, *(k for k in self.positions if k != sample))
        r, c = self._sides(call, g, first)
        if isinstance(rows, Owners):
            return self._of_owners(r, c, rows)
        return self._made(*(t.reshape(n, -1, *t.shape[1:]) for t in (r, c)))

    def _sides(self, call: Spelled, g: Tensor, positions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Rows (positions, groups, R) and columns (positions, groups, C)."""
        names = _beyond_one(call.names, call.operands)
        others = [
            (call.operands[i].squeeze(), names[i]) for i in range(len(names)) if i != self.position
        ]
        sides = []
        for operands, last in (
            ([(g.squeeze(), _long(call.result, g.shape))], self.rows),
            (others, self.columns),
        ):
            whole = _sum_of(operands, (*positions, *self.groups, *last))
            sizes = [*whole.shape]
            at, end = len(positions), len(positions) + len(self.groups)
            parts = (sizes[:at], sizes[at:end], sizes[end:])
            sides.append(whole.reshape([math.prod(part) for part in parts]))
        return sides[0], sides[1]

    def _made(self, r: Tensor, c: Tensor) -> Factor:
        """Of rows (n, T, groups, R) and columns (n, T, groups, C)."""
        n, t, groups = r.shape[:3]
        r, c = (side.transpose(1, 2).reshape(n * groups, t, -1) for side in (r, c))
        if len(self.shape) == len(self.rows + self.columns) == 2 and len(self.rows) == 1:
            sides = (r, c) if self.names == self.rows + self.columns else (c, r)
            return Outer(*sides, self.shape)
        sizes = dict(zip(self.names, (size for size in self.shape if size > 1), strict=True))
        kinds = self.groups, self.rows, self.columns
        every = [k for kind in kinds for k in kind]
        return InGroups(
            Outer(r, c, torch.Size((r.shape[2], c.shape[2]))),
            n,
            tuple(tuple(sizes[k] for k in kind) for kind in kinds),
            tuple(every.index(k) for k in self.names),
            self.shape,
        )

    def _of_owners(self, r: Tensor, c: Tensor, owners: Owners) -> Factor:
        parts: list[tuple[Tensor, Factor]] = []
        for samples, rows, there in owners.groups:
            of_g = r[rows] * there[:, :, None, None]
            parts.append((samples, self._made(of_g, c[rows])))
        return Among(parts, owners.n, r.new_zeros(self.shape))


def _long(names: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
    return tuple(name for name, size in zip(names, shape, strict=True) if size > 1)


def _beyond_one(names: Iterable[Sequence[str]], tensors: Iterable[Tensor]) -> list[tuple[str, ...]]:
    return [_long(own, x.shape) for own, x in zip(names, tensors, strict=True)]


def _sum_of(operands: Sequence[tuple[Tensor, tuple[str, ...]]], result: tuple[str, ...]) -> Tensor:
    """Their product, summed over what is not in the result."""
    numbers: dict[str, int] = {}
    given: list[Any] = []
    for tensor, names in operands:
        given += [tensor, [numbers.setdefault(name, len(numbers)) for name in names]]
    found: Tensor = torch.einsum(*given, [numbers[name] for name in result])
    return found


def experts(g: Tensor, x: Tensor, weight: Tensor, ends: Tensor, owners: Owners) -> Factor:
    """The factor of a grouped product's matrices (groups, C, R).

    Args:
        g: The gradient of the product, shape (U, R).
        x: The rows, shape (U, C), those of each group together.
        weight: The matrices.
        ends: Where each group's rows end, shape (groups,). Those beyond are in none.
        owners: Of the U rows.
    """
    count, used = len(weight), int(ends[-1])
    places = torch.arange(used, device=g.device)
    group = torch.searchsorted(ends.to(places), places, right=True)
    both = Owners(owners.of_row[:used] * count + group, owners.n * count)
    parts: list[tuple[Tensor, Factor]] = []
    for samples, rows, there in both.groups:
        own = Outer(x[rows], g[rows] * there[:, :, None], weight.shape[1:])
        parts.append((samples, own))
    each = Among(parts, both.n, g.new_zeros(weight.shape[1:]))
    kinds = tuple((size,) for size in weight.shape)
    return InGroups(each, owners.n, kinds, (0, 1, 2), weight.shape)
