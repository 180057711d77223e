r"""Autoregressive models of tokens: :math:`\sum_t \log p(x_t | x_{<t})`, of text or of pixels."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    Condition,
    SampleKind,
    checked_sample,
    describe,
    images_in,
    keywords_of,
    map_tensors,
)
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.laws import categorical
from ood_monitor.adapters.mapped import of_all
from ood_monitor.adapters.padding import (
    check_ends,
    check_starts,
    mask_in,
    moved,
    padded,
    run_of,
    starts_of,
    text_with_end,
)
from ood_monitor.adapters.tokens import condition_in, labels_in, scored_by, tokens_in
from ood_monitor.checks import flag, function, whole
from ood_monitor.modules import Passes, scored

__all__ = ["SequenceLikelihood"]


@dataclass(frozen=True)
class _Given:
    """What the module is given of a batch.

    Attributes:
        tokens: Shape (B, T) or (B, ...).
        text: Which are no padding, bool, of that shape.
        counted: Which are neither padding nor a prompt nor ignored, bool, of that shape.
        condition: Keywords.
    """

    tokens: Tensor
    text: Tensor
    counted: Tensor
    condition: Mapping[str, Any]


class SequenceLikelihood(Adapter):
    """Log-likelihood of a sequence under an autoregressive model, summed over its tokens.

    A text has the same likelihood alone, in any batch, and padded to any width on either side. Rows
    are turned so that every text begins in the first column. There its tokens have the positions
    that they have alone, and see no padding.

    Args:
        module: ``module(tokens, **condition)`` gives logits, or an object with ``.logits``
            (transformers' causal language models). If its ``forward`` names ``use_cache``, it is
            False. If a transformers model names ``attention_mask``, it gets one where there is
            padding. What ``condition`` gives has precedence.
        shifted: Whether logits at t predict the token at t + 1, as in language models: the first
            token is then given, not predicted. False for models whose logits at t come from earlier
            tokens alone, such as those with PixelCNN's masked convolutions.
        class_dim: The dimension of the logits that runs over the V values of a token: -1 for
            language models, (B, T, V); 1 for images (B, C, H, W), (B, V, C, H, W).
        per_token: Whether to take the mean over the predicted tokens, in nats a token, instead of
            the sum: for sequences of different lengths.
        padding: The token that fills sequences up, before a text or after it; it is not scored. If
            the keywords hold an ``attention_mask`` of shape (B, T), the mask alone says what is
            text, 1, and what is padding, 0.
        padding_is_end: Whether ``padding`` is also the token that ends a text, as is usual with
            GPT-2. Without a mask, the first padding token after a text then belongs to it. Say
            False if texts are padded by it but have no end token. By default it is True if the
            module's ``config`` calls it an ``eos_token_id``; then every text must end by it.
        given: How many tokens at the beginning of a text are a prompt, which is not scored; the
            others are predicted given these. A number, or a function that takes integers of shape
            (B,) from a batch. They count from the text's first token, after any padding.
        ignore_index: The label of tokens that are not scored, -100 in transformers' collators, such
            as those of a prompt, whatever their place in the text. All other labels are the tokens
            themselves, not shifted, as causal models of transformers take them.
        labels: A function that takes the labels, of the tokens' shape, from a batch; by default
            its ``"labels"``.
        inputs: Takes the tokens, integers, shape (B, T) or (B, ...), from a batch as the loader
            yields it; by default its ``"input_ids"`` if it is a mapping, else as the other
            adapters do.
        condition: Gives the module's further keywords from a batch; by default the
            ``"attention_mask"`` of a mapping, if it has one.
        scale: What the module takes for the tokens, if not themselves: pixels as real numbers.
        sample: What a sample is. By default ``"sequence"`` for tokens (B, T), and ``"image"`` for
            those of grey or colour images, (B, C, H, W).

    References:
        | A Neural Probabilistic Language Model (Bengio et al., 2003)
        | https://www.jmlr.org/papers/v3/bengio03a.html
        | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016)
        | https://arxiv.org/abs/1601.06759

    Raises:
        ValueError: ``padding_is_end`` goes without a ``padding``, or ``sample`` is no kind.
        TypeError: An option of another type.

    Example:
        >>> bigram = nn.Embedding(5, 5)
        >>> adapter = SequenceLikelihood(bigram, padding=0)
        >>> [(term, tokens)] = adapter.log_likelihood(torch.tensor([[3, 1, 4], [2, 4, 0]]))
        >>> term, tuple(tokens.log_prob.shape), tuple(tokens.total().shape)
        ('log_likelihood', (2, 2), (2,))
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shifted: bool = True,
        class_dim: int = -1,
        per_token: bool = False,
        padding: int | None = None,
        padding_is_end: bool | None = None,
        given: int | Callable[[Batch], Tensor] = 0,
        ignore_index: int | None = None,
        labels: Callable[[Batch], Tensor] = labels_in,
        inputs: Callable[[Batch], Tensor] = tokens_in,
        condition: Condition = condition_in,
        scale: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        sample: SampleKind | None = None,
    ) -> None:
        if padding_is_end and padding is None:
            raise ValueError("Expected `padding=` with padding_is_end=True, got none.")
        self.module = module
        self._shifted, self._per_token = flag("shifted", shifted), flag("per_token", per_token)
        self._class_dim = whole("class_dim", class_dim, None)
        # Any whole number: some mark what is no token by one below 0.
        self._padding = None if padding is None else whole("padding", padding, None)
        is_end = None if padding_is_end is None else flag("padding_is_end", padding_is_end)
        self._padding_is_end = is_end
        self._given = given if callable(given) else whole("given", given)
        # Any whole number, as of padding.
        self._ignored = None if ignore_index is None else whole("ignore_index", ignore_index, None)
        self._labels = function("labels", labels)
        self._inputs, self._condition = function("inputs", inputs), function("condition", condition)
        self._scale = function("scale", scale)
        self.sample = checked_sample(sample)
        self._vocabulary: int | None = None  # unknown until images are asked for
        self._passed: tuple[Tensor, Tensor | None, Tensor] | None = None

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Elements]]:
        """Yield one term, whose elements are the tokens that are predicted, in nats.

        Of tokens (B, T) they are (B, T - 1) if shifted, of texts from their first token on.

        Raises:
            ValueError: What are no tokens, a text longer than the model's context or without a
                token to predict, padding that leaves open what the text is, given tokens that are
                no numbers from 0 on, one a text, labels that are other tokens, several texts in one
                row, or logits of another shape.

        Warns:
            UserWarning: Whether the padding token also ends texts is not known: a transformers
                model that names neither its end token nor this padding token.
        """
        given = self._given_to_module(batch)
        tokens, counted, logits = given.tokens, given.counted, self._logits(given)
        if self._shifted:
            logits, tokens, counted = logits[:, :-1], tokens[:, 1:], counted[:, 1:]
        is_image = self.sample_of(batch) == "image" and tokens.ndim > 2
        last_two = (tokens.ndim - 2, tokens.ndim - 1)
        axes = (1,) if tokens.ndim == 2 else last_two if is_image else ()
        options = {"counted": counted, "mean": self._per_token, "axes": axes}
        yield "log_likelihood", categorical(logits, tokens, **options)

    def sample_of(self, batch: Batch) -> SampleKind | None:
        """As said, or by the tokens: a sequence (B, T), an image (B, C, H, W) or (B, H, W)."""
        if self.sample is not None:
            return self.sample
        tokens = self._inputs(batch)
        if tokens.ndim == 2:
            return "sequence"
        has_channels = tokens.ndim == 4 and tokens.shape[1] in (1, 3)
        # Of three dimensions, a class dimension before two others says that these are places.
        is_grey = tokens.ndim == 3 and self._class_dim == 1 and not self._shifted
        return "image" if has_channels or is_grey else None

    def images(self, batch: Batch) -> Tensor | None:
        """Pixels of V values as real numbers from 0 to 1, in single precision.

        V is told by the logits: by a pass of one sample, when images are first asked for.
        """
        kind, tokens = self.sample_of(batch), self._inputs(batch)
        if kind != "image" or tokens.ndim not in (3, 4):
            return None
        pixels = tokens.float() if tokens.ndim == 4 else tokens.float().unsqueeze(1)
        if self._vocabulary is None:
            self._vocabulary = self._values_of_a_token(batch)
        return images_in(pixels, kind, (0.0, max(1.0, self._vocabulary - 1.0)))

    def tokens(self, batch: Batch) -> Tensor:
        """What the module is given for the tokens of a batch as they stand, (B, T) or (B, ...)."""
        return self._scale(self._inputs(batch))

    def texts(self, batch: Batch) -> list[Tensor] | None:
        """The tokens of each text, prompt included, without padding; None for images."""
        given = self._given_to_module(batch)
        if given.tokens.ndim != 2 or self.sample_of(batch) != "sequence":
            return None
        return [row[text] for row, text in zip(given.tokens, given.text, strict=True)]

    def positions(self, batch: Batch) -> Tensor | None:
        """Which tokens are neither padding nor prompt, bool, of texts from their first token on.

        Of shape (B, T), with T the columns that the module is given; the first token of a text is
        among them, although it is not predicted where logits are shifted. None for images.
        """
        given = self._given_to_module(batch)
        return given.counted if given.tokens.ndim == 2 else None

    def _given_to_module(self, batch: Batch) -> _Given:
        tokens, condition = self._inputs(batch), self._condition(batch)
        self._check(tokens)
        text = self._text(tokens, condition)
        scored = self._scored(batch, tokens)
        if tokens.ndim == 2:
            tokens, text, scored, condition = self._text_first(tokens, text, scored, condition)
        counted = self._counted(text, scored, self._given_in(batch, tokens))
        return _Given(tokens, text, counted, condition)

    def _scored(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Which tokens no label leaves out, bool, of their shape."""
        if self._ignored is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return scored_by(self._labels(batch), tokens, self._ignored)

    def with_logits(self, logits: Tensor, batch: Batch) -> Self:
        """A copy that takes logits of a pass over a batch's tokens, and makes none.

        Args:
            logits: What the model gave, (B, T, V).
            batch: What it was given: its tokens as they are, and its mask, if any.
        """
        other = copy.copy(self)
        mask = self._condition(batch).get("attention_mask")
        other._passed = self._inputs(batch), mask, logits
        return other

    def _passed_logits(self, given: _Given) -> Tensor:
        """Those that were told, of the same tokens.

        Raises:
            ValueError: They are of others, as where padding comes before a text.
        """
        assert self._passed is not None
        tokens, mask, logits = self._passed
        is_same = tokens.shape == given.tokens.shape and torch.equal(tokens, given.tokens)
        if not is_same or (mask is not None and not torch.equal(mask != 0, given.text)):
            raise ValueError(
                f"Expected logits of the tokens that are scored, {describe(given.tokens)}, got "
                f"logits of others, {describe(tokens)}: texts were moved to the first column."
            )
        return self._checked_logits(logits, given.tokens)

    def _logits(self, given: _Given) -> Tensor:
        """Of shape (*tokens.shape, V)."""
        if self._passed is not None:
            return self._passed_logits(given)
        keywords = self._keywords(given.condition, given.text)
        output = self.module(self._scale(given.tokens), **keywords)
        first = output[0] if type(output) is tuple and output else output  # beside a loss or states
        return self._checked_logits(getattr(first, "logits", first), given.tokens)

    def _values_of_a_token(self, batch: Batch) -> int:
        def size(passes: Passes[Self]) -> int:
            adapter = passes.fresh()
            with torch.no_grad():
                first = map_tensors(lambda tensor: tensor[:1].clone(), batch)
                return adapter._logits(adapter._given_to_module(first)).shape[-1]

        return scored(size, self, self.module)

    def padded_length(self, batch: Batch) -> int | None:
        """T of tokens (B, T) that padding may fill up to any width, or None.

        None where nothing tells padding from text, neither ``padding`` nor a mask nor labels, and
        for images.
        """
        tokens = self._inputs(batch)
        told = self._padding is not None or self._ignored is not None
        told = told or self._condition(batch).get("attention_mask") is not None
        return tokens.shape[1] if told and tokens.ndim == 2 else None

    def with_padding(self, *, left: int = 0, right: int = 0) -> Self:
        """A copy that adds columns of padding to every batch: to see that they change nothing.

        Args:
            left: How many columns before the first.
            right: How many after the last.
        """
        left, right = whole("left", left), whole("right", right)
        other, fill = copy.copy(self), self._padding or 0
        other._inputs = lambda batch: F.pad(self._inputs(batch), (left, right), value=fill)
        other._condition = lambda batch: padded(
            self._condition(batch), self._inputs(batch).shape[1], left, right
        )
        if (ignored := self._ignored) is not None:
            other._labels = lambda batch: F.pad(self._labels(batch), (left, right), value=ignored)
        return other

    def _check(self, tokens: Tensor) -> None:
        length = 2 if self._shifted else 1
        dimensions_hold = tokens.ndim == 2 if self._shifted else tokens.ndim >= 2
        if tokens.is_floating_point() or not dimensions_hold or tokens.shape[1] < length:
            raise ValueError(
                f"Expected integer tokens (B, T) with T >= {length}, got {describe(tokens)}."
            )
        if of_all(tokens).min() < 0:
            raise ValueError(f"Expected tokens from 0 on, got {int(tokens.min())}.")

    def _text(self, tokens: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """Which tokens are not padding, of their shape, bool."""
        mask, padding = mask_in(condition, tokens), self._padding
        if padding is None:
            return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if mask is None:
            return self._told_by_padding(tokens, padding)
        if not self._is_end and of_all(mask & (tokens == padding)).any():
            raise ValueError(
                f"Expected an attention_mask that hides padding={padding}, got one that shows it. "
                "If it also ends texts pass padding_is_end=True; or leave `padding=` out, and the "
                "mask alone counts."
            )
        return mask

    def _told_by_padding(self, tokens: Tensor, padding: int) -> Tensor:
        """As :meth:`_text`, without a mask."""
        if tokens.ndim > 2:
            return tokens != padding
        self._warn_of_unknown_end()
        if not self._is_end:
            return tokens != padding
        starts = _ids(self.module, "bos_token_id")
        if not starts or padding in starts:
            check_starts(tokens, padding)
        if self._padding_is_end is None:
            check_ends(tokens, padding)
        return text_with_end(tokens, padding)

    @property
    def _is_end(self) -> bool:
        """Whether the padding token also ends a text."""
        is_end = self._padding_is_end
        return self._padding in _ids(self.module, "eos_token_id") if is_end is None else is_end

    def _warn_of_unknown_end(self) -> None:
        config = getattr(self.module, "config", None)
        is_named = getattr(config, "pad_token_id", None) == self._padding
        if config is None or self._padding_is_end is not None or is_named:
            return
        if not _ids(self.module, "eos_token_id"):
            warnings.warn(
                f"padding={self._padding} is taken for a token that is in no text, but the model's "
                "config names no end token of its vocabulary. If texts end by it pass "
                "padding_is_end=True, since else their end is left out; if not, False. [OOD115]",
                stacklevel=2,
            )

    def _text_first(
        self, tokens: Tensor, text: Tensor, scored: Tensor, condition: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Any]]:
        """All four with every text's first token in the first column, within the context."""
        start, length = starts_of(run_of(text)), tokens.shape[1]
        width = min(length, self._width(text.sum(1)))
        if width == length and not of_all(start).any():
            return tokens, text, scored, condition
        columns = torch.arange(width, device=tokens.device)
        index = (columns + start.unsqueeze(1)) % length
        condition = moved(condition, start, index, length)
        tokens, text, scored = (each.gather(1, index) for each in (tokens, text, scored))
        return tokens, text, scored, condition

    def _width(self, lengths: Tensor) -> int:
        """The most columns that a model takes for texts of these lengths, (B,)."""
        longest, context = int(of_all(lengths).max()), _context(self.module)
        if self._shifted and longest > context:
            raise ValueError(
                f"Expected sequences of at most {context} tokens, the context of "
                f"{type(self.module).__name__}, got {longest}."
            )
        switch = _rotary_switch(self.module)
        if longest > switch >= of_all(lengths).min():
            raise ValueError(
                f"Expected texts all of at most {switch} tokens or all longer, got lengths from "
                f"{int(lengths.min())} to {longest}: {type(self.module).__name__} embeds positions "
                "in another way for a whole batch with a longer one. Sort texts by length."
            )
        most = max(longest, context)
        return min(switch, most) if longest <= switch else most

    def _given_in(self, batch: Batch, tokens: Tensor) -> Tensor | int:
        """Lengths of the prompts, (B, 1), or one for all."""
        given = self._given(batch) if callable(self._given) else self._given
        if isinstance(given, int) and given == 0:
            return 0
        one_each = given.shape == tokens.shape[:1] if isinstance(given, Tensor) else True
        if tokens.ndim > 2 or not one_each or not isinstance(given, int | Tensor):
            raise ValueError(
                f"Expected given tokens as integers ({len(tokens)},), one number a text of tokens "
                f"(B, T), got {describe(given)} for {describe(tokens)}."
            )
        number = torch.as_tensor(given, device=tokens.device)
        if number.is_floating_point() or number.dtype == torch.bool or of_all(number).min() < 0:
            raise ValueError(
                "Expected given tokens as integers from 0 on, got "
                f"{number.min().item()} of {number.dtype}."
            )
        return number.view(-1, 1)

    def _counted(self, text: Tensor, scored: Tensor, given: Tensor | int) -> Tensor:
        """Which tokens are predicted, bool, of the shape of a text that comes first in its row.

        Raises:
            ValueError: A sequence has none to predict.
        """
        counted = text & scored
        if text.ndim == 2:
            counted = counted & (torch.arange(text.shape[1], device=text.device) >= given)
        predicted = counted[:, 1:] if self._shifted else counted
        empty = ~predicted.flatten(1).any(1)
        if of_all(empty).any():
            raise ValueError(
                "Expected a token to predict in every sequence, got padding only, one token or "
                f"only given or ignored ones in {int(empty.sum())} of {len(text)}, first at index "
                f"{int(empty.int().argmax())}."
            )
        return counted

    def _keywords(self, condition: Mapping[str, Any], text: Tensor) -> dict[str, Any]:
        """What the module takes beside the tokens: the condition, and what its forward names."""
        forward = getattr(self.module, "_orig_mod", self.module).forward  # under torch.compile
        named, found = keywords_of(forward) or {}, dict(condition)
        if "use_cache" in named:
            found.setdefault("use_cache", False)
        # Only of transformers' models is it known that the mask is that of padding, (B, T).
        is_theirs = getattr(self.module, "config", None) is not None
        is_missing = "attention_mask" in named and found.get("attention_mask") is None
        if is_theirs and is_missing and text.ndim == 2 and not of_all(text).all():
            found["attention_mask"] = text.long()
        return found

    def _checked_logits(self, logits: Any, tokens: Tensor) -> Tensor:
        """Logits with their classes last, shape (*tokens.shape, V)."""
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"Expected {type(self.module).__name__} to give logits, a tensor, the first of a "
                f"tuple, or what has them as `.logits`, got {type(logits).__name__}."
            )
        moved = logits.movedim(self._class_dim, -1) if logits.ndim == tokens.ndim + 1 else logits
        vocabulary = int(of_all(tokens).max()) + 1
        if moved.shape[:-1] != tokens.shape or moved.shape[-1] < vocabulary:
            raise ValueError(
                f"Expected logits of shape {tuple(tokens.shape)} and V >= {vocabulary} values in "
                f"dimension {self._class_dim}, got {tuple(logits.shape)}."
            )
        return moved


def _context(module: nn.Module) -> int:
    """The longest sequence that a transformers model says it takes."""
    config = getattr(module, "config", None)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    # XLNet says -1 for no bound.
    return next((n for n in found if isinstance(n, int) and n > 0), sys.maxsize)


def _rotary_switch(module: nn.Module) -> int:
    """The width above which a model embeds all positions in another way (LongRoPE, Phi-3)."""
    config = getattr(module, "config", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rotary, dict) or rotary.get("rope_type", rotary.get("type")) != "longrope":
        return sys.maxsize
    name = "original_max_position_embeddings"
    length = rotary.get(name) or getattr(config, name, None)
    return length if isinstance(length, int) else sys.maxsize


def _ids(module: nn.Module, name: str) -> list[int]:
    """The special tokens of a name in a transformers model's config, those of its vocabulary."""
    config = getattr(module, "config", None)
    ids, size = getattr(config, name, None), getattr(config, "vocab_size", None)
    listed = ids if isinstance(ids, list | tuple) else [ids]
    limit = size if isinstance(size, int) else sys.maxsize
    return [i for i in listed if isinstance(i, int) and 0 <= i < limit]
