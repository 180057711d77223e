"""The scores of a stage: kept per sample, gathered over processes, put in order, written."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from ood_monitor import Scores
from ood_monitor.densities import Array
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Indices, numbered

__all__ = ["StageScores", "are_those_of"]

#: Scores among which calibration scores are looked for, their relative rounding, and their share.
_MOST, _ROUNDING, _NEARLY_ALL = 100_000, 1e-6, 0.95

_FIELDS = ("score", "p_value", "log_likelihood", "valid")


@dataclass(frozen=True)
class StageScores:
    """Scores of N samples and where each stands.

    Attributes:
        scores: What was said of them, on the CPU.
        dataset_index: (N,), int64, the index in the dataset of its dataloader; where its sampler
            does not tell it, the position among the samples of that dataloader that were scored.
        dataloader_index: (N,), int64, among the dataloaders of the stage.
    """

    scores: Scores
    dataset_index: Indices
    dataloader_index: Indices

    def __len__(self) -> int:
        return len(self.dataset_index)

    @classmethod
    def none(cls) -> Self:
        """No sample."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(Scores.none(), nothing, nothing)

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """The samples of several, one after the other; layers that a part lacks are nan."""
        parts = [cls.none(), *parts]
        return cls(
            Scores.together([part.scores for part in parts]),
            np.concatenate([part.dataset_index for part in parts]),
            np.concatenate([part.dataloader_index for part in parts]),
        )

    @classmethod
    def of_all(cls, parts: Iterable[Self], world: World, layers: Sequence[str]) -> Self:
        """The samples of all processes, in the order of the dataset; all must call it.

        Args:
            parts: Those of this process.
            world: The processes.
            layers: The order that the detector has them in.

        Raises:
            RuntimeError: A process failed, or is lost; all hear of it.
        """
        own = cls.together(parts)
        if world.size == 1:
            return own
        with world.agreed():
            data = own.dump()
        whole = cls.together(cls.parse(part, layers) for part in world.gathered(data))
        return whole.take(dataset_order(whole.dataset_index, whole.dataloader_index))

    def without_layers(self) -> Self:
        """The figures of each sample alone, which a long stage has room for."""
        return replace(self, scores=replace(self.scores, layers={}, z={}))

    def numbered(self) -> Self:
        """With indices and positions in place of what orders the samples while a stage runs."""
        return replace(self, dataset_index=numbered(self.dataset_index, self.dataloader_index))

    def take(self, rows: Indices) -> Self:
        """Some of the samples, in the order of `rows`."""
        return type(self)(
            self.scores.take(torch.from_numpy(rows)),
            self.dataset_index[rows],
            self.dataloader_index[rows],
        )

    def pieces(self, sizes: Sequence[int | None]) -> Iterator[Self]:
        """Batches as one process would have loaded them, of `sizes[dataloader_index]` samples."""
        for dataloader in np.unique(self.dataloader_index):
            rows = np.flatnonzero(self.dataloader_index == dataloader)
            size = sizes[dataloader] or len(rows)
            for start in range(0, len(rows), size):
                yield self.take(rows[start : start + size])

    def dump(self) -> bytes:
        """All of it as safetensors."""
        scores = self.scores
        arrays = {name: getattr(scores, name).numpy() for name in _FIELDS}
        arrays |= {f"layers.{name}": values.numpy() for name, values in scores.layers.items()}
        arrays |= {f"z.{name}": values.numpy() for name, values in scores.z.items()}
        if scores.group is not None:
            arrays["group"] = scores.group.numpy()
        arrays |= {"dataset": self.dataset_index, "dataloader": self.dataloader_index}
        return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})

    @classmethod
    def parse(cls, data: bytes, layers: Sequence[str]) -> Self:
        """What :meth:`dump` gave; `layers` is the order that the detector has them in."""
        arrays = load(data)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

        def named(kind: str) -> dict[str, Tensor]:
            return {n: tensors[f"{kind}.{n}"] for n in layers if f"{kind}.{n}" in tensors}

        figures = {name: tensors[name] for name in _FIELDS}
        group = tensors.get("group")
        scores = Scores(**figures, layers=named("layers"), z=named("z"), group=group)
        return cls(scores, arrays["dataset"], arrays["dataloader"])

    def write(self, folder: Path, stage: str) -> None:
        """Write `scores-<stage>.npz`, which `numpy.load` reads without pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        figures = {name: getattr(self.scores, name).numpy() for name in _FIELDS}
        places = {
            "dataset_index": self.dataset_index,
            "dataloader_index": self.dataloader_index,
        }
        # Numbers alone, so nothing is pickled; NumPy before 2.1 takes `allow_pickle` for an array.
        arrays: dict[str, Any] = places | figures
        np.savez(folder / f"scores-{stage}.npz", **arrays)


def are_those_of(calibration: Array, scores: Array) -> bool:
    """Whether the scores (N,) hold nearly all calibration scores (n,), ascending, to a rounding.

    Then the same samples have calibrated the detector. Of very many scores it is not asked: some
    are as near to any other by chance.
    """
    if not 0 < len(scores) <= _MOST:
        return False
    found = np.sort(scores)
    after = np.searchsorted(found, calibration).clip(0, len(found) - 1)
    nearest = np.minimum(np.abs(found[after] - calibration), np.abs(found[after - 1] - calibration))
    return bool((nearest <= _ROUNDING * np.maximum(1, np.abs(calibration))).mean() > _NEARLY_ALL)


def dataset_order(dataset: Indices, dataloader: Indices) -> Indices:
    """Rows (N,) in the order of their dataloader and place."""
    order: Indices = np.lexsort((dataset, dataloader))
    return order
