"""A Trainer's training as a calibration sees it: its processes, and what it evaluates on."""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ood_monitor.adapters.base import Batch, tensors_in
from ood_monitor_integrations.accelerate.forward import plain_forward
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.held_out import HeldOut, own_data
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.loading import kept_global_state, length_of

__all__ = [
    "Loaders",
    "TransformersRun",
    "begun",
    "is_dataset",
    "is_indexed",
    "trial_batch",
    "world_of",
]

_MISSING = (
    "Expected data that the Trainer has evaluated on by now, or `held_out=`, a dataset or batches, "
    "got neither: a callback knows the evaluation data from the first evaluation on."
)


def world_of(args: TrainingArguments) -> World:
    """The processes of a Trainer; a wait lasts at most its `ddp_timeout`."""
    return World.of(args.world_size, timedelta(seconds=args.ddp_timeout))


def begun(args: TrainingArguments) -> World:
    """Them at the begin of a training, connected anew; all must call it."""
    return World.begin(args.world_size, timedelta(seconds=args.ddp_timeout))


def is_dataset(source: object) -> bool:
    """Whether it has samples, to be collated, and not batches."""
    if isinstance(source, Dataset) or hasattr(source, "column_names"):
        return True
    first = source[0] if isinstance(source, list | tuple) and source else None
    if not isinstance(first, Mapping):
        return False
    tokens = first.get("input_ids")
    is_text = isinstance(tokens, torch.Tensor) and tokens.ndim == 1
    return is_text or not tensors_in(first)


@dataclass
class Loaders:
    """The Trainer's loaders, as far as a callback has seen them.

    Attributes:
        train: Of the training; None before it.
        evaluation: Of the evaluations so far, by the names of their metrics.
    """

    train: Any = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def collates(self) -> Any:
        """A loader with the Trainer's collator; None if none was seen."""
        return next(iter(self.evaluation.values()), self.train)


@dataclass(frozen=True)
class TransformersRun:
    """See :class:`~ood_monitor_integrations.training.calibration.Run`.

    Attributes:
        args: The Trainer's arguments; None where there is no Trainer.
        state: Where its training stands.
        control: What it does next.
        model: What it trains, without wrappers of several processes.
        loaders: Its loaders.
        is_trial: Whether two samples of the training data may stand for those of an evaluation
            that has not been, to see whether they can be scored.
    """

    args: TrainingArguments | None
    state: TrainerState | None
    control: TrainerControl | None
    model: nn.Module
    loaders: Loaders
    is_trial: bool = False

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.model

    @property
    def world(self) -> World:
        """The processes."""
        return World() if self.args is None else world_of(self.args)

    @property
    def is_short(self) -> bool:
        """No: a Trainer has no such mode."""
        return False

    def held_out(self, source: Iterable[Batch] | None) -> HeldOut:
        """Batches of one's own, a dataset, or what was evaluated on; processes take turns.

        Raises:
            ValueError: There are none so far, or a dataset where no collator is known.
        """
        if source is None:
            return self._evaluated()
        if not is_dataset(source):
            return own_data(source, self.world)
        if self.loaders.collates is None:
            raise ValueError(
                "Expected batches to calibrate on where no Trainer has loaded any, got the dataset "
                f"{type(source).__name__}, which takes the Trainer's collator: give a loader."
            )
        return self._of([self._loader(self.loaders.collates, source)])

    def _evaluated(self) -> HeldOut:
        if not self.loaders.evaluation and self.is_trial:
            trial = [] if (batch := trial_batch(self.loaders)) is None else [[batch]]
            return HeldOut(_InTurn(trial), None, World(), Positions(None, World()), [])
        if not self.loaders.evaluation:
            raise ValueError(_MISSING)
        return self._of([self._loader(each) for each in self.loaders.evaluation.values()])

    def _of(self, loaders: Sequence["DataLoader[Any]"]) -> HeldOut:
        lengths = [length_of(loader) for loader in loaders]
        count = None if None in lengths else sum(length or 0 for length in lengths)
        positions = Positions(list(loaders), World())
        return HeldOut(_InTurn(loaders), count, self.world, positions, loaders)

    def _loader(self, like: Any, dataset: Any = None) -> "DataLoader[Any]":
        """A plain loader with another's collator, in the order of the dataset, in this process.

        The Trainer's own is accelerate's: it shares samples out, takes some twice, and tells the
        Trainer's accumulation where it stands.
        """
        own = _whole(like.dataset)
        dataset = own if dataset is None else _with_columns_of(dataset, own)
        size = getattr(self.args, "eval_batch_size", None) or 8
        return DataLoader(dataset, batch_size=size, shuffle=False, collate_fn=like.collate_fn)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and mixed precision; random states are as before afterwards."""
        with kept_global_state(), torch.no_grad(), plain_forward(self.model):
            yield

    def transferred(self, batch: Batch, at: int) -> Batch:
        """The batch itself, which scoring brings to the model's device."""
        return batch


@dataclass(frozen=True)
class _InTurn:
    """Batches of several loaders one after the other, each with its index and its loader's."""

    loaders: Sequence[Iterable[Batch]]

    def __iter__(self) -> Iterator[tuple[Batch, int, int]]:
        for at, loader in enumerate(self.loaders):
            for index, batch in enumerate(iter(loader)):
                yield batch, index, at


def training_runs() -> bool:
    """Whether a Trainer trains in this thread: of one that was interrupted no callback is told."""
    frame, code = sys._getframe(), inspect.unwrap(Trainer.train).__code__
    while frame.f_back is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_code is code


def is_indexed(loader: Any) -> bool:
    """Whether the samples of a loader have indices; those of a stream have places alone."""
    return not isinstance(getattr(loader, "dataset", None), IterableDataset | None)


def _whole(dataset: Any) -> Any:
    """A dataset that accelerate has not shared out."""
    is_shared = isinstance(dataset, IterableDataset) and type(dataset).__name__.endswith("Shard")
    return dataset.dataset if is_shared else dataset


def _with_columns_of(dataset: Any, other: Any) -> Any:
    """A table (datasets) with the columns alone that the Trainer has left to another of its own."""
    if not (hasattr(dataset, "select_columns") and hasattr(other, "column_names")):
        return dataset
    return dataset.select_columns([n for n in dataset.column_names if n in other.column_names])


def trial_batch(loaders: Loaders) -> Batch | None:
    """Two samples of the training data, collated; None where they cannot be had by index."""
    dataset = getattr(loaders.train, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset | Mapping):
        return None
    samples = [dataset[index] for index in range(min(2, len(dataset)))]
    return loaders.train.collate_fn(samples)
