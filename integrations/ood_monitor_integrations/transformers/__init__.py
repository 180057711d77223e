"""Transformers' Trainer: a callback that fits a detector and watches what the model is fed.

::

    trainer = Trainer(model, args, ..., callbacks=[OODCallback()])

A detector is fitted on held-out data while a checkpoint is saved, of the weights that it holds, and
lies in its folder; evaluations, predictions and the training batches can then be watched. Of causal
language models the tokens are scored that are trained on, those whose labels are not -100.
"""

from ood_monitor_integrations.training.gradients import FlaggedBatch
from ood_monitor_integrations.training.stage_scores import StageScores
from ood_monitor_integrations.transformers.batches import unpacked
from ood_monitor_integrations.transformers.callback import OODCallback

__all__ = ["FlaggedBatch", "OODCallback", "StageScores", "unpacked"]
