"""Feed a corrupt shard to a training under Lightning, and see which batches are flagged.

A Glow learns scikit-learn's handwritten digits; one shard of them has black and white swapped. The
callback looks at the gradients that the optimiser is about to
use, and needs no likelihood and no calibration for it. A few seconds on a CPU.

python examples/lightning_corrupt_shard.py
"""

import sys
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

import ood_monitor as om

LEVELS, BATCH = 16, 16
CORRUPT = range(90, 94)  # the batches of the shard


class Flow(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.flow = om.models.Glow(channels=1, size=8, levels=2, steps=4, hidden=64)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = -self.flow.log_prob((x * LEVELS + torch.rand_like(x)) / (LEVELS + 1)).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def batches() -> list[Tensor]:
    images = torch.tensor(load_digits().images / LEVELS, dtype=torch.float32).unsqueeze(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return [1 - x if index in CORRUPT else x for index, x in enumerate(images.split(BATCH))]


def main() -> int:
    torch.set_num_threads(1)
    pl.seed_everything(0)
    watcher = OODMonitor(
        watch=["train"], training=om.TrainingStream(half_life=50, warm_up=40, threshold=6)
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=watcher
    )
    data: Sequence[Tensor] = torch.cat(batches())  # type: ignore[assignment]
    trainer.fit(Flow(), DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]
    flagged = [batch.batch_idx for batch in watcher.flagged_batches]
    print(f"corrupt batches {list(CORRUPT)}, flagged {flagged}, of {len(data) // BATCH + 1}")
    return 0 if flagged == list(CORRUPT) else 1


if __name__ == "__main__":
    sys.exit(main())
