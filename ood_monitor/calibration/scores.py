"""What a detector says of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Scores"]

_EMPTY = {torch.bool: False, torch.int64: -1, torch.float64: math.nan}


@dataclass(frozen=True)
class Scores:
    """What a detector says of B samples; everything on the CPU, in float64.

    Attributes:
        score: (B,), higher = more anomalous; its unit is the density's and means nothing by itself.
            Infinite where a density of your own finds a sample impossible, or normal beyond all.
        p_value: (B,), conformal: the chance that an in-distribution sample scores at least this.
        log_likelihood: (B,), nats, the sum of the terms; nan where the detector's parts are of no
            term, as those of a denoiser without noise.
        layers: ``{"term/parameter": (B,)}``, each layer's part of the score; they add up to it.
            With the default density also ``{"term": (B,)}``, the part of the term's value itself,
            if the model has several terms.
        z: ``{"term/parameter": (B,)}``, the layer's mean log squared norm, over its live rows, in
            standard deviations from that of in-distribution samples: below 0, the gradient is
            smaller than usual; of ``"term"`` its value. Like ``layers``, without those that are
            dead or constant.
        valid: (B,), bool; False where the score is nan, and with it the p-value.
        group: (B,), int64, the place of the sample's group among the detector's large ones, their
            number for the others, -1 where it was not asked for; None of a detector without groups.
    """

    score: Tensor
    p_value: Tensor
    log_likelihood: Tensor
    layers: dict[str, Tensor]
    z: dict[str, Tensor]
    valid: Tensor
    group: Tensor | None = None

    @classmethod
    def none(cls) -> Self:
        """Of no sample."""
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return cls(
            nothing, nothing, nothing, {}, {}, torch.zeros(0, dtype=torch.bool, device="cpu")
        )

    @classmethod
    def together(cls, parts: Sequence["Scores"]) -> Self:
        """The samples of several, one after the other; layers that a part lacks are nan."""
        parts = [cls.none(), *parts]

        def by_layer(which: str) -> dict[str, Tensor]:
            names = next((list(of) for part in parts if (of := getattr(part, which))), [])
            return {
                name: torch.cat([_column(getattr(part, which), name, part) for part in parts])
                for name in names
            }

        return cls(
            score=torch.cat([part.score for part in parts]),
            p_value=torch.cat([part.p_value for part in parts]),
            log_likelihood=torch.cat([part.log_likelihood for part in parts]),
            layers=by_layer("layers"),
            z=by_layer("z"),
            valid=torch.cat([part.valid for part in parts]),
            group=_groups(parts),
        )

    def take(self, rows: Tensor) -> Self:
        """Some of the samples, by index (M,), in that order."""
        return type(self)(
            score=self.score[rows],
            p_value=self.p_value[rows],
            log_likelihood=self.log_likelihood[rows],
            layers={name: values[rows] for name, values in self.layers.items()},
            z={name: values[rows] for name, values in self.z.items()},
            valid=self.valid[rows],
            group=None if self.group is None else self.group[rows],
        )

    def among(self, count: int, rows: Tensor | Sequence[int]) -> Self:
        """These as the scores of some of `count` samples, with nan for the others.

        Args:
            count: How many there are.
            rows: Which these are: indices (B,), or a mask (count,) with B of them true.
        """
        if isinstance(rows, Sequence) and list(rows) == list(range(count)):
            return self

        def spread(values: Tensor) -> Tensor:
            whole = values.new_full((count,), _EMPTY[values.dtype])
            whole[rows] = values
            return whole

        return type(self)(
            score=spread(self.score),
            p_value=spread(self.p_value),
            log_likelihood=spread(self.log_likelihood),
            layers={name: spread(values) for name, values in self.layers.items()},
            z={name: spread(values) for name, values in self.z.items()},
            valid=spread(self.valid),
            group=None if self.group is None else spread(self.group),
        )


def _column(values: dict[str, Tensor], name: str, part: Scores) -> Tensor:
    return values.get(name, torch.full_like(part.score, math.nan))


def _groups(parts: Sequence[Scores]) -> Tensor | None:
    """Groups of the samples of several, -1 of those of a part without; None if none has any."""
    if all(part.group is None for part in parts):
        return None
    unknown = [torch.full_like(part.score, -1, dtype=torch.int64) for part in parts]
    known = [
        none if part.group is None else part.group
        for part, none in zip(parts, unknown, strict=True)
    ]
    return torch.cat(known)
