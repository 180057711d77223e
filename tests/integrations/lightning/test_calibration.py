"""The detector is fitted in time for the last checkpoint, on the weights that this one holds."""

import warnings
from pathlib import Path
from typing import Any

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
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher

import ood_monitor as om
from ood_monitor.saving.fitted import digest

pytestmark = QUIET


def stops_early() -> EarlyStopping:
    # At the end of validation: a checkpoint that is written there comes after it.
    return EarlyStopping("val/nll", patience=0, min_delta=1e9, check_on_train_epoch_end=False)


def at_validation() -> dict[str, Any]:
    return {"save_on_train_epoch_end": False}


#: How a training ends: its callbacks beside the monitor, before and after it, and its options.
ENDS: dict[str, tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]] = {
    "epochs": ([], [], {}, {}),
    "epochs, saved at validation": ([], [], {}, at_validation()),
    "steps": ([], [], {"max_steps": 3, "max_epochs": -1}, {}),
    "early stopping before": ([stops_early], [], {"max_epochs": 9}, {}),
    "early stopping after": ([], [stops_early], {"max_epochs": 9}, at_validation()),
    "several validations an epoch": ([], [], {"val_check_interval": 1}, at_validation()),
    "validation in some epochs": ([], [], {"max_epochs": 3, "check_val_every_n_epoch": 2}, {}),
    "few validation batches": ([], [], {"limit_val_batches": 3}, at_validation()),
    "averaged weights": ([], [lambda: EMAWeightAveraging(decay=0.5)], {}, at_validation()),
    "averaged weights before": ([lambda: EMAWeightAveraging(decay=0.5)], [], {}, {}),
    "stochastic averages": ([], [lambda: StochasticWeightAveraging(0.01)], {"max_epochs": 3}, {}),
}


@pytest.mark.filterwarnings("ignore:.*using the WeightAveraging callback:UserWarning")
@pytest.mark.parametrize("name", ENDS)
def test_the_last_checkpoint_holds_a_detector_of_its_weights(name: str, tmp_path: Path) -> None:
    before, after, options, saving = ENDS[name]
    callback = watcher()
    callbacks = [*(make() for make in before), callback, *(make() for make in after)]
    trained(*callbacks, ModelCheckpoint(tmp_path, save_last=True, **saving), **options)
    restored = watcher(watch=["predict"])
    # A warning of a stale calibration would fail the test.
    stream = loader(images(64, seed=2))
    trainer(restored).predict(Flow(), stream, ckpt_path=tmp_path / "last.ckpt")
    assert len(restored.scores("predict").score) == 64


def test_validation_that_is_limited_limits_the_samples() -> None:
    callback = watcher()
    trained(callback, limit_val_batches=3)
    assert samples(callback) == 96


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_without_validation_data_there_is_a_pass_over_what_was_given() -> None:
    callback = watcher(held_out=loader(images(64, seed=1)))
    pl.seed_everything(0, verbose=False)
    trainer(callback).fit(Flow(), loader(images(64)))
    assert samples(callback) == 64


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_nothing_to_calibrate_on_is_told_before_training() -> None:
    run = trainer(watcher())
    with pytest.raises(ValueError, match="Expected validation dataloaders or `held_out=` a loader"):
        run.fit(Flow(), loader(images(64)))
    assert run.global_step == 0


def test_several_validation_loaders_are_all_measured() -> None:
    callback = watcher()
    halves = [loader(images(64, seed=1)), loader(images(32, seed=2))]
    trainer(callback).fit(Flow(), loader(images(64)), halves)
    assert samples(callback) == 96


def test_a_second_fit_calibrates_anew() -> None:
    callback = watcher()
    module = trained(callback)
    first = callback.detector
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader(images(64)), loader(images(128, seed=1)))
    assert callback.detector is not first
    assert callback.detector is not None
    assert callback.detector.fitted.model == digest(module)


def test_a_finished_model_is_calibrated_without_training(tmp_path: Path) -> None:
    callback, module = watcher(), Flow()
    run = trainer(callback)
    detector = callback.calibrate(run, module, loader(images(64, seed=1)))
    assert detector is callback.detector
    run.predict(module, loader(images(32, seed=2)))
    run.save_checkpoint(tmp_path / "calibrated.ckpt")
    restored = watcher()
    stream = loader(images(32, seed=2))
    trainer(restored).predict(Flow(), stream, ckpt_path=tmp_path / "calibrated.ckpt")
    assert torch.equal(restored.scores("predict").score, callback.scores("predict").score)


def test_the_settings_of_an_unfitted_detector_are_those_of_the_fitted_one() -> None:
    module = Flow()
    template = om.Detector(om.LogLikelihood(module), granularity="row", seed=3)
    callback = watcher(detector=template)
    trained(callback, module=module)
    assert callback.detector is not None
    assert (callback.detector.granularity, callback.detector.seed) == ("row", 3)
    assert not template.is_fitted


def test_a_detector_that_no_checkpoint_can_hold_is_warned_of_and_watches(tmp_path: Path) -> None:
    callback = watcher(layers=lambda name: "coupling" in name)
    named = r"no detector of their weights have .*last.ckpt \(no file can hold its detector\)"
    with (
        pytest.warns(UserWarning, match=named),
        pytest.warns(UserWarning, match="no checkpoint can hold: Expected layers as name pat"),
    ):
        trained(callback, ModelCheckpoint(tmp_path, save_last=True))
    assert callback.detector is not None
    assert (tmp_path / "last.ckpt").exists()


def test_a_resumed_training_keeps_detector_and_stream(tmp_path: Path) -> None:
    trained(watcher(watch=["train", "test"]), ModelCheckpoint(tmp_path, save_last=True))
    callback = watcher(watch=["train", "test"])
    run = trainer(callback, max_epochs=3)
    batches = loader(images(64)), loader(images(128, seed=1))
    run.fit(Flow(), *batches, ckpt_path=tmp_path / "last.ckpt")
    assert callback.state_dict()["training"]["0"]["batches"] == 6


def test_a_checkpoint_of_another_model_is_warned_of_and_not_watched(
    tmp_path: Path,
) -> None:
    trained(watcher(), ModelCheckpoint(tmp_path, save_last=True))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    callback = watcher()
    callback.load_state_dict(state["callbacks"][callback.state_key])

    class Wider(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=8)

    with pytest.warns(UserWarning, match="will not watch: Expected a model with the detector's"):
        trainer(callback).predict(Wider(), loader(images(32)))
    assert callback.monitor is None


def test_a_fast_development_run_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*does not have many workers|.*LeafSpec")
        trained(callback := watcher(watch=["train", "test"]), fast_dev_run=True)
    assert callback.detector is None


def samples(callback: OODMonitor) -> int:
    assert callback.detector is not None
    fitted = callback.detector.fitted
    return fitted.fit_count + len(fitted.calibration.scores)
