"""Which calls have a closed form of their parameters' gradients, and the factors it gives.

A call is *covered* if its rows belong to one sample each. Along which dimension they lie in order
may be known (:mod:`~ood_monitor.gradients.order`); else their owners are found in the backward pass
(:mod:`~ood_monitor.gradients.owners`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ood_monitor.gradients.factors import Factor, Materialised, OfEachSample, full_precision
from ood_monitor.gradients.owners import Among, Owners
from ood_monitor.gradients.products import GROUPED, PRODUCTS, Contraction, Spelled, experts, spelled
from ood_monitor.gradients.rules import (
    JOINING,
    MULTIPLYING,
    POINTWISE,
    RULES,
    SPREADING,
    SUMS,
    Rule,
)
from ood_monitor.gradients.tracking import map_arguments

__all__ = [
    "Covered",
    "Given",
    "Rows",
    "covered",
    "is_above",
    "joined",
    "of_owners",
    "pointwise",
    "spread_along",
]

#: Where the rows of the samples are: along a dimension, in order; or as their owners say.
Rows: TypeAlias = int | Owners


class Given(NamedTuple):
    """A call that took derived tensors (or parameters) and data.

    Attributes:
        func: The operation.
        args: As the model gave them.
        kwargs: Likewise.
        plain: Both, with derived tensors as they went into the operation, without their graph.
        result: What it gave.
        n: Number of gradients.
        is_source: Whether a tensor is derived; whether it is a parameter.
        dimension_of: The sample dimension of a data tensor, or None.
        dimension: That of the result.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: tuple[tuple[Any, ...], dict[str, Any]]
    result: Tensor
    n: int
    is_source: Callable[[Any], bool]
    is_parameter: Callable[[Any], bool]
    dimension_of: Callable[[Tensor], int | None]
    dimension: int | None


@dataclass(frozen=True)
class Covered:
    """A call's closed form.

    Attributes:
        factors: Gives the factors of the sources in order, from the gradient of the result and
            where its rows are. Raises NotImplementedError for what it does not know.
        dimension: Along which the rows of the samples lie in order, or None if that is not known.
        leading: The number of the result's first dimensions whose elements are its rows.
        order: The result's dimensions, those of rows first; None where they are.
    """

    factors: Callable[[Tensor, Rows], list[Factor]]
    dimension: int | None
    leading: int
    order: tuple[int, ...] | None = None

    def rows(self, g: Tensor) -> Tensor:
        """A gradient of the result as its rows, shape (U, width)."""
        g = g if self.order is None else g.permute(self.order)
        # Both sizes: of no rows, as of an expert without a token, the width would not follow.
        return g.reshape(math.prod(g.shape[: self.leading]), math.prod(g.shape[self.leading :]))


def covered(given: Given) -> Covered | None:
    """The closed form of a call, or None if there is none."""
    if not given.args and given.func not in RULES:
        return None  # all by their names
    if given.func in POINTWISE:
        return _pointwise(given)
    if given.func in JOINING:
        return _joined(given)
    if given.func in SPREADING:
        return _spread(given)
    if given.func in PRODUCTS:
        return _product(given)
    if given.func in GROUPED:
        return _grouped(given)
    return _by_rule(given) if given.func in RULES else None


def _by_rule(given: Given) -> Covered | None:
    rule, n = RULES[given.func], given.n
    arguments = dict(zip(rule.arguments, given.args, strict=False)) | given.kwargs
    plain = dict(zip(rule.arguments, given.plain[0], strict=False)) | given.plain[1]
    values = map_arguments(Tensor.detach, plain)
    names = [k for k, v in arguments.items() if given.is_source(v)]
    if not set(names) <= {"weight", "bias"}:
        return None
    leading, d = rule.leading(values), given.dimension
    if given.dimension_of(arguments["input"]) != d or (d is not None and d >= leading):
        d = None

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        full = map_arguments(full_precision, values)
        if isinstance(rows, Owners):
            found = of_owners(rule, g, full, rows)
        else:
            x = full["input"].movedim(rows, 0)
            found = rule.factors(n, g.movedim(rows, 0), full | {"input": x})
        return [found[name] for name in names]

    return Covered(factors, d, leading)


def of_owners(
    rule: Rule, g: Tensor, values: Mapping[str, Any], owners: Owners
) -> dict[str, Factor]:
    """Factors of rows that are put together by owner, those of one filled up with zeros."""
    values, x, leading = dict(values), values["input"], rule.leading(values)
    x, g = (t.reshape(len(owners.of_row), *t.shape[leading:]) for t in (x, g))
    parts: dict[str, list[tuple[Tensor, Factor]]] = {"weight": [], "bias": []}
    for samples, rows, there in owners.groups:
        own, chosen = x[rows.flatten()], g[rows.flatten()]
        if not there.all():  # whatever is there in their place adds nothing
            chosen = chosen * there.reshape(-1, *[1] * (g.ndim - 1))
        for name, factor in rule.factors(len(samples), chosen, values | {"input": own}).items():
            parts[name].append((samples, factor))
    zeros = {k: g.new_zeros(v.shape) for k, v in values.items() if k in parts and v is not None}
    return {name: Among(parts[name], owners.n, zero) for name, zero in zeros.items()}


