#!/usr/bin/env bash
# PyTorch Lightning: after a fit with EMAWeightAveraging, `test(ckpt_path="best")` of the same
# Trainer runs the weights of the last optimiser step of that epoch, not the averaged ones that the
# checkpoint holds as its model. And a checkpoint of weights alone never holds the averaged ones.
#
# Guessed first: the checkpoint's `state_dict` has the averaged weights ("loading it just works"), so
# that testing it tests these, by the same Trainer as by another; and `save_weights_only=True` leaves
# out the optimiser, not the average.
#
# Versions: pytorch-lightning 2.6.6, torch 2.13.0+cpu, Python 3.11; run on 2026-11-28.
# Behaviour: `WeightAveraging.on_load_checkpoint` loads `current_model_state` into the module where
# an average is at hand. That is so during `fit`, for which it is meant, but also after it: the hook
# runs for `test`, too. A fresh Trainer tests the averaged weights of the same file. With
# `save_weights_only=True` no callback's `on_save_checkpoint` is called, which puts in the average.
# Output seen:
#   same Trainer tests the averaged weights: False, the current ones: True
#   another Trainer tests the averaged weights: True
#   a checkpoint of weights alone holds the averaged ones: False
# Source: pytorch_lightning/callbacks/weight_averaging.py (on_load_checkpoint, on_save_checkpoint),
# trainer/connectors/checkpoint_connector.py (dump_checkpoint, restore_callbacks).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'pytorch-lightning==2.6.6' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import logging

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def test_step(self, batch, index):
        self.seen = self.layer.weight.detach().clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(folder, **options):
    pl.seed_everything(0, verbose=False)
    keeper = ModelCheckpoint(folder, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[EMAWeightAveraging(decay=0.9), keeper], **quiet
    )
    module = Line()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2))
    return trainer, module, torch.load(keeper.best_model_path, weights_only=True)


data = torch.utils.data.DataLoader(torch.ones(2, 1))
trainer, module, checkpoint = trained("whole")
average = checkpoint["state_dict"]["layer.weight"]
current = checkpoint["current_model_state"]["layer.weight"]
assert not torch.equal(average, current)

trainer.test(module, data, ckpt_path="best", verbose=False)
same = torch.equal(module.seen, average), torch.equal(module.seen, current)
print(f"same Trainer tests the averaged weights: {same[0]}, the current ones: {same[1]}")

other, fresh = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False), Line()
path = trainer.checkpoint_callback.best_model_path
other.test(fresh, data, ckpt_path=path, verbose=False)
found = torch.equal(fresh.seen, average)
print(f"another Trainer tests the averaged weights: {found}")

_, _, alone = trained("alone", save_weights_only=True)
holds = torch.equal(alone["state_dict"]["layer.weight"], average)
print(f"a checkpoint of weights alone holds the averaged ones: {holds}")
assert same == (False, True), "the same Trainer now tests other weights"
assert found, "another Trainer no longer tests the averaged weights"
assert not holds, "a checkpoint of weights alone now holds the averaged ones"
PROGRAM
