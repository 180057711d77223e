"""A term element by element: what each part of a sample has, and what the model expected of it.

Where a model's law of each element is known, its log-probability splits into what was expected of
it, E_p[log p], and the surprise, the rest, whose mean is zero over samples of the model. Their sum
is the term, so that whoever needs values or gradients alone asks for :meth:`Elements.total` and
nothing else is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ood_monitor.adapters.describing import describe

__all__ = [
    "Elements",
    "Lazy",
    "averaged",
    "checked",
    "counted_of",
    "resolved",
    "shifted",
    "total_of",
]

#: A tensor, or what gives it when it is asked for: gradients need log-probabilities alone.
Lazy: TypeAlias = Tensor | Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Elements:
    """A term element by element: log p_i(x_i), and what the model expected of it.

    Attributes:
        log_prob: log p_i(x_i) of each element, shape (B, ...), in nats.
        expected: E_{p_i}[log p_i], of the same shape, in nats; None where it is the same for every
            sample, or not known.
        quadratic: Gives, for discrete laws, the squared distance of what came from the
            probabilities, and its expectation, 1 - sum p^2: each of the same shape.
        counted: Which elements count, bool, of the same shape: what does not, padding or a prompt,
            is in no sum. All by default.
        mean: Whether the term is the mean over the counted elements, not the sum.
        apart: Whether each element is a column of its own, (B, K): log-determinants of K levels.
        axes: The dimensions of ``log_prob`` that are places: height and width of an image, the
            length of a sequence.

    Example:
        >>> coins = Elements(torch.full((2, 3), 0.5).log(), expected=torch.full((2, 3), 0.5).log())
        >>> coins.total()
        tensor([-2.0794, -2.0794])
    """

    log_prob: Tensor
    expected: Lazy | None = None
    quadratic: Callable[[], tuple[Tensor, Tensor]] | None = None
    counted: Tensor | None = None
    mean: bool = False
    apart: bool = False
    axes: tuple[int, ...] = ()

    def total(self) -> Tensor:
        """The term, shape (B,), in nats."""
        return total_of(self, self.log_prob)


def total_of(elements: Elements, values: Tensor) -> Tensor:
    """Values of the elements, (B, ...), as the term takes its own together, shape (B,)."""
    counted = elements.counted
    total = _rows(counted_of(elements, values)).sum(1)
    if not elements.mean:
        return total
    return total / (_rows(values).shape[1] if counted is None else _rows(counted).sum(1))


def counted_of(elements: Elements, values: Tensor) -> Tensor:
    """Values of the elements, (B, ...), with zero for those that do not count."""
    if elements.counted is None:
        return values
    return torch.where(elements.counted, values, torch.zeros_like(values))


def resolved(lazy: Lazy) -> Tensor:
    """The tensor itself."""
    return lazy if isinstance(lazy, Tensor) else lazy()


def shifted(elements: Elements, constant: float) -> Elements:
    """With a constant more in the term, an equal share in each element; no surprise changes."""
    share: float | Tensor = constant
    if not elements.mean:
        rows = _rows(elements.log_prob if elements.counted is None else elements.counted)
        count = rows.shape[1] if elements.counted is None else rows.sum(1)
        ones = [1] * (elements.log_prob.ndim - 1)
        share = constant / (count.view(-1, *ones) if isinstance(count, Tensor) else count)
    expected = elements.expected
    return replace(
        elements,
        log_prob=elements.log_prob + share,
        expected=None if expected is None else lambda: resolved(expected) + share,
    )


def averaged(elements: Elements, draws: int) -> Elements:
    """Means over the draws of each sample, which are neighbours: of B K rows, B.

    Raises:
        ValueError: Which elements count is told: draws may differ in it.
    """
    if draws == 1:
        return elements
    if elements.counted is not None:
        raise ValueError("Expected all elements of several draws to count, got `counted`.")

    def mean(values: Tensor) -> Tensor:
        return values.reshape(-1, draws, *values.shape[1:]).mean(1)

    def means(pair: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        came, expected = pair()
        return mean(came), mean(expected)

    expected, quadratic = elements.expected, elements.quadratic
    return replace(
        elements,
        log_prob=mean(elements.log_prob),
        expected=None if expected is None else lambda: mean(resolved(expected)),
        quadratic=None if quadratic is None else lambda: means(quadratic),
    )


def checked(elements: Elements, name: str, size: int) -> Elements:
    """Elements of B samples, whose lazy parts are checked when they are asked for.

    Args:
        elements: What an adapter gave.
        name: What they are, for messages: ``term 'latent_1' of Mine``.
        size: B.

    Returns:
        The same, of which ``expected`` and ``quadratic`` raise where they have another shape than
        ``log_prob``, or are not finite for a sample that is.

    Raises:
        ValueError: ``log_prob`` is not of B samples, ``expected`` or ``counted`` has another shape
            than it, elements apart are not (B, K), or an axis is none.
    """
    log_prob, counted = elements.log_prob, elements.counted
    if not isinstance(log_prob, Tensor) or log_prob.shape[:1] != (size,):
        raise ValueError(
            f"Expected log_prob of {name} to be of shape ({size}, ...), one row a sample, got "
            f"{describe(log_prob)} for a batch of {size} samples."
        )
    if isinstance(elements.expected, Tensor):
        _check_shape(elements.expected, "expected", name, log_prob)
    if counted is not None:
        _check_counted(counted, name, log_prob)
    if elements.apart and log_prob.ndim != 2:
        raise ValueError(
            f"Expected elements apart of {name} to be of shape ({size}, K), K columns, got "
            f"{describe(log_prob)}: sum what belongs to one column."
        )
    axes = elements.axes
    if len(set(axes)) < len(axes) or not all(0 < axis < log_prob.ndim for axis in axes):
        raise ValueError(
            f"Expected axes of {name} to be dimensions of log_prob, each once, from 1 to "
            f"{log_prob.ndim - 1}, got {axes}: 0 is the samples'."
        )
    return _with_checked_parts(elements, name)


def _with_checked_parts(elements: Elements, name: str) -> Elements:
    expected, quadratic = elements.expected, elements.quadratic

    def checked_expected() -> Tensor:
        assert expected is not None
        return _checked_part(resolved(expected), "expected", name, elements)

    def checked_quadratic() -> tuple[Tensor, Tensor]:
        assert quadratic is not None
        came, law = quadratic()
        parts = ("the quadratic", came), ("the expected quadratic", law)
        first, second = (_checked_part(value, part, name, elements) for part, value in parts)
        return first, second

    return replace(
        elements,
        expected=None if expected is None else checked_expected,
        quadratic=None if quadratic is None else checked_quadratic,
    )


def _checked_part(value: Tensor, part: str, name: str, elements: Elements) -> Tensor:
    _check_shape(value, part, name, elements.log_prob)
    # What does not count may be anything; a sample that is not finite itself is told elsewhere.
    wrong = ~_finite(value, elements) & _finite(elements.log_prob, elements)
    if wrong.any():
        raise ValueError(
            f"Expected {part} of {name} to be finite where log_prob is, got other values in "
            f"{int(wrong.sum())} of {len(wrong)} samples, first at index "
            f"{int(wrong.int().argmax())}: of values with probability 0, p log p is 0."
        )
    return value


def _finite(values: Tensor, elements: Elements) -> Tensor:
    """Whether all counted elements of a sample are, (B,)."""
    finite = values.isfinite()
    if elements.counted is not None:
        finite = finite | ~elements.counted
    return _rows(finite).all(1)


def _check_shape(value: Tensor, part: str, name: str, log_prob: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != log_prob.shape:
        raise ValueError(
            f"Expected {part} of {name} to be of the shape {tuple(log_prob.shape)} of log_prob, "
            f"got {describe(value)}: `.expand_as(log_prob)` where it is the same for elements, "
            "None where it is the same for every sample."
        )


def _check_counted(counted: Tensor, name: str, log_prob: Tensor) -> None:
    _check_shape(counted, "counted", name, log_prob)
    if counted.dtype != torch.bool:
        raise ValueError(f"Expected counted of {name} to be bool, got {counted.dtype}.")


def _rows(values: Tensor) -> Tensor:
    """Of shape (B, number of elements)."""
    return values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
