"""Where the texts of a padded batch are, and how to make each begin in the first column.

A text is one run of tokens in its row; what stands before and after it is padding. The rows are
turned until every text comes first. Padding is then on the right only, where an autoregressive
model cannot see it, and every text has the positions 0, 1, ... that it has alone: so a model gives
one likelihood whichever side was padded, and need not know of masks or positions.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ood_monitor.adapters.base import tensors_in
from ood_monitor.adapters.mapped import of_all

__all__ = [
    "check_ends",
    "check_starts",
    "mask_in",
    "moved",
    "padded",
    "run_of",
    "starts_of",
    "text_with_end",
]

#: Keywords of transformers' models that have a value for each token of the text, (B, T).
_PER_TOKEN = frozenset({"attention_mask", "position_ids", "token_type_ids"})

#: Keywords that run along another sequence, whatever their shape.
_OF_SOURCE = frozenset({"encoder_attention_mask", "encoder_hidden_states"})


def mask_in(condition: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """The ``attention_mask`` among a model's keywords as bool, of the tokens' shape; or None.

    Raises:
        ValueError: A mask of another shape, or with values below zero.
    """
    mask = condition.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"Expected an attention_mask of the tokens' shape {tuple(tokens.shape)}, got {found}. "
            "Let the module take a mask of anything else by another keyword."
        )
    if of_all(mask).min() < 0:
        raise ValueError(
            f"Expected an attention_mask of 1 for tokens and 0 for padding, got {mask.min():g}."
        )
    return mask != 0


def text_with_end(tokens: Tensor, padding: int) -> Tensor:
    """Which tokens are text where the padding also ends texts, (B, T), bool.

    The first of the run that follows a text is its end. One between other tokens is text too, as
    the end of a part.
    """
    other = tokens != padding
    begun = other.cumsum(1) > 0
    unfinished = other.flip(1).cumsum(1).flip(1) > 0
    return begun & F.pad(unfinished[:, :-1], (1, 0), value=True)


def check_starts(tokens: Tensor, padding: int) -> None:
    """Refuse the model's end token before a text, where it may start it or fill it up.

    Raises:
        ValueError: There is one.
    """
    unclear = (tokens[:, 0] == padding) & (tokens != padding).any(1)
    if of_all(unclear).any():
        raise ValueError(
            f"Expected no padding={padding} before a text, got it {_told(unclear)}. It also "
            "ends texts and may start them, so it cannot be told whether it starts the text or "
            "fills it up. Give an `attention_mask` by `condition=`."
        )


def check_ends(tokens: Tensor, padding: int) -> None:
    """Refuse a text without an end token, where it was not said that padding is one.

    Padded, the same text would be taken to have ended.

    Raises:
        ValueError: There is one.
    """
    without = tokens[:, -1] != padding
    if of_all(without).any():
        raise ValueError(
            f"Expected texts that end by padding={padding}, the model's end token, got another "
            f"last token {_told(without)}. If texts have no end token of their own pass "
            "padding_is_end=False; if some were cut short, True; or give an `attention_mask` by "
            "`condition=`."
        )


def run_of(text: Tensor) -> Tensor:
    """The same (B, T), bool, if the text of each row is one run of tokens.

    Raises:
        ValueError: There is padding inside a text.
    """
    # Two readings: a prompt and its answer, each filled up, or a word that is to be hidden.
    begins = text & ~F.pad(text[:, :-1], (1, 0), value=False)
    torn = begins.sum(1) > 1
    if of_all(torn).any():
        raise ValueError(
            f"Expected padding before or after a text, got some inside it {_told(torn)}. Move it "
            "to one end of the row; if it is a token of the text, leave `padding=` out and give "
            "an `attention_mask` by `condition=`."
        )
    return text


def starts_of(text: Tensor) -> Tensor:
    """Column of each text's first token, (B,); 0 for a row without text."""
    return (text.cumsum(1) == 0).sum(1) % text.shape[1]


def moved(condition: Mapping[str, Any], start: Tensor, index: Tensor, length: int) -> Any:
    """A model's keywords for tokens of which row i was turned to ``tokens[i, index[i]]``.

    Args:
        condition: The keywords for the tokens as they were.
        start: Column of each text's first token, (B,).
        index: Columns that were taken, (B, width).
        length: How many columns there were.

    Raises:
        ValueError: A keyword that may run along the tokens, but nobody knows how, or positions
            that count the padding.
    """
    found = dict(condition)
    for name, value in condition.items():
        if _is_per_token(name, value, length):
            found[name] = value.expand(len(index), length).gather(1, index)
            if name == "position_ids":
                _check_positions(found[name][:, 0], start)
    return found


def padded(condition: Mapping[str, Any], length: int, left: int, right: int) -> dict[str, Any]:
    """A model's keywords for tokens with more padding.

    Raises:
        ValueError: A keyword that may run along the tokens, but nobody knows how.
    """
    along = {k: v for k, v in condition.items() if _is_per_token(k, v, length)}
    return {**condition, **{name: F.pad(value, (left, right)) for name, value in along.items()}}


def _is_per_token(name: str, value: Any, length: int) -> bool:
    """Whether a keyword has a value for each token.

    Raises:
        ValueError: It cannot be told.
    """
    if name in _OF_SOURCE:
        return False
    along = [tuple(t.shape) for t in tensors_in(value) if length in t.shape[t.ndim > 1 :]]
    known = name in _PER_TOKEN and isinstance(value, Tensor) and value.ndim <= 2
    if along and not known:
        raise ValueError(
            f"Expected padding on the right only beside the keyword {name!r}, got padding before a "
            f"text or beyond the context. It has shape {along[0]} for {length} tokens, so it may "
            "have a value a token, which would have to move with them. Pad on the right."
        )
    return bool(along)


def _check_positions(first: Tensor, start: Tensor) -> None:
    wrong = (start > 0) & (first != 0)
    if of_all(wrong).any():
        raise ValueError(
            "Expected position_ids that count from a text's first token, got "
            f"{int(first[wrong][0])} for the first token {_told(wrong)}, which has padding before "
            "it. Leave position_ids out: texts are moved to the first column."
        )


def _told(rows: Tensor) -> str:
    return f"in {int(rows.sum())} of {len(rows)} rows, first at index {int(rows.int().argmax())}"
