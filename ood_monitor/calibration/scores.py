"""What a detector says of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Scores"]


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
    """

    score: Tensor
    p_value: Tensor
    log_likelihood: Tensor
    layers: dict[str, Tensor]
    z: dict[str, Tensor]
    valid: Tensor

    @classmethod
    def none(cls) -> Self:
        """Of no sample."""
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return cls(
            nothing, nothing, nothing, {}, {}, torch.zeros(0, dtype=torch.bool, device="cpu")
        )

    def among(self, count: int, rows: Tensor | Sequence[int]) -> Self:
        """These as the scores of some of `count` samples, with nan for the others.

        Args:
            count: How many there are.
            rows: Which these are: indices (B,), or a mask (count,) with B of them true.
        """

        def spread(values: Tensor) -> Tensor:
            empty = False if values.dtype == torch.bool else math.nan
            whole = values.new_full((count,), empty)
            whole[rows] = values
            return whole

        return type(self)(
            score=spread(self.score),
            p_value=spread(self.p_value),
            log_likelihood=spread(self.log_likelihood),
            layers={name: spread(values) for name, values in self.layers.items()},
            z={name: spread(values) for name, values in self.z.items()},
            valid=spread(self.valid),
        )
