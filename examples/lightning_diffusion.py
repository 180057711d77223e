"""Train a diffusion model with Lightning, and be told when it is fed what it never learned.

On scikit-learn's handwritten digits (real, 8x8, in the package). The callback fits a detector in
the last epoch, on the validation data, and stores it in the checkpoint; `predict` is then watched
on held-out digits followed by inverted ones. About a minute and a half on a CPU.

python examples/lightning_diffusion.py
"""

import sys
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

import ood_monitor as om

OUT = Path("runs/lightning")
TRAIN, HELD_OUT = 800, 700  # the rest is the stream


class Diffusion(pl.LightningModule):
    """The callback asks for `adapter()`: how the network becomes a likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)

    def adapter(self) -> om.DenoisingBound:
        return om.DenoisingBound(self.unet, self.scheduler)

    def loss(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        return F.mse_loss(self.unet(self.scheduler.add_noise(x, noise, t), t).sample, noise)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = self.loss(x)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val/loss", self.loss(x))

    def predict_step(self, x: Tensor, index: int) -> Tensor:
        return self.loss(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint parts to train on, to calibrate on, and to watch, in [-1, 1]."""
    images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    train, held_out, rest = images.tensor_split([TRAIN, TRAIN + HELD_OUT])
    return train, held_out, rest


def loader(images: Tensor, *, shuffle: bool = False) -> DataLoader[Tensor]:
    return DataLoader(images, batch_size=50, shuffle=shuffle)  # type: ignore[arg-type]


def main() -> int:
    torch.set_num_threads(1)  # images of 8x8: threads cost more than they bring
    pl.seed_everything(0)
    train, held_out, rest = digits()
    watcher = OODMonitor(
        watch=["train", "predict"], sinks=[om.LoggingSink()], scores_dir=OUT / "scores"
    )
    trainer = pl.Trainer(
        max_epochs=40,
        check_val_every_n_epoch=10,
        accelerator="cpu",
        logger=False,
        callbacks=[watcher, ModelCheckpoint(OUT, save_last=True, enable_version_counter=False)],
    )
    trainer.fit(Diffusion(), loader(train, shuffle=True), loader(held_out))
    # The checkpoint alone is enough: another program would do the same.
    trainer.predict(Diffusion(), loader(torch.cat([rest, -rest])), ckpt_path=OUT / "last.ckpt")
    return report(watcher, len(rest))


def report(watcher: OODMonitor, first_inverted: int) -> int:
    with np.load(OUT / "scores" / "scores-predict.npz") as scores:
        inverted = scores["dataset_index"] >= first_inverted
        for name, part in (("digits", ~inverted), ("inverted digits", inverted)):
            print(f"{name}: {np.mean(scores['p_value'][part] <= 0.01):.1%} flagged at fpr 1%")
    drifts = [alert for alert in watcher.alerts if alert.kind == "drift"]
    print(*(f"{alert.message} Sample {alert.samples_seen}." for alert in drifts), sep="\n")
    caught = [alert for alert in drifts if alert.samples_seen > first_inverted]
    return 0 if len(caught) == len(drifts) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
