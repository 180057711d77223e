"""Random generators that loaders hold: those of samplers, data sets and transforms."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["kept_generators"]

#: Objects that are looked at, and items of a list: the others are samples.
_MOST_OBJECTS, _MOST_ITEMS = 1_000, 50


@contextmanager
def kept_generators(sources: Iterable[Any]) -> Iterator[None]:
    """Generators that these objects lead to are as before afterwards; those of workers are copies.

    What a data set counts or remembers otherwise is its own matter.
    """
    undo = [_kept(found) for found in _found(sources)]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _found(sources: Iterable[Any]) -> list[Any]:
    queue, seen, found = deque(sources), set[int](), list[Any]()
    while queue and len(seen) < _MOST_OBJECTS:
        value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _KINDS):
            found += [] if isinstance(value, random.SystemRandom) else [value]  # it has no state
        else:
            queue += _parts(value)
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Tensor | np.ndarray | nn.Module | type):
        return []
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _MOST_ITEMS else []
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= _MOST_ITEMS else []
    return list(getattr(value, "__dict__", {}).values())


_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _kept(generator: Any) -> Callable[[], object]:
    """What puts its state back."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits, before = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", before)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    own = generator.getstate()
    return lambda: generator.setstate(own)
