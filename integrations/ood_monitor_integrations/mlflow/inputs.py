"""From what MLflow hands to a model, arrays, tables and named tensors, to a detector's batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from torch import Tensor

from ood_monitor.adapters.base import Batch, describe, tensors_in
from ood_monitor.saving import Fitted
from ood_monitor.saving.format import sample_of

__all__ = ["COLUMNS", "Inputs"]

#: What a prediction has of each sample, and as what.
COLUMNS = {"score": "double", "p_value": "double", "log_likelihood": "double", "valid": "boolean"}

Structure: TypeAlias = Literal["tensor", "tuple", "mapping"]


@dataclass(frozen=True)
class Inputs:
    """How a batch is made of what a request holds.

    Attributes:
        structure: What the adapter takes.
        names: Of the tensors, in order; empty for a tensor alone.
        samples: Shape and type of each tensor without B; empty if they varied.
    """

    structure: Structure
    names: tuple[str, ...]
    samples: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, fitted: Fitted, example: Batch | None) -> "Inputs":
        """Of a detector, and of a batch that it takes.

        Raises:
            ValueError: The detector takes several tensors and no example names them, or the
                example is no flat batch.
        """
        samples = tuple(map(sample_of, fitted.samples))
        if example is None and len(samples) > 1:
            raise ValueError(
                f"Expected an input_example, since the detector takes {len(samples)} tensors, got "
                "none: a tuple or a mapping of tensors."
            )
        if isinstance(example, Mapping):
            return cls("mapping", tuple(map(str, example)), samples)
        if isinstance(example, tuple | list):
            return cls("tuple", tuple(map(str, range(len(example)))), samples)
        return cls("tensor", (), samples)

    def example(self, batch: Batch) -> np.ndarray | dict[str, np.ndarray]:
        """A batch as arrays, by name if there are several.

        Raises:
            ValueError: The batch is nested, or holds something else than tensors.
        """
        values = list(batch.values()) if isinstance(batch, Mapping) else batch
        values = list(values) if isinstance(values, tuple | list) else [values]
        if not all(isinstance(value, Tensor) for value in values):
            raise ValueError(f"Expected a flat batch of tensors, got {describe(batch)}.")
        arrays = [_array(tensor) for tensor in tensors_in(batch)]
        return dict(zip(self.names, arrays, strict=True)) if self.names else arrays[0]

    def signature(self) -> ModelSignature | None:
        """What a request must hold, and what the answer does; None if shapes varied."""
        if not self.samples or (self.names and len(self.names) != len(self.samples)):
            return None
        specs: list[ColSpec | TensorSpec] = [
            TensorSpec(_array(torch.empty(0, dtype=dtype, device="cpu")).dtype, (-1, *shape), name)
            for (shape, dtype), name in zip(self.samples, self.names or (None,), strict=True)
        ]
        return ModelSignature(Schema(specs), Schema([ColSpec(v, k) for k, v in COLUMNS.items()]))

    def batch(self, given: Any) -> Batch:
        """The adapter's batch.

        Args:
            given: An array (B, ...), or its samples as rows (B, D); a table of D columns, or with a
                column of arrays for each tensor; or arrays by name.

        Raises:
            ValueError: None of these, a name is missing, or numbers of another kind.
        """
        if self.structure == "tensor":
            return self._tensor(_alone(given), 0)
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ValueError(f"Expected inputs {list(self.names)}, got none of {missing}.")
        columns = [_stacked(given[name]) for name in self.names]
        tensors = [self._tensor(column, i) for i, column in enumerate(columns)]
        return (
            dict(zip(self.names, tensors, strict=True))
            if self.structure == "mapping"
            else tuple(tensors)
        )

    def _tensor(self, given: Any, position: int) -> Tensor:
        array = np.array(given)  # a copy, which torch may write to
        if array.dtype == object or array.dtype.kind not in "biuf" or array.ndim == 0:
            raise ValueError(f"Expected numbers (B, ...), got {array.dtype} of {array.shape}.")
        tensor = torch.from_numpy(array)
        if position >= len(self.samples):
            return tensor
        shape, dtype = self.samples[position]
        if tensor.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"Expected {dtype}, got {tensor.dtype}.")
        if dtype.is_floating_point and not tensor.is_floating_point():
            raise ValueError(
                f"Expected {dtype}, got {tensor.dtype}: give the values that the detector was "
                "fitted on, `x / 255` if those are bytes in [0, 1]."
            )
        rows = tensor.to(dtype)
        # Tables and Spark's columns hold samples as rows; of another size the detector refuses.
        return rows.reshape(-1, *shape) if rows[:1].numel() == np.prod(shape, dtype=int) else rows


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _alone(given: Any) -> Any:
    """The only tensor of a request."""
    if isinstance(given, pd.DataFrame):
        one = len(given.columns) == 1 and given.iloc[:, 0].dtype.kind == "O"
        return _stacked(given.iloc[:, 0]) if one else given.to_numpy()
    if isinstance(given, Mapping):
        if len(given) != 1:
            raise ValueError(f"Expected one input, got {list(given)}.")
        return _stacked(next(iter(given.values())))
    return _array(given) if isinstance(given, Tensor) else given


def _stacked(column: Any) -> Any:
    if isinstance(column, pd.Series) and column.dtype.kind == "O":
        return np.stack([np.asarray(value) for value in column]) if len(column) else np.empty((0,))
    return _array(column) if isinstance(column, Tensor) else column
