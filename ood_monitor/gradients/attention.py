"""`nn.MultiheadAttention` in operations that have rules.

PyTorch's own runs time-first inside, where a sample's positions are not together.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["multi_head_attention"]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    average_attn_weights: bool = True,
    **others: Any,
) -> Any:
    """As :func:`torch.nn.functional.multi_head_attention_forward`, batch-first inside.

    Returns:
        Output (L, B, E) and attention weights or None; NotImplemented for a variant left out.
    """
    extended = bias_k is not None or add_zero_attn or others.get("static_k") is not None
    if query.ndim != 3 or extended or (training and dropout_p > 0):
        return NotImplemented
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        weights = in_proj_weight
    q, k, v = _projected((query, key, value), weights, in_proj_bias, num_heads)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    attention = (logits + _mask(logits, attn_mask, key_padding_mask)).softmax(3)
    joined = (attention @ v).transpose(1, 2).flatten(2)
    output = F.linear(joined, out_proj_weight, out_proj_bias).transpose(0, 1)
    averaged = attention.mean(1) if average_attn_weights else attention
    return output, averaged if need_weights else None


def _projected(
    inputs: tuple[Tensor, ...], weights: Any, biases: Tensor | None, heads: int
) -> list[Tensor]:
    """Queries, keys and values, (B, heads, T, E / heads) each."""
    batch_first = [x.transpose(0, 1) for x in inputs]
    if isinstance(weights, Tensor) and inputs[0] is inputs[1] is inputs[2]:
        projected = F.linear(batch_first[0], weights, biases).chunk(3, -1)
    else:
        each = weights.chunk(3) if isinstance(weights, Tensor) else weights
        offsets = (None, None, None) if biases is None else biases.chunk(3)
        projected = tuple(map(F.linear, batch_first, each, offsets))
    return [x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in projected]


def _mask(logits: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor:
    """What is added to the logits (B, heads, L, S)."""
    mask = logits.new_zeros(())
    if attention is not None:
        shape = (-1, *logits.shape[1:]) if attention.ndim == 3 else attention.shape
        mask = mask + _additive(attention, logits.dtype).reshape(shape)
    if padding is not None:
        mask = mask + _additive(padding, logits.dtype)[:, None, None, :]
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a boolean mask forbids."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
