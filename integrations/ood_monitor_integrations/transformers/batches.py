"""Batches of a Trainer as samples: one text a row, each with something to score."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ood_monitor.adapters.base import Batch, describe
from ood_monitor_integrations.transformers.models import IGNORED

__all__ = ["Texts", "unpacked"]

#: What a Trainer or a collator puts beside the samples of a batch.
_BESIDE = frozenset({"num_items_in_batch", "return_loss", "skip_logits"})

#: How a collator tells again where packed texts begin; positions have said so.
_OF_PACKS = frozenset({"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"})


def unpacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Texts that were packed into rows, one a row again, filled up on the right.

    Where a text begins is told by ``"position_ids"``, which begin again. A batch without them, or
    with one text a row, is given back as it is.

    Args:
        batch: ``"input_ids"``, (B, T), with ``"labels"``, ``"position_ids"`` and
            ``"attention_mask"``, where it has them, of the same shape.

    Returns:
        Tensors (N, longest) of N texts, with an ``"attention_mask"``; without positions.

    Raises:
        ValueError: Positions of another shape than the tokens, or that skip some.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7, 8, 9]])
        >>> batch = {"input_ids": tokens, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        >>> unpacked(batch)["input_ids"]
        tensor([[5, 6, 7],
                [8, 9, 0]])
    """
    positions, tokens = batch.get("position_ids"), batch.get("input_ids")
    kept = {name: value for name, value in batch.items() if name not in _OF_PACKS}
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor):
        return dict(batch)
    if positions.shape != tokens.shape:
        raise ValueError(
            f"Expected position_ids of the tokens' shape {tuple(tokens.shape)}, got "
            f"{describe(positions)}."
        )
    mask = batch.get("attention_mask")
    text = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    pieces = [row for index in range(len(tokens)) for row in _texts(index, positions, text)]
    if len(pieces) == len(tokens):
        return {name: value for name, value in kept.items() if name != "position_ids"}
    return _padded(kept, tokens, pieces)


def _texts(index: int, positions: Tensor, text: Tensor) -> list[tuple[int, Tensor]]:
    """Where the texts of a row are: the row, and the columns of each."""
    columns = text[index].nonzero().flatten()
    own = positions[index, columns]
    begins = torch.ones_like(own, dtype=torch.bool)
    begins[1:] = own[1:] <= own[:-1]
    steps = own[1:] - own[:-1]
    if (steps[~begins[1:]] != 1).any() or (own[begins] != own[:1]).any():
        raise ValueError(
            "Expected position_ids that count the tokens of each text, from the same number on, "
            f"got others in row {index}."
        )
    ends = [*begins.nonzero().flatten().tolist(), len(columns)]
    return [(index, columns[a:b]) for a, b in pairwise(ends)]


def _padded(
    batch: Mapping[str, Any], tokens: Tensor, pieces: list[tuple[int, Tensor]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in batch.items():
        is_per_token = isinstance(value, Tensor) and value.shape == tokens.shape
        if is_per_token and name not in ("position_ids", "attention_mask"):
            fill = IGNORED if name == "labels" else 0
            found[name] = _rows([value[row, columns] for row, columns in pieces], fill)
        elif not is_per_token:
            found[name] = value
    ones = [torch.ones_like(columns) for _, columns in pieces]
    return {**found, "attention_mask": _rows(ones, 0)}


def _rows(pieces: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(pieces, batch_first=True, padding_value=fill)


class Texts:
    """Makes samples of what a Trainer gives its model: to score, and to calibrate on.

    Args:
        tell: Is told how many samples are left out, since none of their tokens is trained on.

    Attributes:
        rows: Of the latest batch, which of its samples are there, as indices; None if all are.
        count: How many it has had, where some are not.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self.rows: list[int] | None = None
        self.count = 0

    def __call__(self, batch: Batch) -> Batch:
        """A batch without what stands beside samples; of texts one a row, with labels to score."""
        self.rows = None
        if not isinstance(batch, Mapping):
            return batch
        kept = {name: value for name, value in batch.items() if name not in _BESIDE}
        if not isinstance(kept.get("labels"), Tensor) or "input_ids" not in kept:
            return kept
        return self._with_labels(unpacked(kept))

    def _with_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of which a token is predicted: of causal models the first never is."""
        labels = batch["labels"]
        if labels.ndim != 2:
            return batch
        found = (labels[:, 1:] != IGNORED).any(1)
        if found.all():
            return batch
        self._tell(int((~found).sum()))
        self.count = len(labels)
        self.rows = found.nonzero().flatten().tolist()
        size = labels.shape[:1]
        return {
            name: value[found] if isinstance(value, Tensor) and value.shape[:1] == size else value
            for name, value in batch.items()
        }
