"""Names for samples that have none: what a sample is hashed to."""

import hashlib
from collections.abc import Sequence

from torch import Tensor, uint8

from ood_monitor.adapters.base import Batch, tensors_in

__all__ = ["hashes_where", "sample_hashes"]


def sample_hashes(batch: Batch, rows: Sequence[int]) -> list[str]:
    """SHA-256 of some samples of a batch, 64 hexadecimal digits each.

    Of each tensor in the batch, in order, the sample's dtype, shape and bytes: whoever has the
    sample as the model was given it finds it again, and nobody else learns what it was.
    """
    tensors = [tensor[list(rows)].detach().cpu() for tensor in tensors_in(batch)]
    return [_hash([tensor[i] for tensor in tensors]) for i in range(len(rows))]


def hashes_where(chosen: Tensor, batch: Batch) -> list[str | None]:
    """:func:`sample_hashes` of the samples that a mask (B,) is true of, None of the others."""
    rows = chosen.nonzero().flatten().tolist()
    hashes = dict(zip(rows, sample_hashes(batch, rows), strict=True))
    return [hashes.get(i) for i in range(len(chosen))]


def _hash(sample: Sequence[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in sample:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().flatten().view(uint8).numpy().tobytes())
    return state.hexdigest()
