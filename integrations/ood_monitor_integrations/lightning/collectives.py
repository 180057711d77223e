"""Bytes from every process to every process, without pickle, and agreement on failures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["World"]

_FAILED = -1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes that a Trainer runs in.

    Attributes:
        rank: This process.
        size: How many there are.
        device: Where their collectives take tensors from.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @classmethod
    def of(cls, trainer: "Trainer") -> Self:
        """That of a Trainer; one process unless `torch.distributed` connects them."""
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), trainer.strategy.root_device)

    def gathered(self, data: bytes | None) -> list[bytes]:
        """What every process gave, by rank; all must call it, also one that has nothing to give.

        Args:
            data: Of this process; None says that it failed.

        Raises:
            RuntimeError: A process failed; raised in all of them.
        """
        lengths = self.numbers(_FAILED if data is None else len(data))
        failed = [rank for rank, length in enumerate(lengths) if length == _FAILED]
        if failed or data is None:
            raise RuntimeError(f"Expected all processes to succeed, got a failure in {failed}.")
        if self.size == 1:
            return [data]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=_CPU)
        padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[
            : len(data)
        ]
        parts = self._all_gather(padded)
        return [
            part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)
        ]

    def numbers(self, own: int) -> list[int]:
        """One number of every process, by rank; all must call it."""
        if self.size == 1:
            return [own]
        return [int(length) for length in self._all_gather(torch.tensor([own], device=_CPU))]

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        own = own.to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        if own.numel():
            dist.all_gather(parts, own)
        return [part.cpu() for part in parts]
