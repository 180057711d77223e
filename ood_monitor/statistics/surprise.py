r"""What a model expected of a likelihood's elements, and the surprise.

.. math:: \log p(x) = E + M, \quad E = \sum_i \mathbb E_{p_i}[\log p_i] = -\sum_i H_i,

with M the rest, whose mean is zero under the model whatever the sample. A plain foreign image has
a likelihood as high as known ones, and the wrong surprise for what was expected.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ood_monitor.adapters.elements import Elements, counted_of, resolved

__all__ = ["surprise_map", "value_columns"]

#: Rows and columns of the map.
GRID = 4

LENGTH = "log_length"


def value_columns(terms: Mapping[str, Tensor | Elements], *, by_element: bool) -> dict[str, Tensor]:
    """Columns of values, by name.

    A term without expectation has one column, its value. One with an expectation has
    ``term.expected`` (E) and ``term.surprise`` (M), in nats, and if it has the quadratic score's
    pair ``term.quadratic`` and ``term.expected_quadratic``, the logarithms of their sums. Elements
    that stand apart have a column each, ``term[i]``.

    Args:
        terms: Each of shape (B,), or as elements, as
            :func:`~ood_monitor.adapters.base.checked_elements` gives them.
        by_element: Whether to take means over the elements that count, of samples of different
            lengths, instead of sums, and the logarithm of their number once: ``log_length``.

    Returns:
        Of each column (B,), float64.

    Raises:
        ValueError: What is asked of the elements is not as it must be.
    """
    columns: dict[str, Tensor] = {}
    for term, value in terms.items():
        if not isinstance(value, Elements):
            columns[term] = value.detach().double()
        elif value.apart:
            columns |= _apart(term, value, by_element)
        else:
            columns |= _of_elements(term, value, by_element)
    whole = [v for v in terms.values() if isinstance(v, Elements) and not v.apart]
    if by_element and whole:
        columns[LENGTH] = _number(whole[0]).log()
    return columns


def surprise_map(terms: Mapping[str, Tensor | Elements]) -> dict[str, Tensor]:
    """What was expected by place: E summed over a 4 x 4 grid, of each term that is an image's.

    Args:
        terms: As there; those without an expectation, or without two dimensions that are places,
            have no map.

    Returns:
        ``{"term.expected[i,j]": (B,)}``, float64, in nats; of an image of fewer than 4 pixels in a
        dimension as many rows or columns as there are.

    Raises:
        ValueError: As :func:`value_columns`.
    """
    columns: dict[str, Tensor] = {}
    for term, value in terms.items():
        if not isinstance(value, Elements) or value.expected is None or len(value.axes) != 2:
            continue
        expected = counted_of(value, resolved(value.expected))
        places = expected.movedim(value.axes, (-2, -1))
        places = places.reshape(len(places), -1, *places.shape[-2:]).sum(1, dtype=torch.float64)
        rows, cells = _cells(places.shape[1], places), _cells(places.shape[2], places)
        grid = rows @ places @ cells.mT
        for i in range(grid.shape[1]):
            columns |= {f"{term}.expected[{i},{j}]": grid[:, i, j] for j in range(grid.shape[2])}
    return columns


def _of_elements(term: str, value: Elements, by_element: bool) -> dict[str, Tensor]:
    is_mean = by_element or value.mean
    if value.expected is None:
        columns = {term: _sum(value.log_prob, value, is_mean)}
    else:
        expected = _sum(resolved(value.expected), value, is_mean)
        surprise = _sum(value.log_prob, value, is_mean) - expected
        columns = {f"{term}.expected": expected, f"{term}.surprise": surprise}
    if value.quadratic is not None:
        came, pair = value.quadratic(), ("quadratic", "expected_quadratic")
        for name, part in zip(pair, came, strict=True):
            columns[f"{term}.{name}"] = _log(_sum(part, value, is_mean))
    return columns


def _apart(term: str, value: Elements, by_element: bool) -> dict[str, Tensor]:
    """Each element as a term of its own."""
    columns: dict[str, Tensor] = {}
    log_prob = counted_of(value, value.log_prob)
    expected = None
    if value.expected is not None:
        expected = counted_of(value, resolved(value.expected))
    for i, element in enumerate(log_prob.unbind(1)):
        own = None if expected is None else expected[:, i, None]
        columns |= _of_elements(f"{term}[{i}]", Elements(element[:, None], own), by_element)
    return columns


def _sum(part: Tensor, value: Elements, is_mean: bool) -> Tensor:
    """Over the elements that count, or their mean: (B,), float64."""
    total = counted_of(value, part).flatten(1).sum(1, dtype=torch.float64)
    return total / _number(value) if is_mean else total


def _number(value: Elements) -> Tensor:
    """How many elements of each sample count, (B,), float64."""
    if value.counted is not None:
        return value.counted.flatten(1).sum(1, dtype=torch.float64)
    log_prob = value.log_prob
    return log_prob.new_full((len(log_prob),), log_prob[:1].numel(), dtype=torch.float64)


def _log(total: Tensor) -> Tensor:
    """The logarithm, of zero too."""
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def _cells(length: int, like: Tensor) -> Tensor:
    """Which of the cells each place belongs to, (cells, length), one or zero."""
    count = min(GRID, length)
    cell = torch.arange(length, device=like.device) * count // length
    return (cell == torch.arange(count, device=like.device)[:, None]).to(like.dtype)
