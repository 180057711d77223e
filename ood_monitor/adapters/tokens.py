"""What of a batch of tokens a model is given, and which of them are scored.

A batch is a tensor, a sequence that begins with one, or a mapping as transformers' collators make
it: ``"input_ids"``, and maybe ``"attention_mask"``, ``"position_ids"`` and ``"labels"``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ood_monitor.adapters.base import Batch, describe, first_tensor
from ood_monitor.adapters.mapped import of_all

__all__ = ["condition_in", "labels_in", "scored_by", "tokens_in"]

#: What of a mapping is read; anything else may change what a model says.
_READ = frozenset({"input_ids", "attention_mask", "position_ids", "labels"})


def tokens_in(batch: Batch) -> Tensor:
    """The tokens of a batch, (B, ...).

    Raises:
        ValueError: It is a mapping without ``"input_ids"``, or none of the known forms.
    """
    if not isinstance(batch, Mapping):
        return first_tensor(batch)
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"Expected a mapping with a tensor 'input_ids', got {sorted(map(str, batch))}. Pass "
            "`inputs=` to say where the tokens are."
        )
    return tokens


def labels_in(batch: Batch) -> Tensor:
    """The labels of a batch, of the tokens' shape.

    Raises:
        ValueError: There are none.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"Expected a mapping with a tensor 'labels' beside ignore_index, got {describe(batch)}."
            " Pass `labels=` to say where they are."
        )
    return labels


def condition_in(batch: Batch) -> Mapping[str, Any]:
    """The mask of a mapping as a model's keyword; nothing of any other batch.

    Positions are not passed on: those of a text are 0, 1, ... wherever it stands in its row.

    Raises:
        ValueError: The mapping has further tensors, which nobody knows what to do with, or
            positions that begin again within a row.
    """
    if not isinstance(batch, Mapping):
        return {}
    further = sorted(str(key) for key in batch.keys() - _READ if isinstance(batch[key], Tensor))
    if further:
        raise ValueError(
            f"Expected tensors of {', '.join(sorted(_READ))} in a batch, got {', '.join(further)} "
            "beside them. Pass `condition=lambda batch: {...}` to say what the model is given."
        )
    mask = batch.get("attention_mask")
    if isinstance(positions := batch.get("position_ids"), Tensor):
        _refuse_several_in_a_row(positions, mask)
    return {} if mask is None else {"attention_mask": mask}


def scored_by(labels: Tensor, tokens: Tensor, ignored: int) -> Tensor:
    """Which tokens labels do not leave out, bool, of the tokens' shape.

    Raises:
        ValueError: Labels of another shape, or that are other tokens: shifted already, or of a
            model that is not causal.
    """
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        raise ValueError(
            f"Expected labels of the tokens' shape {tuple(tokens.shape)}, got {describe(labels)}."
        )
    labels = labels.to(tokens.device)
    scored = labels != ignored
    other = (scored & (labels != tokens)).reshape(len(tokens), -1).any(1)
    if of_all(other).any():
        raise ValueError(
            f"Expected labels that are the tokens themselves, or {ignored} where they are ignored, "
            f"got others in {int(other.sum())} of {len(other)} rows, first at index "
            f"{int(other.int().argmax())}: do not shift them, as the logits are."
        )
    return scored


def _refuse_several_in_a_row(positions: Tensor, mask: Tensor | None) -> None:
    """Refuse packed texts: they are several samples, which must not see each other."""
    if positions.ndim != 2:
        raise ValueError(
            f"Expected position_ids (B, T) of one text a row, got {describe(positions)}. Pass "
            "`condition=` to say what of it the model is given."
        )
    steps = positions[:, 1:] - positions[:, :-1]
    if mask is not None:
        steps = torch.where(mask[:, 1:].bool() & mask[:, :-1].bool(), steps, 1)
    if of_all(steps != 1).any():
        raise ValueError(
            "Expected one text a row, got position_ids that begin again within "
            f"{int((steps != 1).any(1).sum())} of {len(positions)} rows: several texts were packed "
            "into each. Take them apart by `ood_monitor_integrations.transformers.unpacked`."
        )