def _pointwise(given: Given) -> Covered | None:
    (values, options) = map_arguments(Tensor.detach, given.plain)
    taken = [i for i, v in enumerate(given.args) if given.is_source(v)]
    d, n, result = given.dimension, given.n, given.result
    if not taken or len(taken) == len([v for v in given.args if isinstance(v, Tensor)]):
        return None
    for i in taken:
        own = given.args[i]
        # A parameter of so many rows as the batch has would not fit any other batch.
        if d is not None and _size_along(own, result, d) > 1 and (d or given.is_parameter(own)):
            return None
    operation = partial(given.func, **options) if options else given.func

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        arguments = map_arguments(full_precision, values)
        return [pointwise(operation, n, g, arguments, i, rows) for i in taken]

    return Covered(factors, d, _leading_of(result))


def _leading_of(result: Tensor) -> int:
    """Rows of a broadcasting operation lie along the last dimension, or are single elements."""
    return max(1, result.ndim - 1)


def _size_along(tensor: Tensor, result: Tensor, d: int) -> int:
    """The size of a broadcast operand along a dimension of the result."""
    own = d - (result.ndim - tensor.ndim)
    return tensor.shape[own] if own >= 0 else 1


def _joined(given: Given) -> Covered | None:
    tensors, *rest = given.args
    given_dim = rest[0] if rest else given.kwargs.get("dim", given.kwargs.get("axis", 0))
    dim, n = given_dim % given.result.ndim, given.n
    if dim == 0 or given.dimension != 0 or any(len(t) != len(given.result) for t in tensors):
        return None
    sizes = [tensor.shape[dim] for tensor in tensors]
    positions = [i for i, tensor in enumerate(tensors) if given.is_source(tensor)]

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        if isinstance(rows, Owners):
            raise NotImplementedError("tensors put beside rows of whom is not known")
        return [joined(n, g, dim, sizes, i) for i in positions]

    return Covered(factors, 0, 1)


# Contractions


def _product(given: Given) -> Covered | None:
    (args, options), n, d = map_arguments(Tensor.detach, given.plain), given.n, given.dimension
    try:
        call, own = (
            spelled(given.func, args, options),
            spelled(given.func, given.args, given.kwargs),
        )
        taken = [i for i, operand in enumerate(own.operands) if given.is_source(operand)]
        shape = given.result.shape
        found = [Contraction.of(call, i, shape) for i in taken]
    except (LookupError, NotImplementedError, TypeError, ValueError):
        return None  # a form of the call that is not foreseen
    is_added = own.added is not None and given.is_source(own.added)
    if d is not None and n > 1 and any(call.result[d] not in each.positions for each in found):
        return None

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        if isinstance(rows, Owners) and len({each.positions for each in found}) > 1:
            raise NotImplementedError("operands whose rows are not the same")
        full, scale = call.in_full_precision(), call.scales[0]
        each = [own.factor(full, g * scale if scale != 1 else g, n, rows) for own in found]
        return [_of_added(call, g, n, rows, leading), *each] if is_added else each

    leading = len(found[0].positions) if found else _leading_of(given.result)
    return Covered(factors, d, leading, found[0].order(call.result, shape) if found else None)


def _of_added(call: Spelled, g: Tensor, n: int, rows: Rows, leading: int) -> Factor:
    """The factor of what is added to a contraction."""
    assert call.added is not None
    if isinstance(rows, Owners) and leading != _leading_of(g):
        raise NotImplementedError("an addend whose rows are not those of the product")
    return _of_broadcast(g * call.scales[1], call.added.shape, n, rows)


