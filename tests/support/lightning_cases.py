"""A small LightningModule with its data, Trainers that say nothing, and what they warn of."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ood_monitor.models import Glow

__all__ = ["QUIET", "Flow", "images", "loader", "trained", "trainer", "watcher", "whole"]

#: Lightning's advice, and its own and MLflow's use of what others have deprecated.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers:UserWarning",
        ".*is smaller than the logging interval:UserWarning",
        ".*LeafSpec.*",
        "Checkpoint directory .* exists:UserWarning",
        "Be aware that when using `ckpt_path`:UserWarning",
        "You are trying to `self.log\\(\\)`:UserWarning",
        "The ``noload`` loader:DeprecationWarning",
    )
]


class Flow(pl.LightningModule):
    """A Glow of 4x4 images, trained under dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
        self.dropout = nn.Dropout(0.5)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def training_step(self, x: Tensor, index: int) -> Any:
        return -self.flow.log_prob(self.dropout(x)).mean()

    def validation_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.log("val/nll", -self.flow.log_prob(x).mean())

    def test_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.log("test/nll", -self.flow.log_prob(x).mean())

    def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
        return self.flow.log_prob(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def whole(batch: Any) -> Any:
    """What a YAML may name as `inputs=`."""
    return batch


def loader(data: Tensor, *, shuffle: bool = False, **options: Any) -> DataLoader[Tensor]:
    return DataLoader(data, **({"batch_size": 32, "shuffle": shuffle} | options))  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def watcher(**options: Any) -> OODMonitor:
    return OODMonitor(**({"progress": False, "fpr": 0.05, "ert": 1000} | options))


def trained(
    *callbacks: pl.Callback, module: pl.LightningModule | None = None, **options: Any
) -> pl.LightningModule:
    pl.seed_everything(0, verbose=False)
    module = Flow() if module is None else module
    fit = trainer(*callbacks, **options)
    fit.fit(module, loader(images(64), shuffle=True), loader(images(128, seed=1)))
    return module
