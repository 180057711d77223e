"""What people do with a Trainer: the weights that are watched have a detector of their own.

A situation trains, and says which module is tested and how. Right is: the detector is of the tested
weights, new data of the usual kind are flagged as often as was promised, and nothing is told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from support.averaging import EMAWeightAveraging
from support.lightning_cases import QUIET, Flow, images, loader, trainer
from torch import Tensor

from ood_monitor.calibration.promise import flagged_interval
from ood_monitor.densities.parts import Method
from ood_monitor.saving.fitted import digest

pytestmark = QUIET

FPR, HELD_OUT, NEW = 0.02, 400, 500

#: How often a right detector flags another number; the seeds are fixed.
LEVEL = 1e-4


class Learning(Flow):
    """One whose weights move, so that those of another epoch would show."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class OwnAverage(Learning):
    """Keeps an average of its weights by itself, and saves it in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        for name, value in self.named_parameters():
            self.average.setdefault(name, value.detach().clone()).lerp_(value.detach(), 0.3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = checkpoint["state_dict"] | self.average


class Counting(Learning):
    """Writes to a buffer after the last batch of each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("validations", torch.zeros(1))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1


class InPlace(Learning):
    """A step that writes into its batch."""

    def test_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.log("test/nll", -self.flow.log_prob(x.div_(3)).mean())

    validation_step = test_step


class Data(pl.LightningDataModule):
    """Bytes, which a hook scales."""

    def _loader(self, count: int, seed: int) -> Any:
        return loader((255 * images(count, seed=seed)).round(), batch_size=50)

    def train_dataloader(self) -> Any:
        return self._loader(100, 0)

    def val_dataloader(self) -> Any:
        return self._loader(HELD_OUT, 1)

    def test_dataloader(self) -> Any:
        return self._loader(NEW, 2)


class Before(Data):
    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch / 255


class Transfer(Data):
    def transfer_batch_to_device(
        self, batch: Tensor, device: torch.device, dataloader_idx: int
    ) -> Tensor:
        return (batch / 255).to(device)


class After(Data):
    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch / 255


