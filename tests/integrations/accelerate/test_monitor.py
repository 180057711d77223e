"""A loop of one's own that watches loaders: in one process, and in two of uneven loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from ood_monitor_integrations.accelerate import AcceleratorMonitor, FileTracker
from ood_monitor_integrations.accelerate.positions import PreparedPositions, asked
from ood_monitor_integrations.training.collectives import World
from support.accelerate_processes import SIZES, loader, watched
from support.transformers_cases import Texts, collated, llama
from support.two_processes import reports
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import ood_monitor as om

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def one_process(folder: Path) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with=[FileTracker(folder / "one")])
    accelerator.init_trackers("test")
    return accelerator


@pytest.mark.slow
@pytest.mark.parametrize("prepares", [True, False], ids=["prepared", "plain"])
def test_a_loop_finds_what_a_detector_finds(prepares: bool, tmp_path: Path) -> None:
    found = watched(one_process(tmp_path), tmp_path, prepares=prepares)
    model = llama().eval()
    adapter = om.SequenceLikelihood(model, ignore_index=-100)
    detector = om.Detector(adapter).fit(loader(Texts(90, 5)), progress=False)
    for size in SIZES:
        parts = [detector.score(batch).score for batch in loader(Texts(size, 6, foreign=True))]
        np.testing.assert_allclose(found[f"scores {size}"], torch.cat(parts), rtol=1e-4)
        assert found[f"indices {size}"] == [*range(size)]


@pytest.mark.slow
def test_two_processes_decide_as_one_does(tmp_path: Path) -> None:
    accelerator = one_process(tmp_path)
    one = {
        how: watched(accelerator, tmp_path, prepares=how == "prepared")
        for how in ("prepared", "in turns")
    }
    first, second = reports(SUPPORT / "accelerate_processes.py", tmp_path)
    assert first == second
    for how, found in one.items():
        assert first[how]["alerts"] == found["alerts"]
        for size in SIZES:
            assert first[how][f"indices {size}"] == found[f"indices {size}"]
            scores = first[how][f"scores {size}"]
            np.testing.assert_allclose(scores, found[f"scores {size}"], rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"split_batches": True}, {"even_batches": False}], ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 17, 33, 41])
def test_of_samples_that_come_twice_one_counts(size: int, options: dict[str, Any]) -> None:
    """Accelerate's sampler of two processes, against the samples that there are."""
    plain, found = DataLoader(Texts(size, 1), batch_size=8), list[int]()
    for rank in (0, 1):
        own = prepare_data_loader(plain, num_processes=2, process_index=rank, **options)
        positions = PreparedPositions(own, World(rank, 2))
        for turn, batch in enumerate(own.batch_sampler):
            places = positions.of(turn, 0, len(batch))
            assert places.tolist() == batch
            found += places[positions.counted(turn, 0, len(batch))].tolist()
    assert sorted(found) == [*range(size)]


def test_an_order_that_nobody_knows_is_refused_in_several_processes() -> None:
    shuffled = Accelerator(cpu=True).prepare(DataLoader(Texts(9, 1), shuffle=True))
    with pytest.raises(ValueError, match="in the order of its dataset, got DataLoaderShard"):
        PreparedPositions(shuffled, World(0, 2))
    with pytest.raises(ValueError, match="got one that shuffles: each process would draw"):
        asked(DataLoader(Texts(9, 1), shuffle=True), World(0, 2))


def monitor(model: nn.Module | None = None) -> AcceleratorMonitor:
    adapter = om.SequenceLikelihood(model := model or llama().eval(), ignore_index=-100)
    options: dict[str, Any] = {"fpr": 0.05, "progress": False}
    return AcceleratorMonitor(Accelerator(cpu=True), model, adapter, **options)


@pytest.mark.parametrize("how", ["plain", "prepared", "skipped"])
def test_samples_have_their_indices_in_whatever_order_they_come(how: str) -> None:
    watch, texts = monitor(), Texts(43, 7)
    watch.calibrate(loader(Texts(90, 5)))
    shuffled = DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collated)
    given: Any = shuffled if how == "plain" else Accelerator(cpu=True).prepare(shuffled)
    given = Accelerator(cpu=True).skip_first_batches(given, 2) if how == "skipped" else given
    watch.watch(given)
    recorded = watch.recorded["watch"]
    indices = recorded.dataset_index.tolist()
    assert len(set(indices)) == len(indices) == (27 if how == "skipped" else 43)
    assert watch.detector is not None
    alone = watch.detector.score(collated([texts[index] for index in indices]))
    np.testing.assert_allclose(recorded.scores.score, alone.score, rtol=1e-3)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Texts(9, 1)[index] for index in range(9))


def test_what_cannot_be_watched_is_refused() -> None:
    watch = monitor()
    watch.calibrate(loader(Texts(90, 5)))
    with pytest.raises(ValueError, match="Expected samples to watch, got none of list"):
        watch.watch([])
    stream = DataLoader(Stream(), batch_size=8, collate_fn=collated)
    with pytest.raises(ValueError, match="prepared loader of a dataset with indices, got one of a"):
        watch.watch(Accelerator(cpu=True).prepare(stream))
    other = om.SequenceLikelihood(llama())
    with pytest.raises(ValueError, match="Expected an adapter of the model that is given, Llama"):
        AcceleratorMonitor(Accelerator(cpu=True), llama(), other)


#: What is refused, and what is said.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fpr": ({"fpr": 2.0}, "fpr"),
    "method": ({"method": "backward"}, "method"),
    "samples": ({"calibrate_samples": 0}, "calibrate_samples"),
    "name": ({"name": ""}, "name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_mean_nothing_are_refused(name: str) -> None:
    options, told = REFUSED[name]
    with pytest.raises(ValueError, match=told):
        AcceleratorMonitor(Accelerator(cpu=True), llama(), **options)


def test_what_was_not_calibrated_does_not_watch() -> None:
    watch = AcceleratorMonitor(
        Accelerator(cpu=True), model := llama(), om.SequenceLikelihood(model, ignore_index=-100)
    )
    with pytest.raises(ValueError, match=r"Expected a detector, got none\. Make one by"):
        watch.watch(loader(Texts(9, 1)))
