"""What a pass over samples gives, before anything is fitted: to keep, gather and put in order."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_monitor.densities import Array

__all__ = ["Measurements"]

_NAMES = ("terms", "features", "samples", "groups")


@dataclass(frozen=True)
class Measurements:
    """Terms and gradient norms of N samples of one model.

    Attributes:
        terms: Names of the likelihood's terms, T of them.
        log_likelihood: (N, T), nats.
        features: Names of the norms, "term/parameter" or "term/parameter[row]", F of them.
        norms: (N, F), squared.
        samples: Shape and type of each tensor of a batch, without B; empty if they varied.
        groups: The group of each sample, or none.
    """

    terms: tuple[str, ...]
    log_likelihood: Array
    features: tuple[str, ...]
    norms: Array
    samples: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.norms)

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """The samples of several passes, one after the other.

        Raises:
            ValueError: No part, or parts of other terms and layers than the first.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Expected held-out batches, got an empty loader.")
        first, kinds = parts[0], {part.samples for part in parts}
        if any((part.terms, part.features) != (first.terms, first.features) for part in parts):
            raise ValueError("Expected samples of the same terms and layers, got different ones.")
        return cls(
            first.terms,
            np.concatenate([part.log_likelihood for part in parts]),
            first.features,
            np.concatenate([part.norms for part in parts]),
            kinds.pop() if len(kinds) == 1 else (),
            tuple(group for part in parts for group in part.groups),
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Some of the samples, in the order of their indices."""
        indices = np.asarray(indices, dtype=np.int64)
        groups = tuple(self.groups[i] for i in indices) if self.groups else ()
        values, norms = self.log_likelihood[indices], self.norms[indices]
        return type(self)(self.terms, values, self.features, norms, self.samples, groups)

    def dump(self) -> bytes:
        """All of it as safetensors, to send to another process or to keep in a file."""
        names = json.dumps({name: getattr(self, name) for name in _NAMES})
        arrays = {"log_likelihood": self.log_likelihood, "norms": self.norms}
        return save({**arrays, "names": np.frombuffer(names.encode(), dtype=np.uint8)})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What :meth:`dump` gave.

        Raises:
            ValueError: Something else, or a damaged part of it.
        """
        try:
            arrays = load(data)
            names = json.loads(arrays["names"].tobytes())
            terms, features, samples, groups = (tuple(names[name]) for name in _NAMES)
            values, norms = arrays["log_likelihood"], arrays["norms"]
            return cls(terms, values, features, norms, samples, groups)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected measured samples, got {error!r}.") from error