class Augmenting(Data):
    """Noise while the Trainer trains."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        assert self.trainer is not None
        return batch / 255 + self.trainer.training * torch.rand_like(batch)


def best(**options: Any) -> Callable[[Path], ModelCheckpoint]:
    return lambda folder: ModelCheckpoint(folder, monitor="val/nll", **options)


def every(**options: Any) -> Callable[[Path], ModelCheckpoint]:
    return lambda folder: ModelCheckpoint(folder, save_last=True, **options)


def patience(folder: Path) -> EarlyStopping:
    return EarlyStopping("val/nll", patience=2)


def ema(folder: Path) -> Any:
    return EMAWeightAveraging(decay=0.5)


@dataclass(frozen=True)
class Situation:
    """How a model is trained, and which weights are tested.

    Attributes:
        callbacks: Beside the monitor, before it.
        after: Those behind it.
        trained: Of the Trainer.
        tested: Of `test`, by the same Trainer; None for another, without callbacks, and the best.
        monitor: Options of the monitor.
        module: What is trained.
        data: A DataModule; loaders by default.
        resumed: Of another Trainer and monitor, which go on from the last checkpoint; None for no
            other.
    """

    callbacks: tuple[Callable[[Path], Any], ...] = ()
    after: tuple[Callable[[Path], Any], ...] = ()
    trained: dict[str, Any] = field(default_factory=lambda: {"max_epochs": 3})
    tested: dict[str, Any] | None = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], Flow] = Learning
    data: Callable[[], Data] | None = None
    resumed: dict[str, Any] | None = None


STEPS = {"max_steps": 5, "max_epochs": -1}
EARLY = {"max_epochs": 12}
BEST = {"ckpt_path": "best"}

SITUATIONS = {
    "no checkpoint": Situation(),
    "best": Situation((best(), patience), trained=EARLY, tested=BEST),
    "best, monitor behind": Situation(after=(best(), patience), trained=EARLY, tested=BEST),
    "best of three": Situation(
        (best(save_top_k=3),), tested=BEST, monitor={"calibrate": "every checkpoint"}
    ),
    "best, weights only": Situation((best(save_weights_only=True),), tested=BEST),
    "last": Situation((every(),), tested={"ckpt_path": "last"}),
    "last, linked": Situation(
        (lambda folder: ModelCheckpoint(folder, save_last="link"),), tested={"ckpt_path": "last"}
    ),
    "resumed": Situation((every(),), tested={"ckpt_path": "last"}, resumed={"max_epochs": 5}),
    "resumed, the end": Situation((every(),), resumed={"max_epochs": 5}),
    "in mid epoch": Situation(
        (every(every_n_train_steps=3),), trained={"max_steps": 7}, tested={"ckpt_path": "last"}
    ),
    "stochastic averages": Situation(
        (best(), lambda folder: StochasticWeightAveraging(0.05, swa_epoch_start=1)), tested=BEST
    ),
    "stochastic averages, the end": Situation(
        (lambda folder: StochasticWeightAveraging(0.05, swa_epoch_start=1),)
    ),
    "averages, epochs": Situation((best(), ema), tested=None),
    "averages, epochs, the end": Situation((ema,)),
    "averages, steps": Situation((best(),), after=(ema,), trained=STEPS, tested=None),
    "averages, steps, the end": Situation(after=(ema,), trained=STEPS),
    "averages, early stopping": Situation((best(), patience), (ema,), EARLY, None),
    "averages, early stopping, the end": Situation((patience,), (ema,), EARLY),
    "averages, weights only": Situation((best(save_weights_only=True), ema), tested=None),
    "averages of its own": Situation((best(),), tested=BEST, module=OwnAverage),
    "a buffer after the last batch": Situation((best(),), tested=BEST, module=Counting),
    "a step in place": Situation(module=InPlace),
    "hook before": Situation((best(),), tested=BEST, data=Before),
    "hook of transfer": Situation(trained=STEPS, data=Transfer),
    "hook after": Situation(trained=STEPS, data=After),
    "hook of training": Situation((patience,), trained=EARLY, data=Augmenting),
}


#: Those that are tried with each change; the others take minutes together.
QUICK = {
    (name, "forward")
    for name in (
        *("best", "best, weights only", "averages, steps", "averages of its own"),
        *("a step in place", "hook before", "hook of training"),
    )
}


def watched(situation: Situation, folder: Path, method: Method) -> tuple[OODMonitor, pl.Trainer]:
    pl.seed_everything(3, verbose=False)
    callback, run = fitting(situation, folder, method, **situation.trained)
    module, fit, test = situation.module(), *given(situation)
    run.fit(module, **fit)
    if situation.resumed is not None:
        module, path = situation.module(), run.checkpoint_callback.last_model_path  # type: ignore[union-attr]
        callback, run = fitting(situation, folder, method, **situation.resumed)
        run.fit(module, ckpt_path=path, **fit)
    if situation.tested is None:
        path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        callback = OODMonitor(progress=False, watch=["test"], fpr=FPR)
        module, run = situation.module(), trainer(callback)
        run.test(module, ckpt_path=path, **test)
    else:
        run.test(module, **test, **situation.tested)
    return callback, run


def fitting(
    situation: Situation, folder: Path, method: Method, **options: Any
) -> tuple[OODMonitor, pl.Trainer]:
    own = situation.monitor | {"method": method, "fpr": FPR}
    callback = OODMonitor(progress=False, watch=["test"], **own)
    before = [make(folder) for make in situation.callbacks]
    after = [make(folder) for make in situation.after]
    return callback, trainer(*before, callback, *after, default_root_dir=folder, **options)


def given(situation: Situation) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data of `fit`, and of `test`."""
    if situation.data is not None:
        data = {"datamodule": situation.data()}
        return data, data | {"verbose": False}
    held_out, new = images(HELD_OUT, seed=1), images(NEW, seed=2)
    fit = {
        "train_dataloaders": loader(images(100)),
        "val_dataloaders": loader(held_out, batch_size=50),
    }
    return fit, {"dataloaders": loader(new, batch_size=50), "verbose": False}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*using the WeightAveraging callback:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler:UserWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
        for name in SITUATIONS
        for method in get_args(Method)
        if method != "both"
    ],
)
def test_the_detector_is_of_the_weights_that_are_tested(
    name: str, method: Method, tmp_path: Path
) -> None:
    callback, run = watched(SITUATIONS[name], tmp_path, method=method)
    assert callback.detector is not None
    assert callback.detector.fitted.model == digest(run.lightning_module)
    assert callback.failures == 0
    flagged = int((callback.scores("test").p_value <= FPR).sum())
    calibration = len(callback.detector.fitted.calibration.scores)
    interval = flagged_interval(NEW, calibration, FPR, level=LEVEL)
    assert interval[0] <= flagged <= interval[1]
