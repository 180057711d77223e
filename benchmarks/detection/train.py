"""Trains the models of the evidence, each from where it was interrupted.

Weights go to benchmarks/weights, which are committed; weights along the way, from which the
evidence sees what too little training does, stay beside Lightning's checkpoint in the folder.
"""

import math
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
import typer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.detection import datasets, zoo
from benchmarks.detection.trained import Watched

#: Shares of the training after which weights are kept.
MILESTONES = (0.01, 0.03, 0.1, 0.3, 1.0)


class Model(pl.LightningModule):
    """A model of the zoo, by Adam with a rate that rises, if asked, and falls to zero."""

    def __init__(self, watched: Watched, timer: Timer | None = None) -> None:
        super().__init__()
        self.watched, self.module, self.timer = watched, watched.make(), timer

    def training_step(self, images: Tensor, index: int) -> Tensor | None:
        loss = self.watched.loss(self.module, self.watched.prepare(images))
        self.log("loss", loss, prog_bar=True)
        # A deep flow may overflow on a single image: without a step for its batch.
        return loss if loss.isfinite() else None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.module.parameters(), self.watched.rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]

    def _share(self, step: int) -> float:
        """Of the learning rate, at a step."""
        risen = min(1.0, (step + 1) / (self.watched.warmup + 1))
        return risen * (1 + math.cos(math.pi * self._done(step))) / 2

    def _done(self, step: int) -> float:
        """Share of the training, by steps or by the clock."""
        if self.timer is None:
            return step / self.watched.steps
        elapsed, left = self.timer.time_elapsed(), self.timer.time_remaining() or 0.0
        return elapsed / (elapsed + left)

    @torch.no_grad()
    def held_out_loss(self, images: Tensor) -> float:
        module = self.module.eval()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = (self.watched.prepare(x.to(self.device)) for x in images)
            parts = [self.watched.loss(module, x).item() for x in inputs]
        module.train()
        return sum(parts) / len(parts)


class Milestones(pl.Callback):
    """Keeps weights along the way."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.steps = {max(1, round(share * steps)) for share in MILESTONES}
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps and isinstance(module, Model):
            file = self.folder / f"{trainer.global_step}.safetensors"
            zoo.save(module.module, file, {"steps": str(trainer.global_step)})


def train(
    watched: Watched,
    images: Tensor,
    held_out: Tensor,
    folder: Path,
    file: Path,
    *,
    seconds: float | None = None,
    **options: Any,
) -> None:
    """Trains until the end, from the folder's checkpoint if there is one, and writes the file.

    Args:
        watched: The model.
        images: What it is trained on.
        held_out: What tells whether it learned.
        folder: Where checkpoints are.
        file: What to write.
        seconds: How long, instead of its number of steps.
        options: Of the Trainer.
    """
    last, by_clock = folder / "last.ckpt", seconds is not None
    pl.seed_everything(0, verbose=False)
    # Whose time is in the checkpoint: what is told counts from the first start.
    timer = Timer(timedelta(seconds=seconds) if seconds is not None else None)
    model, some = Model(watched, timer if by_clock else None), held_out[:1000].split(100)
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=250, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        max_steps=-1 if by_clock else watched.steps,
        gradient_clip_val=100.0,
        logger=False,
        enable_model_summary=False,
        callbacks=[checkpoint, timer, *([] if by_clock else [Milestones(folder, watched.steps)])],
        default_root_dir=folder,
        **options,
    )
    device = trainer.strategy.root_device
    untrained = model.to(device).held_out_loss(some)
    loader = DataLoader(images, batch_size=watched.batch, shuffle=True, drop_last=True)
    # Lightning would have workers load a tensor that is in memory.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.fit(model, loader, ckpt_path=str(last) if last.exists() else None)
    loss = model.to(device).held_out_loss(some)
    if not loss < untrained:
        raise RuntimeError(f"Expected a loss below {untrained:.4g}, got {loss:.4g}: it diverged.")
    facts = {
        "steps": str(trainer.global_step),
        "seconds": f"{timer.time_elapsed():.0f}",
        "held_out_loss": f"{loss:.4f}",
    }
    zoo.save(model.module, file, facts)
    typer.echo(f"{file.name}: {facts}")


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    on: Annotated[list[str] | None, typer.Option(help="A set, or several; all if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    folder: Annotated[
        Path, typer.Option(help="Where checkpoints are kept; delete to start again.")
    ] = Path("runs/evidence"),
) -> None:
    names = on or list(zoo.TRAINED_ON)
    datasets.require(data_dir, names)
    models = zoo.zoo()
    for name in names:
        images, held_out = zoo.training_images(data_dir, name)
        share = zoo.TRAINED_ON[name].share
        for kind in model or models:
            watched = replace(models[kind], steps=round(share * models[kind].steps))
            where = folder / datasets.SOURCES[name].folder / kind.lower()
            train(watched, images, held_out, where, zoo.weights_file(name, kind))


if __name__ == "__main__":
    typer.run(main)