def _grouped(given: Given) -> Covered | None:
    (args, options), n = map_arguments(Tensor.detach, given.plain), given.n
    taken = [given.is_source(v) for v in (*given.args, *given.kwargs.values())]
    ends = args[2] if len(args) > 2 else options.get("offs")
    if taken[:2] != [False, True] or sum(taken) > 1 or ends is None:
        return None
    x, weight = args[:2]
    if (x.ndim, weight.ndim) != (2, 3):
        return None

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        if not isinstance(rows, Owners):
            places = torch.arange(len(g), device=g.device)
            rows = Owners(places * n // len(g), n)
        return [experts(g, full_precision(x), full_precision(weight), ends, rows)]

    return Covered(factors, given.dimension, 1)


# Rows that are all the same


def spread_along(source: Tensor, result: Tensor, rows: int) -> int | None:
    """Along which dimension a tensor was put in so many rows, if it was and along one alone."""
    shape = _aligned(source.shape, result)
    if shape is None:
        return None
    found = [d for d, size in enumerate(result.shape) if size == rows and shape[d] == 1]
    return found[0] if len(found) == 1 else None


def _aligned(shape: Sequence[int], result: Tensor) -> tuple[int, ...] | None:
    """A shape with as many dimensions as the result has, if it broadcasts to it."""
    aligned = (*[1] * (result.ndim - len(shape)), *shape)
    fits = len(aligned) == result.ndim and all(
        own in (1, size) for own, size in zip(aligned, result.shape, strict=True)
    )
    return aligned if fits else None


def is_above(shape: torch.Size, other: torch.Size) -> bool:
    """Whether the first dimension of a shape is one along which another broadcasts to it."""
    return len(shape) > len(other) or (len(shape) == len(other) > 0 and other[0] == 1)


def _spread(given: Given) -> Covered | None:
    source, n = given.args[0], given.n
    if not given.is_source(source) or _aligned(source.shape, given.result) is None:
        return None

    def factors(g: Tensor, rows: Rows) -> list[Factor]:
        return [_of_broadcast(g, source.shape, n, rows)]

    return Covered(factors, given.dimension, _leading_of(given.result))


# Factors


def pointwise(
    function: Callable[..., Any],
    n: int,
    g: Tensor,
    args: tuple[Any, ...],
    position: int,
    rows: Rows = 0,
) -> Factor:
    """The factor of the tensor argument at ``position`` of a broadcasting operation."""
    argument: Tensor = args[position]
    if function in SUMS:
        full = g
    elif function in MULTIPLYING and isinstance(args[1 - position], Tensor):
        full = g * args[1 - position]
    else:
        full = _differentiated(function, g, args, position)
    return _of_broadcast(full, argument.shape, n, rows)


def _differentiated(
    function: Callable[..., Any], g: Tensor, args: tuple[Any, ...], position: int
) -> Tensor:
    """The gradient of an argument that is as large as the result."""
    with torch.enable_grad():
        expanded = args[position].detach().expand(g.shape).requires_grad_()
        output = function(*args[:position], expanded, *args[position + 1 :])
        found: Tensor = torch.autograd.grad(output, expanded, g)[0]
    return found


def _of_broadcast(full: Tensor, shape: torch.Size, n: int, rows: Rows) -> Factor:
    """The factor of a tensor of this shape, from the gradient of what it was broadcast to."""
    aligned = (*[1] * (full.ndim - len(shape)), *shape)
    if not full.numel():
        return Materialised(full.new_zeros(n, *shape))
    if isinstance(rows, Owners):
        return Materialised(_added(full, aligned, rows).reshape(n, *shape))
    full, aligned = full.movedim(rows, 0), (aligned[rows], *aligned[:rows], *aligned[rows + 1 :])
    if aligned[0] > 1:
        if rows:
            raise NotImplementedError(
                "an operand with rows of each sample, along another dimension"
            )
        return OfEachSample(_reduced_to(full, aligned[1:]), n)
    per_gradient = full.reshape(n, -1, *full.shape[1:]).sum(1)
    return Materialised(_reduced_to(per_gradient, aligned[1:]).reshape(n, *shape))


def _added(full: Tensor, aligned: tuple[int, ...], owners: Owners) -> Tensor:
    """Sum by owner and by element of what was broadcast."""
    if full.ndim == 1:
        full, aligned = full[:, None], (*aligned, 1)
    places, step = torch.zeros((), dtype=torch.int64, device=full.device), 1
    for d in reversed(range(full.ndim - 1)):
        if aligned[d] > 1:
            own = step * torch.arange(aligned[d], device=full.device)
            places, step = places + own.reshape(-1, *[1] * (full.ndim - 2 - d)), step * aligned[d]
    places = places.expand(full.shape[:-1]).flatten()
    sums = owners.added(full.reshape(len(places), full.shape[-1]), places, step)
    return sums if aligned[-1] > 1 else sums.sum(-1)


def _reduced_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum over the dimensions along which a shape, of one dimension less, broadcasts."""
    broadcast = [i + 1 for i, size in enumerate(shape) if size == 1 and values.shape[i + 1] != 1]
    return values.sum(broadcast, keepdim=True) if broadcast else values


def joined(n: int, g: Tensor, dim: int, sizes: Sequence[int], position: int) -> Factor:
    """The factor of the tensor at ``position`` of those, of ``sizes``, joined along ``dim``."""
    return OfEachSample(g.narrow(dim, sum(sizes[:position]), sizes[position]), n)
