"""What passes over samples give, before anything is fitted: to keep, gather and put in order."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_monitor.adapters.base import SampleKind
from ood_monitor.densities.base import Array

__all__ = [
    "GRADIENT_NORMS",
    "Explaining",
    "Measurements",
    "Table",
    "dropped_by",
    "told_difference",
]

#: The table of squared gradient norms.
GRADIENT_NORMS = "gradient_norms"

_NAMES = ("terms", "samples", "groups", "names")


@dataclass(frozen=True)
class Table:
    """Named columns of N samples.

    Attributes:
        names: Of the columns, F of them.
        values: (N, F).
    """

    names: tuple[str, ...]
    values: Array

    def take(self, indices: np.ndarray) -> Self:
        """Some of the samples, in the order of their indices."""
        return type(self)(self.names, self.values[indices])

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """The samples of several tables of the same columns, one after the other."""
        return cls(parts[0].names, np.concatenate([part.values for part in parts]))


@dataclass(frozen=True)
class Explaining:
    """What explains other samples by layer and by place, of the first held-out ones.

    Attributes:
        norms: Squared gradient norms "term/parameter" of these samples; None if there are none.
        places: Of each term that comes by element its surprise by place, ``(n, *places)``, nats.
        without: Why there are no norms, in words.
        count: n.
    """

    norms: Table | None
    places: Mapping[str, Array]
    count: int
    without: str = ""

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self | None:
        """The samples of several passes; places of other sizes than the first's are left out."""
        if not parts:
            return None
        tables = [part.norms for part in parts if part.norms is not None]
        places = {
            term: np.concatenate([part.places[term] for part in parts])
            for term, first in parts[0].places.items()
            if all(p.places[term].shape[1:] == first.shape[1:] for p in parts)
        }
        return cls(
            Table.together(tables) if len(tables) == len(parts) else None,
            places,
            sum(part.count for part in parts),
            next((part.without for part in parts if part.without), ""),
        )

    def _dump(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Names, JSON-able, and arrays."""
        told: dict[str, Any] = {"count": self.count, "without": self.without}
        told["places"], arrays = list(self.places), {}
        if self.norms is not None:
            told["norms"], arrays["norms"] = self.norms.names, self.norms.values
        return told, arrays | {f"places.{term}": values for term, values in self.places.items()}

    @classmethod
    def _parse(cls, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> Self:
        """Of what :meth:`_dump` gave, whose arrays are named "explaining.NAME"."""
        places = {term: arrays[f"explaining.places.{term}"] for term in told["places"]}
        has_norms = "norms" in told
        norms = Table(tuple(told["norms"]), arrays["explaining.norms"]) if has_norms else None
        return cls(norms, places, int(told["count"]), str(told["without"]))


@dataclass(frozen=True)
class Measurements:
    """Terms and statistics of N samples of one model.

    Attributes:
        terms: Names of the likelihood's terms, T of them; none where no part is of the likelihood.
        log_likelihood: (N, T), nats.
        tables: Columns by what they are of: squared gradient norms under ``"gradient_norms"``,
            named "term/parameter" or "term/parameter[row]"; what one forward pass gives under the
            kinds of :class:`~ood_monitor.Part`.
        samples: Shape and type of each tensor of a batch, without B; empty if they varied.
        groups: The group of each sample, or none.
        sample: What a sample is, as the adapter said, or None.
        explaining: What is to explain others, of some of the samples, or None.
        conditions: By name of what the model was told beside samples, the fingerprints of its
            different values, in order.
        names: What tells each sample from all others, by its contents, or none.
    """

    terms: tuple[str, ...]
    log_likelihood: Array
    tables: Mapping[str, Table] = field(default_factory=lambda: MappingProxyType({}))
    samples: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    sample: SampleKind | None = None
    explaining: Explaining | None = None
    conditions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.log_likelihood)

    @property
    def total(self) -> Array:
        """The log-likelihood (N,), nats; nan where no term of it was measured."""
        if not self.terms:
            return np.full(len(self), np.nan)
        return np.asarray(self.log_likelihood.sum(1))

    @classmethod
    def of_norms(
        cls,
        terms: tuple[str, ...],
        log_likelihood: Array,
        features: tuple[str, ...],
        norms: Array,
    ) -> Self:
        """Of squared gradient norms (N, F) alone, named "term/parameter"."""
        return cls(terms, log_likelihood, {GRADIENT_NORMS: Table(features, norms)})

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the gradient norms."""
        return self.tables[GRADIENT_NORMS].names

    @property
    def norms(self) -> Array:
        """Squared gradient norms, (N, F)."""
        return self.tables[GRADIENT_NORMS].values

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """The samples of several passes, one after the other.

        Raises:
            ValueError: No part, or parts of other terms and layers than the first.
        """
        parts = list(parts)
        if not parts:
            raise ValueError(
                "Expected held-out batches, got an empty loader: an iterator gives "
                "its batches once, so give a list or a loader."
            )
        first, kinds = parts[0], {part.samples for part in parts}
        if any(part._columns() != first._columns() for part in parts):
            raise ValueError("Expected samples of the same terms and layers, got different ones.")
        return cls(
            first.terms,
            np.concatenate([part.log_likelihood for part in parts]),
            {name: Table.together([p.tables[name] for p in parts]) for name in first.tables},
            _alike(kinds),
            tuple(group for part in parts for group in part.groups),
            first.sample,
            Explaining.together([it for part in parts if (it := part.explaining) is not None]),
            _different([part.conditions for part in parts]),
            tuple(name for part in parts for name in part.names),
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Some of the samples, in the order of their indices; what explains stays."""
        indices = np.asarray(indices, dtype=np.int64)
        groups = tuple(self.groups[i] for i in indices) if self.groups else ()
        names = tuple(self.names[i] for i in indices) if self.names else ()
        tables = {name: table.take(indices) for name, table in self.tables.items()}
        values = self.log_likelihood[indices]
        return replace(self, log_likelihood=values, tables=tables, groups=groups, names=names)

    def dump(self) -> bytes:
        """All of it as safetensors, to send to another process or to keep in a file."""
        names: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        names["tables"] = {name: table.names for name, table in self.tables.items()}
        names["sample"], names["conditions"] = self.sample, dict(self.conditions)
        arrays = {f"table.{name}": table.values for name, table in self.tables.items()}
        arrays["log_likelihood"] = self.log_likelihood
        if self.explaining is not None:
            names["explaining"], own = self.explaining._dump()
            arrays |= {f"explaining.{name}": array for name, array in own.items()}
        text = np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save({**arrays, "names": text})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What :meth:`dump` gave.

        Raises:
            ValueError: Something else, or a damaged part of it.
        """
        try:
            arrays = load(data)
            names = json.loads(arrays["names"].tobytes())
            terms, samples, groups, own = (tuple(names[name]) for name in _NAMES)
            tables = {
                name: Table(tuple(columns), arrays[f"table.{name}"])
                for name, columns in names["tables"].items()
            }
            values, sample = arrays["log_likelihood"], names["sample"]
            told = names.get("explaining")
            explaining = None if told is None else Explaining._parse(told, arrays)
            conditions = {name: tuple(found) for name, found in names["conditions"].items()}
            return cls(terms, values, tables, samples, groups, sample, explaining, conditions, own)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"Expected measured samples, got {error!r}.") from error

    def _columns(self) -> tuple[object, ...]:
        return self.terms, {name: table.names for name, table in self.tables.items()}, self.sample


def _alike(kinds: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """What shapes and types of samples begin with alike."""
    alike = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*kinds, strict=False))
    return tuple(each[0] for each in alike)


