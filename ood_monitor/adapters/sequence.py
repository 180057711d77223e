r"""Autoregressive models of token sequences: :math:`\sum_t \log p(x_t | x_{<t})`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter, Batch, describe, first_tensor

__all__ = ["SequenceLikelihood"]


class SequenceLikelihood(Adapter):
    """Log-likelihood of a sequence under a causal model, summed over its tokens.

    Args:
        module: ``module(tokens)`` gives logits (B, T, V), or an object with ``.logits``
            (transformers' causal language models); logits at t predict the token at t + 1.
        inputs: Takes the tokens, shape (B, T), integers, from a batch as the loader yields it.
        padding: The token to leave out, if any.

    References:
        A Neural Probabilistic Language Model (Bengio et al., 2003),
        https://www.jmlr.org/papers/v3/bengio03a.html
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        padding: int | None = None,
    ) -> None:
        self.module = module
        self._inputs, self._padding = inputs, padding

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield one term, of shape (B,), in nats; the first token is given, not predicted."""
        tokens = self._inputs(batch)
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(f"Expected integer tokens (B, T) with T >= 2, got {describe(tokens)}.")
        output = self.module(tokens)
        logits = _checked(getattr(output, "logits", output), tokens)
        following = tokens[:, 1:].long().unsqueeze(-1)
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1)
        if self._padding is not None:
            log_p = torch.where(tokens[:, 1:] == self._padding, torch.zeros_like(log_p), log_p)
        yield "log_likelihood", log_p.sum(1)


def _checked(logits: Tensor, tokens: Tensor) -> Tensor:
    vocabulary = int(tokens.max()) + 1
    shape = tuple(tokens.shape)
    if logits.shape[:-1] != tokens.shape or logits.shape[-1] < vocabulary:
        raise ValueError(
            f"Expected logits ({shape[0]}, {shape[1]}, V) with V >= {vocabulary}, got "
            f"{tuple(logits.shape)}."
        )
    return logits
