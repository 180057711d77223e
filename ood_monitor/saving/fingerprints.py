"""Fingerprints: short names of weights, and of samples that have no name, by SHA-256."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from torch import Tensor, nn, uint8

from ood_monitor.adapters.base import Batch, batch_size, tensors_in
from ood_monitor.modules import Names, stored_weights, tuners_in, weights_in_use, whole

__all__ = [
    "digest",
    "digest_of_tensors",
    "fingerprints_of",
    "hashes_where",
    "marks",
    "names_of",
    "read_weights",
    "sample_hashes",
]


def digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits of the weights' names, shapes, types and bytes.

    Persistent buffers are weights too: a batch norm's statistics change what a model says. So are a
    tuner's (PEFT), while they are in use; a layer that it has wrapped keeps its name. Shards are
    gathered one after the other, which all processes must take part in.

    Raises:
        ValueError: Weights in FSDP's wrapper, which have other names and forms there.
    """
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise ValueError(
            "Expected whole weights, or shards by `fully_shard` (FSDP2), got a model in FSDP's "
            "wrapper, FullyShardedDataParallel: use the other, or the consolidated checkpoint."
        )
    return digest_of_tensors(read_weights(module))


def read_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a digest is of: weights in use, and persistent buffers, under lasting names."""
    saved = module.state_dict().keys()  # before the rest: FSDP then puts shards in place
    names = Names.of(module)
    yield from weights_in_use(module)
    for name, buffer in module.named_buffers():
        if name in saved and (parts := names.weights(name)):
            yield parts[0].name, buffer


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Twelve hexadecimal digits of tensors' names, shapes, types and bytes, in their order."""
    state = hashlib.sha256()
    for name, tensor in named:
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()[:12]


def marks(module: nn.Module) -> int:
    """What changes when a parameter or buffer is replaced, moved or written to; in milliseconds.

    And when a tuner (PEFT) is switched, or merged into weights, past autograd as that is.

    What is written past autograd, through ``tensor.data`` or a NumPy view, is not seen.
    """
    tensors = chain(stored_weights(module), module.named_buffers())
    seen = tuple((name, id(t), t.data_ptr(), _version(t)) for name, t in tensors)
    return hash((seen, repr(tuners_in(module))))


def sample_hashes(batch: Batch, rows: Sequence[int]) -> list[str]:
    """SHA-256 of some samples of a batch, 64 hexadecimal digits each.

    Of each tensor in the batch, in order, the sample's dtype, shape and bytes: whoever has the
    sample as the model was given it finds it again, and nobody else learns what it was.
    """
    tensors = [tensor[list(rows)].detach().cpu() for tensor in tensors_in(batch)]
    return [_hash([tensor[i] for tensor in tensors]) for i in range(len(rows))]


def names_of(batch: Batch) -> tuple[str, ...]:
    """The first 32 digits of the :func:`sample_hashes` of all samples of a batch."""
    return tuple(name[:32] for name in sample_hashes(batch, range(batch_size(batch))))


def fingerprints_of(values: Tensor) -> tuple[str, ...]:
    """Twelve hexadecimal digits of each of the different rows of a tensor (B, ...), in order."""
    return tuple(sorted({it[:12] for it in sample_hashes(values, range(len(values)))}))


def hashes_where(chosen: Tensor, batch: Batch) -> list[str | None]:
    """:func:`sample_hashes` of the samples that a mask (B,) is true of, None of the others."""
    rows = chosen.nonzero().flatten().tolist()
    hashes = dict(zip(rows, sample_hashes(batch, rows), strict=True))
    return [hashes.get(i) for i in range(len(chosen))]


def _hash(sample: Sequence[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in sample:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    raw = whole(tensor.detach()).cpu().contiguous().flatten().view(uint8)
    return bytes(raw.numpy().tobytes())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