def _different(parts: Sequence[Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """The values of any part, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: tuple(sorted({it for part in parts for it in part.get(n, ())})) for n in names}


def told_difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """Which columns there are in place of others, in words, and what to do about it."""
    lacking, further = set(expected) - set(found), set(found) - set(expected)
    first = next((name for name in (*expected, *found) if name in lacking | further), None)
    which = f"{len(lacking)} of them missing and {len(further)} others, the first {first!r}"
    return (
        f"{len(found)}, {which if first else 'in another order'}: the model's layers are others "
        "now. Take the change back, or fit the detector again."
    )


def dropped_by(
    names: Sequence[str], reasons: Mapping[str, np.ndarray], expected: str
) -> dict[str, str]:
    """The columns that are left out, each with the first of its reasons.

    Args:
        names: Of F columns.
        reasons: Where each holds, (F,), bool.
        expected: What there must be, for the message.

    Raises:
        ValueError: No column is left.
    """
    dropped = {
        names[i]: next(why for why, where in reasons.items() if where[i])
        for i in np.flatnonzero(np.any(list(reasons.values()), axis=0)).tolist()
    }
    if len(dropped) == len(names):
        counts = {why: int(where.sum()) for why, where in reasons.items()}
        raise ValueError(f"Expected {expected}, got none: {counts}.")
    return dropped
