r"""Autoregressive models of tokens: :math:`\sum_t \log p(x_t | x_{<t})`, of text or of pixels."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    Condition,
    describe,
    first_tensor,
    no_condition,
)

__all__ = ["SequenceLikelihood"]


class SequenceLikelihood(Adapter):
    """Log-likelihood of a sequence under an autoregressive model, summed over its tokens.

    Args:
        module: ``module(tokens, **condition)`` gives logits, or an object with ``.logits``
            (transformers' causal language models).
        shifted: Whether logits at t predict the token at t + 1, as language models' do: the first
            token is given, not predicted. False for models that see to it themselves that logits
            at t come from earlier tokens alone, as PixelCNN's masked convolutions.
        class_dim: The dimension of the logits that runs over the V values of a token: -1 for
            language models, (B, T, V); 1 for images (B, C, H, W), (B, V, C, H, W).
        per_token: Whether to take the mean over the predicted tokens, in nats a token, instead of
            the sum: for sequences of different lengths.
        padding: The token that fills sequences up, if any; it is left out. Tokens that an
            ``attention_mask`` among the keywords hides are left out too.
        inputs: Takes the tokens, integers, shape (B, T) or (B, ...), from a batch as the loader
            yields it.
        condition: Gives the module's further keywords from a batch.
        scale: What the module takes for the tokens, if not themselves: pixels as real numbers.

    References:
        | A Neural Probabilistic Language Model (Bengio et al., 2003)
        | https://www.jmlr.org/papers/v3/bengio03a.html
        | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016)
        | https://arxiv.org/abs/1601.06759

    Example:
        >>> bigram = nn.Embedding(5, 5)
        >>> adapter = SequenceLikelihood(bigram, padding=0)
        >>> terms = adapter.log_likelihood(torch.tensor([[3, 1, 4], [2, 4, 0]]))
        >>> [(term, tuple(value.shape)) for term, value in terms]
        [('log_likelihood', (2,))]
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shifted: bool = True,
        class_dim: int = -1,
        per_token: bool = False,
        padding: int | None = None,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        condition: Condition = no_condition,
        scale: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    ) -> None:
        self.module = module
        self._shifted, self._class_dim, self._per_token = shifted, class_dim, per_token
        self._padding, self._inputs, self._condition = padding, inputs, condition
        self._scale = scale

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield one term, of shape (B,), in nats.

        Raises:
            ValueError: What are no tokens, a sequence longer than the model's context or without a
                token to predict, or logits of another shape.
        """
        tokens, condition = self._inputs(batch), self._condition(batch)
        self._check(tokens)
        counted = self._counted(tokens, condition)
        output = self.module(self._scale(tokens), **condition)
        logits = self._checked_logits(getattr(output, "logits", output), tokens)
        if self._shifted:
            logits, tokens, counted = logits[:, :-1], tokens[:, 1:], counted[:, 1:]
        log_p = logits.log_softmax(-1).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
        total = torch.where(counted, log_p, torch.zeros_like(log_p)).flatten(1).sum(1)
        yield "log_likelihood", total / counted.flatten(1).sum(1) if self._per_token else total

    def _check(self, tokens: Tensor) -> None:
        length = 2 if self._shifted else 1
        dimensions_hold = tokens.ndim == 2 if self._shifted else tokens.ndim >= 2
        if tokens.is_floating_point() or not dimensions_hold or tokens.shape[1] < length:
            raise ValueError(
                f"Expected integer tokens (B, T) with T >= {length}, got {describe(tokens)}."
            )
        if tokens.min() < 0:
            raise ValueError(f"Expected tokens from 0 on, got {int(tokens.min())}.")
        context = _context(self.module)
        if self._shifted and tokens.shape[1] > context:
            raise ValueError(
                f"Expected sequences of at most {context} tokens, the context of "
                f"{type(self.module).__name__}, got {tokens.shape[1]}."
            )

    def _counted(self, tokens: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """Which tokens are not padding, of their shape, bool.

        Raises:
            ValueError: A sequence has none to predict.
        """
        counted = torch.ones_like(tokens, dtype=torch.bool)
        if self._padding is not None:
            counted = tokens != self._padding
        if condition.get("attention_mask") is not None:
            counted = counted & (condition["attention_mask"] != 0)
        predicted = counted[:, 1:] if self._shifted else counted
        empty = ~predicted.flatten(1).any(1)
        if empty.any():
            raise ValueError(
                "Expected a token to predict in every sequence, got padding only in "
                f"{int(empty.sum())} of {len(tokens)}, first at index {int(empty.int().argmax())}."
            )
        return counted

    def _checked_logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logits with their classes last, shape (*tokens.shape, V)."""
        moved = logits.movedim(self._class_dim, -1) if logits.ndim == tokens.ndim + 1 else logits
        vocabulary = int(tokens.max()) + 1
        if moved.shape[:-1] != tokens.shape or moved.shape[-1] < vocabulary:
            raise ValueError(
                f"Expected logits of shape {tuple(tokens.shape)} and V >= {vocabulary} values in "
                f"dimension {self._class_dim}, got {tuple(logits.shape)}."
            )
        return moved


def _context(module: nn.Module) -> float:
    """The longest sequence that a transformers model says it takes."""
    length = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return length if isinstance(length, int) else math.inf
