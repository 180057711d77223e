"""The command line of Lightning with the monitor in a YAML file, and no line of code for it.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from ood_monitor.models import Glow


class Flow(pl.LightningModule):
    """A Glow; `log_prob` is all that the monitor asks for.

    Args:
        hidden: Channels within the coupling networks.
        lr: Learning rate.
    """

    def __init__(self, hidden: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.flow = Glow(channels=1, size=8, levels=2, steps=2, hidden=hidden)
        self.lr = lr

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return -self.log_prob(x + torch.rand_like(x) / 17).mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val/nll", -self.log_prob(x).mean())

    def test_step(self, x: Tensor, index: int) -> None:
        self.log("test/nll", -self.log_prob(x).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """Scikit-learn's handwritten digits, 8x8.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        images = torch.tensor(load_digits().images / 17, dtype=torch.float32).unsqueeze(1)
        self.parts = images.tensor_split([800, 1500])
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], batch_size=self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts[2], batch_size=self.batch_size)  # type: ignore[arg-type]


if __name__ == "__main__":
    LightningCLI(Flow, Digits)
