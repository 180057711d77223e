"""PyTorch Lightning: a callback that fits a detector and watches what the model is fed.

::

    trainer = Trainer(callbacks=[OODMonitor()])

A detector is fitted on held-out data while a checkpoint is saved, of the weights that it holds,
and travels in it or beside it; validation, `test`, `predict` and the training batches can then be
watched. It works with both names of Lightning, `pytorch_lightning` and `lightning.pytorch`.
"""

from ood_monitor_integrations.lightning.callback import OODMonitor
from ood_monitor_integrations.training.gradients import FlaggedBatch
from ood_monitor_integrations.training.stage_scores import StageScores

__all__ = ["FlaggedBatch", "OODMonitor", "StageScores"]
