"""A pass that the user makes anyway, listened to: its logits and its layers' inputs are there.

An evaluation of a language model runs the pass that its scoring needs. So the sums of what layers
are given are taken while it runs, and its logits are read afterwards; scoring then runs none.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor.adapters import SequenceLikelihood
from ood_monitor.adapters.base import Adapter, Batch, batch_size, checked_elements, tensors_in
from ood_monitor.adapters.elements import Elements
from ood_monitor.modules import Passes, part_of
from ood_monitor.statistics.expected_norms import known_so_far
from ood_monitor.statistics.hooks import Sums
from ood_monitor.statistics.layers import Layer, first_tensor_of
from ood_monitor.statistics.rows import Single

__all__ = ["LivePass", "live_pass"]

_NOT_HEARD = (
    "the model was not run on the tokens of the batch while `live.listening()`, or its logits were "
    "not told by `live.ended(output.logits)`."
)


class LivePass:
    """A pass of a model over a batch.

    Args:
        adapter: The model, in eval mode.
        batch: What the user is about to give it, B texts.
        layers: Whose inputs are summed.
    """

    def __init__(
        self, adapter: SequenceLikelihood, batch: Batch, layers: Mapping[str, Layer]
    ) -> None:
        self._adapter, self._batch, self._layers = adapter, batch, layers
        counted = adapter.positions(batch)
        self._sums = Sums(adapter.module, layers, batch_size(batch), counted)
        self._logits: Tensor | None = None
        self._failure: Exception | None = None
        self._tokens, self._is_of_batch = adapter.tokens(batch), False

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and gave what scoring needs."""
        is_heard = self._is_of_batch and bool(self._sums.taken)
        return self._logits is not None and self._failure is None and is_heard

    def check(self, batch: Batch) -> None:
        """Refuse a pass that was none of scoring, or over another batch than is to be scored.

        Raises:
            ValueError: It was.
        """
        if not self.is_over:
            raise ValueError(
                f"Expected a pass that scoring can read, got none: {self._failure or _NOT_HEARD}"
            )
        if batch is not self._batch and not _are_same(self._adapter, batch, self._batch):
            raise ValueError(
                "Expected the batch that `detector.live` was given, got one of other tokens or "
                "labels: make a live pass for each batch."
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the sums while the user's own call runs; nothing is raised into that."""
        handles = []
        try:
            for name, layer in self._layers.items():
                hook = functools.partial(self._hear, name, layer)
                part = part_of(self._adapter.module, name)
                handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
            entry = _entry(self._adapter.module)
            handles.append(entry.register_forward_pre_hook(self._hear_tokens, with_kwargs=True))
            with self._sums.taking():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def ended(self, logits: Tensor) -> None:
        """The call has given logits, (B, T, V)."""
        self._logits = logits.detach()

    def single(
        self, passes: Passes[Adapter], of_term: Callable[[str, Tensor | Elements], None]
    ) -> Single:
        """Terms and sums, as a pass of scoring's own would give them.

        Raises:
            ValueError: The model was given other tokens than scoring would give it, or logits are
                of another shape.
        """
        assert self._logits is not None
        view = self._adapter.with_logits(self._logits, self._batch)
        terms: dict[str, Tensor] = {}
        with torch.no_grad():
            for term, value in checked_elements(view, self._batch):
                terms[term] = (value.total() if isinstance(value, Elements) else value).detach()
                of_term(term, value)
        return Single(self._sums.taken, terms)

    # A hook has no keywords where it was taken off while its call had begun, as by a collection of
    # garbage: then nobody listens any more.

    def _hear(
        self, name: str, layer: Layer, module: nn.Module, args: Any, kwargs: Any = None
    ) -> None:
        if self._failure is None and kwargs is not None:
            try:
                _check_mode(module, args, kwargs)
                self._sums._take(name, layer, module, args, kwargs)
            except Exception as error:  # of any kind: the call is the user's
                self._failure = error

    def _hear_tokens(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Whether it is the batch that the model is run on, of which alone its logits are."""
        if kwargs is None:
            return
        own = self._tokens
        given = tensors_in([*args, *kwargs.values()])
        is_own = any(t.shape == own.shape and bool((t == own.to(t.device)).all()) for t in given)
        self._is_of_batch = is_own
        if any(part.training for part in self._adapter.module.modules()):
            self._failure = ValueError("the model is in training mode: call `model.eval()` before.")
        elif not is_own:
            self._failure = ValueError("the model was run on other tokens than those of the batch.")


def _entry(model: nn.Module) -> nn.Module:
    """What is given the tokens in any pass: a tuner may run a model past its own hooks."""
    named: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    found = named() if callable(named) else None
    return found if isinstance(found, nn.Module) else model


def _check_mode(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse a pass of another precision than scoring's.

    Raises:
        ValueError: It is one.
    """
    h = first_tensor_of(args, kwargs)
    if h is not None and torch.is_autocast_enabled(h.device.type):
        raise ValueError("it ran in mixed precision, which scoring is without: leave autocast off.")


def _are_same(adapter: SequenceLikelihood, batch: Batch, other: Batch) -> bool:
    """Whether two batches are the same texts, of which the same tokens are scored."""
    pairs = [(adapter.tokens(each), adapter.positions(each)) for each in (batch, other)]
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(*pairs, strict=True)
    )


def live_pass(adapter: Adapter, batch: Batch, layers: Iterable[str]) -> LivePass | None:
    """What will listen to a pass; None where scoring has to make one of its own.

    Args:
        adapter: The model.
        batch: What the user is about to give it, B texts.
        layers: Names of the layers whose inputs are summed.
    """
    known = known_so_far(adapter)
    if not isinstance(adapter, SequenceLikelihood) or adapter.sample_of(batch) != "sequence":
        return None
    names = list(layers)
    found = {name: known[name] for name in names if name in known}
    return None if len(found) < len(names) else LivePass(adapter, batch, found)
