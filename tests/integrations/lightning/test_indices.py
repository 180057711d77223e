"""Where samples stand: the dataset's index where a sampler tells it, and never two in one place."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Positions, numbered
from support.lightning_cases import QUIET, Flow, images, trainer, watcher
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

pytestmark = QUIET

COUNT = 9


class Stream(IterableDataset[Tensor]):
    """Nine samples of no known place."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from images(COUNT)


class Batched(Dataset[Tensor]):
    """Three items that are batches of their own: of two, three and four samples."""

    def __getitem__(self, index: int) -> Tensor:
        return images(index + 2, seed=index)

    def __len__(self) -> int:
        return 3


class Own(Sampler[list[int]]):
    """Batches of several sizes that a sampler draws."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([3, 0, 1], [2], [7, 8, 5, 6], [4])

    def __len__(self) -> int:
        return 4


class Backwards(DataLoader[Tensor]):
    """Asks no sampler."""

    def __iter__(self) -> Any:
        yield from images(COUNT).flip(0).split(3)


def made(**options: Any) -> DataLoader[Tensor]:
    return DataLoader(images(COUNT), **options)  # type: ignore[arg-type]


def in_bulk(sampler: Any) -> DataLoader[Tensor]:
    """An index of several samples, and no collation."""
    return made(sampler=BatchSampler(sampler, 4, drop_last=False), batch_size=None)


LISTED = [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
STREAM = list(range(COUNT))

#: A loader, and the indices that are told of its stream in `test`, and in `predict`.
LOADERS: dict[str, tuple[Callable[[], DataLoader[Tensor]], list[int], list[int]]] = {
    "in order": (lambda: made(batch_size=4), STREAM, STREAM),
    "dropped": (lambda: made(batch_size=4, drop_last=True), STREAM[:8], STREAM),
    "listed samples": (lambda: made(batch_size=4, sampler=[8, 2, 4]), [8, 2, 4], [8, 2, 4]),
    "own batches": (lambda: made(batch_sampler=Own()), STREAM, [3, 0, 1, 2, 7, 8, 5, 6, 4]),
    "in bulk": (lambda: in_bulk(SequentialSampler(range(COUNT))), STREAM, STREAM),
    "items are batches": (lambda: DataLoader(Batched(), batch_size=None), STREAM, STREAM),
    "iterable": (lambda: DataLoader(Stream(), batch_size=4), STREAM, STREAM),
    "own iteration": (lambda: Backwards(images(COUNT), batch_size=3), STREAM, STREAM),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore:You are using a custom batch sampler")
@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("name", LOADERS)
def test_indices_are_those_of_the_sampler(name: str, stage: str) -> None:
    make, *told = LOADERS[name]
    assert recorded(stage, make()) == told[stage == "predict"]


@pytest.mark.parametrize("batches", [LISTED, LISTED[::-1]])
def test_listed_batches_need_no_sampler(batches: list[list[int]]) -> None:
    """Which Lightning does not take to predict."""
    assert recorded("test", made(batch_sampler=batches)) == [
        index for batch in batches for index in batch
    ]


def recorded(stage: str, loader: DataLoader[Tensor]) -> list[int]:
    run = trainer(callback := watcher())
    callback.calibrate(run, module := Flow(), [images(64, seed=1)])
    options = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(module, loader, **options)
    found: list[int] = callback.recorded(stage).dataset_index.tolist()  # type: ignore[arg-type]
    return found


def told(loader: Any, world: World) -> list[tuple[int, bool]]:
    """Place of each sample that a process loads, and whether it counts, without a Trainer."""
    positions, found = Positions(loader, world), []
    for index, batch in enumerate(loader):
        at = index, 0, len(batch)
        counted = set(positions.counted(*at).tolist())
        found += [(place, row in counted) for row, place in enumerate(positions.of(*at).tolist())]
    return found


def shared(rank: int, of: int = 2, count: int = COUNT, **options: Any) -> DataLoader[Tensor]:
    sampler = DistributedSampler(range(count), of, rank, **options)  # type: ignore[arg-type, var-annotated]
    return DataLoader(images(count), batch_size=3, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"shuffle": False}, {"seed": 3}, {"drop_last": True}], ids=str)
def test_only_what_pads_a_distributed_sampler_is_left_out(options: Any) -> None:
    whole = COUNT - 1 if options.get("drop_last") else COUNT
    ranks = [told(shared(rank, **options), World(rank, 2)) for rank in (0, 1)]
    counted = [place for rank in ranks for place, counts in rank if counts]
    assert len(set(counted)) == len(counted) == whole
    assert set(counted) <= set(range(COUNT))


def test_a_process_may_have_nothing_but_padding() -> None:
    assert told(shared(1, count=1, shuffle=False), World(1, 2)) == [(0, False)]


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: made(batch_size=4),  # which may be another dataset in each process
        lambda rank: made(batch_sampler=LISTED[rank:]),
        lambda rank: DataLoader(Stream(), batch_size=4),
        lambda rank: [images(size, seed=size) for size in ((3, 1, 4), (2, 5))[rank]],
        lambda rank: shared(1 - rank),  # made for another process
        lambda rank: shared(rank, 3),  # or for another number of them
    ],
)
def test_of_unknown_places_no_two_are_one(make: Callable[[int], Any]) -> None:
    """Of which processes take turns, batch by batch."""
    loaders = [make(rank) for rank in (0, 1)]
    ranks = [told(loader, World(rank, 2)) for rank, loader in enumerate(loaders)]
    assert all(counts for rank in ranks for _, counts in rank)
    places = np.array([place for rank in ranks for place, _ in rank], dtype=np.int64)
    assert len(set(places)) == len(places) == sum(len(b) for loader in loaders for b in loader)
    numbers = numbered(places, 0 * places)
    assert sorted(numbers) == list(range(len(places)))
    first = len(next(iter(loaders[0])))
    assert numbers[len(ranks[0])] == first  # of the second process the first sample


def test_a_batch_of_another_size_than_its_indices_has_no_known_place() -> None:
    """As where a collation makes two samples of one."""
    loader = made(batch_size=4, collate_fn=lambda batch: torch.stack([*batch, *batch]))
    places = np.array([place for place, _ in told(loader, World())])
    assert numbered(places, 0 * places).tolist() == list(range(2 * COUNT))


def test_unknown_places_are_numbered_after_the_known_ones_of_their_dataloader() -> None:
    positions = Positions([made(batch_size=4), DataLoader(Stream(), batch_size=4)], World())
    parts = [positions.of(0, 0, 4), positions.of(1, 0, 3), positions.of(0, 1, 2)]
    dataloader = np.repeat([0, 0, 1], [4, 3, 2])
    assert numbered(np.concatenate(parts), dataloader).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.filterwarnings("ignore:.*multi-processing.*fork:DeprecationWarning")
def test_batches_that_workers_give_in_no_order_have_no_known_place() -> None:
    loader = made(batch_size=3, num_workers=1, in_order=False, sampler=[8, 1, 2])
    assert Positions(loader, World()).of(0, 0, 3).min() > COUNT


class Drawing(Sampler[int]):
    """Draws another order whenever it is asked."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        yield from torch.randperm(COUNT, generator=self.generator).tolist()

    def __len__(self) -> int:
        return COUNT


def test_of_a_sampler_that_lightning_shares_out_what_it_has_drawn_is_told() -> None:
    """It is not asked once more, which would draw another order and change the one in use."""
    order, counted = list(Drawing()), []
    for rank in (0, 1):
        wrapper = DistributedSamplerWrapper(own := Drawing(), 2, rank, shuffle=False)
        loader = DataLoader(images(COUNT), batch_size=2, sampler=wrapper)  # type: ignore[arg-type]
        found = told(loader, World(rank, 2))
        assert [place for place, _ in found] == [*order, order[0]][rank::2]
        assert own.asked == 1
        counted += [place for place, counts in found if counts]
    assert sorted(counted) == STREAM
