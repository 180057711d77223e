"""Held-out batches that a calibration goes through in a pass of its own."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ood_monitor.adapters.base import Batch
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.generators import kept_generators
from ood_monitor_integrations.training.indices import Places, Positions
from ood_monitor_integrations.training.loading import Evenly, beside, length_of

__all__ = ["HeldOut", "Transfer", "own_data"]

#: Brings a batch of a dataloader, by its index, to where the model is, as the trainer would.
Transfer: TypeAlias = Callable[[Batch, int], Batch]


@dataclass(frozen=True)
class HeldOut:
    """A loader, and how many batches of it one process takes.

    Attributes:
        loader: Gives (batch, its index, its dataloader's index).
        count: Batches that it gives; None where that is not known.
        world: The processes that take turns, batch by batch; one if the loader shares out already.
        positions: Where the samples stand.
        sources: The loaders, whose generators are to stay where they are.
    """

    loader: Iterable[tuple[Batch, int, int]]
    count: int | None
    world: World
    positions: Places
    sources: Sequence[Any]

    def batches(
        self, transfer: Transfer, most: int
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """This process's batches on its device, each with its index and its dataloader's.

        Args:
            transfer: What a batch goes through.
            most: Samples, of all batches together; of more, batches are left out evenly, since
                neighbours in a dataset are often alike.
        """
        with kept_generators(self.sources):
            yield from self._batches(transfer, most)

    def _batches(self, transfer: Transfer, most: int) -> Iterator[tuple[Batch, int, int]]:
        size, rank = self.world.size, self.world.rank
        chosen = Evenly(None if self.count is None else -(-self.count // size), most)
        for number, (batch, index, at) in enumerate(self.loader):
            if number % size == rank and chosen.takes(number // size, batch):
                yield transfer(chosen.cut(batch), at), index, at
            if chosen.is_full:
                return


def own_data(source: Any, world: World) -> HeldOut:
    """Batches of one's own, of which each process takes its share."""
    batches = _Numbered(beside(source))
    # A sampler made for several processes has shared them out.
    is_shared = getattr(getattr(source, "sampler", None), "num_replicas", 1) > 1
    if is_shared:
        return HeldOut(batches, length_of(source), World(), Positions(source, world), [source])
    return HeldOut(batches, length_of(source), world, Positions(source, World()), [source])


@dataclass(frozen=True)
class _Numbered:
    """Batches of one loader, each with its index and that of the only dataloader."""

    source: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[Batch, int, int]]:
        return ((batch, index, 0) for index, batch in enumerate(iter(self.source)))
