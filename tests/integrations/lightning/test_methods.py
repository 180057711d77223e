"""A callback by either method: fitted, kept in a checkpoint, and the training as it was."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher

import ood_monitor as om
from ood_monitor.densities.parts import Method

pytestmark = QUIET

METHODS: tuple[Method, ...] = get_args(Method)


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_fits_and_watches_by_its_method(method: Method) -> None:
    callback = watcher(method=method)
    module = trained(callback)
    assert callback.detector is not None
    assert callback.detector.fitted.method == method
    trainer(callback).predict(module, loader(torch.zeros(64, 1, 4, 4)))
    scores = callback.scores("predict")
    assert scores.valid.all()
    assert (scores.p_value < 0.05).all()
    assert callback.failures == 0
    assert {alert.method for alert in callback.alerts} == {method}


@pytest.mark.parametrize("method", METHODS)
def test_the_training_is_the_one_without_a_callback(method: Method) -> None:
    watched, plain = trained(watcher(method=method)), trained()
    pairs = zip(watched.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_brings_the_method_back(tmp_path: Path) -> None:
    keeper, callback = ModelCheckpoint(tmp_path, save_last=True), watcher(method="forward")
    trained(callback, keeper)
    later = watcher(calibrate="never")
    new = loader(images(32, seed=3))
    trainer(later).predict(Flow(), new, ckpt_path=str(tmp_path / "last.ckpt"))
    assert later.detector is not None
    assert later.detector.fitted.method == "forward"
    found = later.scores("predict").score.numpy()
    expected = later.detector.score(images(32, seed=3)).score.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_method_is_one_and_no_other_detector_s() -> None:
    with pytest.raises(ValueError, match="Expected method of"):
        watcher(method="backward")
    detector = om.Detector(om.LogLikelihood(Flow()))
    with pytest.raises(ValueError, match="Expected `method=` or a detector, got 'forward'"):
        watcher(method="forward", detector=detector)
