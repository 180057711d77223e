"""Where the sample that a scheduler steps stands in what a denoiser takes and gives.

A denoiser takes it as it is, with a further dimension of length one, as one tensor for each row in
a list, or with context before or behind it along one dimension; and gives its prediction likewise.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "layouts_of", "outputs_of", "prediction_in"]


@dataclass(frozen=True)
class Layout:
    """How a sample stands in a wider value.

    Attributes:
        listed: Whether the value is a list with a tensor for each row.
        inserted: Its dimensions of length one that the sample lacks, ascending, rows counted.
        dim: Its dimension along which context stands beside the sample; None without any.
        is_last: Whether the context stands before the sample.
    """

    listed: bool = False
    inserted: tuple[int, ...] = ()
    dim: int | None = None
    is_last: bool = False

    def taken(self, value: Any, shape: Sequence[int]) -> Tensor:
        """The sample in a value, (R, *shape)."""
        whole = self._whole(value)
        if self.dim is not None:
            _, whole, _ = self._parts(whole, shape)
        for dim in reversed(self.inserted):
            whole = whole.squeeze(dim)
        return whole

    def beside(self, value: Any, shape: Sequence[int]) -> Tensor | None:
        """The context beside the sample; None without any."""
        if self.dim is None:
            return None
        before, _, after = self._parts(self._whole(value), shape)
        return before if self.is_last else after

    def put(self, sample: Tensor, beside: Tensor | None) -> Tensor | list[Tensor]:
        """The value with a sample (R, ...) and its context."""
        whole = sample
        for dim in self.inserted:
            whole = whole.unsqueeze(dim)
        if self.dim is not None and beside is not None:
            context = beside.to(whole)
            whole = torch.cat([context, whole] if self.is_last else [whole, context], self.dim)
        return list(whole.unbind()) if self.listed else whole

    def _whole(self, value: Any) -> Tensor:
        return torch.stack(list(value)) if self.listed else value

    def _parts(self, whole: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What stands before the sample, the sample, and what stands behind it."""
        dim = self.dim or 0
        length = shape[dim - 1 - sum(each < dim for each in self.inserted)]
        start = whole.shape[dim] - length if self.is_last else 0
        lengths = [start, length, whole.shape[dim] - start - length]
        before, sample, after = torch.split(whole, lengths, dim)
        return before, sample, after


def layouts_of(value: Any, shape: Sequence[int]) -> Iterator[Layout]:
    """The layouts by which samples of a shape, rows not counted, may stand in a value."""
    listed = _is_listed(value)
    if not (listed or isinstance(value, Tensor)):
        return
    given = (len(value), *value[0].shape) if listed else tuple(value.shape)
    more = len(given) - 1 - len(shape)
    if more < 0:
        return
    of_one = [dim for dim in range(1, len(given)) if given[dim] == 1]
    for inserted in itertools.combinations(of_one, more):
        left = [dim for dim in range(1, len(given)) if dim not in inserted]
        other = [dim for dim, length in zip(left, shape, strict=True) if given[dim] != length]
        if not other:
            yield Layout(listed, inserted)
        elif len(other) == 1 and given[other[0]] > shape[left.index(other[0])]:
            yield Layout(listed, inserted, other[0])
            yield Layout(listed, inserted, other[0], is_last=True)


def prediction_in(output: Any) -> Any:
    """Of what a denoiser gives, the first: a tensor, or one for each row in a list."""
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def outputs_of(output: Any) -> tuple[Any, ...]:
    """All that a module gives."""
    return output if isinstance(output, tuple) else tuple(output.values())


def _is_listed(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value)
