"""Bytes from every process to every process, without pickle, and agreement on failures."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import nn

from ood_monitor.modules import Lockstep

__all__ = ["World"]

_FAILED = -1

#: How long a process waits for the others where nobody says.
_LIMIT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes that a training runs in.

    They meet by connections of their own on CPUs (gloo), so that nothing here can meet a collective
    of the training. A wait lasts as long as the training's own processes wait, half an hour by
    default, and ends at once when another process has failed or ended. After a wait in vain none
    waits again before the next run.

    Attributes:
        rank: This process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, size: int, limit: timedelta | None = None) -> Self:
        """That of so many; one process unless `torch.distributed` connects them.

        All must call it as often where they are not connected yet.

        Args:
            size: How many the trainer says that there are.
            limit: How long its own processes wait for each other, if it says so.
        """
        if size == 1 or not (dist.is_available() and dist.is_initialized()):
            return cls()
        if _Line.current is None or _Line.current.parent is not dist.group.WORLD:
            _Line.current = _Line(limit or _LIMIT)
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def begin(cls, size: int, limit: timedelta | None = None) -> Self:
        """As :meth:`of` at the begin of a run, connected anew; all must call it."""
        before, _Line.current = _Line.current, None
        world = cls.of(size, limit)
        if before is not None:  # of which one process may have seen the end and another not
            before.leave("another run has begun")
        return world

    @staticmethod
    def leave() -> None:
        """This process has failed and meets no other until the next run; those that wait hear."""
        if _Line.current is not None:
            _Line.current.leave("this process has failed")

    def lockstep(self, module: nn.Module) -> Lockstep:
        """Passes over a module, whose processes wait for each other as here.

        Raises:
            ValueError: As of :class:`~ood_monitor.modules.Lockstep`.
        """
        return Lockstep(module, self.numbers if self.size > 1 else None)

    def gathered(self, data: bytes | None) -> list[bytes]:
        """What every process gave, by rank; all must call it, also one that has nothing to give.

        Args:
            data: Of this process; None says that it failed.

        Raises:
            RuntimeError: A process failed; raised in all of them. Or one is lost.
        """
        lengths = self.numbers(_FAILED if data is None else len(data))
        _check(lengths)
        assert data is not None
        if self.size == 1:
            return [data]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[
            : len(data)
        ]
        parts = self._all_gather(padded)
        return [
            part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)
        ]

    def numbers(self, own: int) -> list[int]:
        """One number of every process, by rank; all must call it.

        Raises:
            RuntimeError: A process is lost.
        """
        if self.size == 1:
            return [own]
        return [int(length) for length in self._all_gather(torch.tensor([own], device="cpu"))]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds in all processes or in none; all must enter it.

        Raises:
            RuntimeError: Another process failed in it, or is lost.
            Exception: What made this one fail.
        """
        try:
            yield
        except Exception:  # of any kind: the others wait for this one's word; it is raised on
            with suppress(RuntimeError):  # the first failure is the one to hear of
                self.numbers(_FAILED)
            raise
        _check(self.numbers(0))

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        if own.numel():
            assert _Line.current is not None  # who has a world of several made it
            _Line.current.all_gather(parts, own)
        return parts


class _Line:
    """The connections of this process to the others, of all monitors that it has.

    Args:
        limit: Of a wait.

    Attributes:
        current: The one that is in use.
        parent: The processes that it is among.
        group: None once a process is lost.
    """

    current: ClassVar["_Line | None"] = None

    def __init__(self, limit: timedelta) -> None:
        self.parent: Any = dist.group.WORLD
        self.group: dist.ProcessGroup | None = None
        self._limit, self._cause = limit, ""
        try:
            self.group = dist.new_group(backend="gloo", timeout=limit)
        except Exception as error:  # it is heard of where they are needed: there it is contained
            self._cause = str(error)

    def all_gather(self, parts: list[torch.Tensor], own: torch.Tensor) -> None:
        """As of `torch.distributed`.

        Raises:
            RuntimeError: A process is lost.
        """
        if self.group is None:
            raise self._lost()
        try:
            dist.all_gather(parts, own, group=self.group)
        except RuntimeError as error:  # gloo's: a connection was closed, or the limit is over
            self.leave(str(error))
            raise self._lost() from error

    def leave(self, cause: str) -> None:
        """Close the connections, of which those that wait hear."""
        group, self.group = self.group, None
        if group is None:
            return
        self._cause = cause
        with suppress(ValueError, AssertionError):  # closed with all others
            dist.destroy_process_group(group)

    def _lost(self) -> RuntimeError:
        return RuntimeError(
            f"Expected all processes to meet within {self._limit}, as long as the training's own "
            f"wait, got a process that has failed, ended or come too late ({self._cause}). They do "
            "not meet again in this run."
        )


def _check(told: list[int]) -> None:
    if failed := [rank for rank, number in enumerate(told) if number == _FAILED]:
        raise RuntimeError(f"Expected all processes to succeed, got a failure in {failed}.")
