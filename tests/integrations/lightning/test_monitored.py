"""Callbacks and schedulers that go by a metric of the monitor: told where it will not be there."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from support.lightning_cases import QUIET, Flow, images, loader, trainer, watcher

import ood_monitor as om

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*does not watch the validation of `fit`:UserWarning"),
]


def detector() -> om.Detector:
    held_out = [images(128, seed=1)]
    return om.Detector(om.LogLikelihood(Flow())).fit(held_out, progress=False)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    run = trainer(*callbacks, max_epochs=2)
    run.fit(module, loader(images(64)), loader(images(64, seed=1)))
    return run


class Plateau(Flow):
    """Slows down by a metric of the monitor."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        config = {"scheduler": scheduler, "monitor": "ood/val/score_mean"}
        return {"optimizer": optimizer, "lr_scheduler": config}


NO_DETECTOR = r"no detector before training ends. Give .*`calibrate_every_n_epochs=1`.*`held_out=`"

#: The metric, the monitor's options, and what is said.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ood/val/flagged_rate", {"watch": ["val"]}, NO_DETECTOR),
    ("ood/val/1/score_mean", {"watch": ["val"]}, NO_DETECTOR),
    ("ood/a/val/status", {"watch": ["val"], "name": "a"}, NO_DETECTOR),
    ("ood/val/status", {"watch": ["test"]}, r"`watch=\[..., 'val'\]`"),
    ("ood/train/score_mean", {"watch": ["val"]}, r"`watch=\[..., 'train'\]`"),
    ("ood/train/score", {"watch": ["train"]}, "of 'train' there are flagged_rate, score_mean"),
    ("ood/val/auroc", {"watch": ["val"]}, "of 'val' there are flagged_rate, invalid, log_e"),
    ("ood/val/0/status", {"watch": ["val"]}, "of 'val' there are flagged_rate, invalid, score_m"),
    ("ood/test/status", {"watch": ["test"]}, "no part of `fit`"),
]


@pytest.mark.parametrize(("metric", "options", "said"), REFUSED)
def test_a_metric_that_will_not_be_there_is_refused_before_training(
    metric: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for waiting in (EarlyStopping(metric), ModelCheckpoint(tmp_path, monitor=metric)):
        told = rf"{type(waiting).__name__} monitors '{metric}', which is not logged: .*{said}"
        module = Flow()
        with pytest.raises(ValueError, match=told):
            fit(module, watcher(**options), waiting)


def test_so_is_that_of_a_scheduler() -> None:
    with pytest.raises(ValueError, match=rf"ReduceLROnPlateau monitors .*{NO_DETECTOR}"):
        fit(Plateau(), watcher(watch=["val"]))


def test_where_refusing_is_not_wished_for_it_is_a_warning() -> None:
    with (
        pytest.warns(UserWarning, match=NO_DETECTOR),
        pytest.raises(RuntimeError, match="Early stopping conditioned on"),  # Lightning's own
    ):
        fit(Flow(), watcher(watch=["val"], strict=False), EarlyStopping("ood/val/status"))


#: The metric, and the monitor's options.
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("ood/val/flagged_rate", {"watch": ["val"], "detector": "fitted"}),
    ("ood/train/flagged_rate", {"watch": ["train"]}),
    ("val/nll", {"watch": ["val"]}),
]


@pytest.mark.filterwarnings("ignore:.*stale calibration:UserWarning")
@pytest.mark.parametrize(("metric", "options"), TAKEN)
def test_what_will_be_there_is_waited_for(metric: str, options: dict[str, Any]) -> None:
    if "detector" in options:
        options = options | {"detector": detector(), "calibrate": "never"}
    stop = EarlyStopping(metric, check_on_train_epoch_end=True)
    assert fit(Flow(), watcher(**options), stop).current_epoch == 2


def test_one_that_goes_on_without_its_metric_is_warned_of() -> None:
    stop = EarlyStopping("ood/val/flagged_rate", strict=False)
    with pytest.warns(UserWarning, match=NO_DETECTOR):
        assert fit(Flow(), watcher(watch=["val"]), stop).current_epoch == 2


def test_metrics_of_another_monitor_are_its_own() -> None:
    stop = EarlyStopping("ood/another/val/flagged_rate", strict=False)
    assert fit(Flow(), watcher(watch=["val"]), stop).current_epoch == 2
