"""Which checkpoints get a detector, where it lies, and what is told of those without."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.held_out import own_data
from ood_monitor_integrations.training.swapping import holding
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from pytorch_lightning.utilities import CombinedLoader
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.saving.checkpoints import folder_beside
from ood_monitor.saving.fitted import digest

pytestmark = QUIET


class Worse(Flow):
    """Its first epoch is its best, as far as the monitored value goes."""

    def validation_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.log("val/nll", float(self.current_epoch))


def inside(path: str | Path, callback: OODMonitor) -> bool:
    states = torch.load(path, weights_only=True)["callbacks"]
    return "config" in states[callback.state_key]


def detectors(folder: Path, callback: OODMonitor) -> dict[int, bool]:
    """By epoch, whether a checkpoint holds a detector."""
    found = {}
    for path in folder.glob("*.ckpt"):
        found[torch.load(path, weights_only=True)["epoch"]] = inside(path, callback)
    return found


@pytest.mark.parametrize(
    ("calibrate", "right"),
    [
        (None, {0: True, 1: False, 2: True}),
        ("best", {0: True, 1: False, 2: True}),
        ("every checkpoint", {0: True, 1: True, 2: True}),
        ("last", {0: False, 1: False, 2: True}),
        ("never", {0: False, 1: False, 2: False}),
    ],
)
def test_a_policy_says_which_checkpoints_have_one(
    calibrate: Any, right: dict[int, bool], tmp_path: Path
) -> None:
    callback = watcher(calibrate=calibrate)
    keeper = ModelCheckpoint(tmp_path, monitor="val/nll", save_top_k=-1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained(callback, keeper, module=Worse(), max_epochs=3)
    assert detectors(tmp_path, callback) == right
    (named,) = [str(w.message) for w in told if "no detector of their" in str(w.message)] or [""]
    lacking = [epoch for epoch, has in right.items() if not has and calibrate != "never"]
    assert [epoch for epoch in right if f"epoch={epoch}-" in named] == lacking


def test_of_weights_alone_it_lies_beside_and_goes_with_them(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="val/nll", save_weights_only=True)
    callback = watcher()
    trained(callback, keeper, max_epochs=4)
    (kept,) = tmp_path.glob("*.ckpt")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder_beside(kept)]
    restored, module = watcher(), Flow()
    trainer(restored).predict(module, loader(images(32)), ckpt_path=kept)
    assert restored.detector is not None
    assert restored.detector.fitted.model == digest(module)


def test_weights_without_a_detector_are_told_and_alerted(tmp_path: Path) -> None:
    callback, keeper = watcher(calibrate="last"), ModelCheckpoint(tmp_path, monitor="val/nll")
    with pytest.warns(UserWarning, match="no detector of their weights have"):
        trained(callback, keeper, module=Worse(), max_epochs=3)
    run = trainer(callback, keeper)
    with pytest.warns(UserWarning, match="stale calibration: the model has other weights than"):
        run.test(Worse(), loader(images(32)), ckpt_path=keeper.best_model_path, verbose=False)
    assert "stale_calibration" in [alert.kind for alert in callback.alerts]


def test_a_buffer_that_was_written_to_is_named() -> None:
    class Counting(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

    callback = watcher()
    module = trained(callback, module=Counting())
    module.seen += 1  # type: ignore[operator]
    with pytest.warns(UserWarning, match="buffers were written to .*: seen"):
        trainer(callback).test(module, loader(images(32)), verbose=False)


def test_after_another_fit_no_checkpoint_has_the_old_one(tmp_path: Path) -> None:
    callback = watcher()
    module = trained(callback)
    first = callback.detector
    again = trainer(callback, ModelCheckpoint(tmp_path, save_top_k=-1), max_epochs=2)
    with pytest.warns(UserWarning, match="no detector of their weights have"):
        again.fit(module, loader(images(64)), loader(images(128, seed=1)))
    assert detectors(tmp_path, callback) == {0: False, 1: True}
    assert callback.detector is not first


def test_a_metric_of_a_first_fit_stops_it() -> None:
    callback = watcher(
        watch=["val"], held_out=[images(64, seed=5)], calibrate_every_n_epochs=1, calibrate="last"
    )
    stop = EarlyStopping("ood/val/flagged_rate", stopping_threshold=1.1)
    run = trainer(callback, stop, max_epochs=5)
    run.fit(Flow(), loader(images(64)), loader(images(64, seed=1)))
    assert run.current_epoch == 1


def test_validation_that_may_have_calibrated_is_not_scored_as_news() -> None:
    callback = watcher(watch=["val"])
    with pytest.warns(UserWarning, match=r"does not watch the validation of `fit`.*`held_out=`"):
        trained(callback)
    assert callback.monitor is None


@pytest.mark.parametrize(
    ("samples", "most", "right"),
    [
        (640, 160, [0, 4, 8, 12, 16]),
        (640, 1000, [*range(20)]),
        (640, 40, [0]),
        (640, 20, [0]),
        (300, 200, [0, 1, 3, 5, 6, 8]),
    ],
)
def test_of_many_samples_those_that_calibrate_are_spread(
    samples: int, most: int, right: list[int]
) -> None:
    held_out = own_data(loader(images(samples)), World())
    taken = [(index, len(x)) for x, index, _ in held_out.batches(lambda batch, at: batch, most)]
    assert [index for index, _ in taken] == right
    assert sum(size for _, size in taken) <= most


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size_cycle", "max_size"])
def test_loaders_are_combined_as_validation_combines_them(mode: Any) -> None:
    class Pairs(Flow):
        def adapter(self) -> Any:
            return of_the_first(self)

        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            pass

    combined = CombinedLoader(
        [loader(images(96, seed=1)), loader(images(64, seed=2), batch_size=32)], mode
    )
    callback = watcher()
    pl.seed_everything(0, verbose=False)
    trainer(callback, max_epochs=1).fit(Pairs(), loader(images(64)), combined)
    assert callback.detector is not None
    fitted = callback.detector.fitted
    found = fitted.fit_count + len(fitted.calibration.scores)
    assert found == {"sequential": 160, "min_size": 64}.get(mode, 96)


def of_the_first(module: Any) -> om.Adapter:
    def first(batch: Any) -> Tensor:
        found = [x for x in batch if x is not None] if isinstance(batch, list | tuple) else [batch]
        return found[0]

    return om.LogLikelihood(module, inputs=first)


def test_other_weights_are_lent_and_come_back_whatever_happens() -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    own, lent = digest(module), digest(other)
    with contextlib.suppress(KeyboardInterrupt), holding(module, other.state_dict()):
        assert (digest(module), digest(other)) == (lent, own)
        raise KeyboardInterrupt
    assert (digest(module), digest(other)) == (own, lent)
    with pytest.raises(ValueError, match=r"Expected 'weight' of shape \(2, 3\)"):
        holding(module, nn.Linear(3, 3).state_dict()).__enter__()
    assert digest(module) == own


@pytest.mark.parametrize("method", ["forward", "gradient_norms"])
def test_samples_that_have_calibrated_are_no_news(method: Any) -> None:
    callback = watcher(watch=["val"], method=method)
    held_out = loader(images(128, seed=1))
    module = Flow()
    callback.calibrate(run := trainer(callback), module, held_out)
    run.validate(module, loader(images(128, seed=2)), verbose=False)  # which tells nothing
    with pytest.warns(UserWarning, match="has scored the samples that calibrated its detector"):
        run.validate(module, held_out, verbose=False)


def test_each_of_two_monitors_has_a_folder_beside_weights_alone(tmp_path: Path) -> None:
    names = ("first", "a/b")
    keeper = ModelCheckpoint(tmp_path, save_weights_only=True)
    trained(*(watcher(name=name) for name in names), keeper)
    for name in names:
        again = watcher(name=name)
        trainer(again).predict(Flow(), loader(images(32)), ckpt_path=keeper.best_model_path)
        assert len(again.scores("predict").score) == 32
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


class FrozenLeftOut(Flow):
    """Saves no part that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        kept = {k: v for k, v in state.items() if not k.startswith("frozen")}
        checkpoint["state_dict"] = kept


class Half(Flow):
    """Saves in half precision."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        checkpoint["state_dict"] = halves


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("make", [FrozenLeftOut, Half])
def test_what_is_saved_of_a_model_is_what_its_detector_is_of(
    make: Any, light: bool, tmp_path: Path
) -> None:
    pl.seed_everything(1)
    keeper = ModelCheckpoint(tmp_path, save_weights_only=light)
    trained(watcher(), keeper, module=(module := make()), max_epochs=1)
    again, loaded = watcher(), make()
    if isinstance(loaded, FrozenLeftOut):
        loaded.frozen = module.frozen
        loaded.strict_loading = False
    # A stale calibration would be warned of.
    trainer(again).predict(loaded, loader(images(32)), ckpt_path=keeper.best_model_path)
    assert len(again.scores("predict").score) == 32


def test_checkpoints_of_a_pruned_model_are_named(tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])
    with pytest.warns(UserWarning, match=r"no detector of their weights.*\.ckpt .*as a pruned one"):
        trained(watcher(), pruning, ModelCheckpoint(tmp_path))


def test_what_else_is_in_a_folder_stays(tmp_path: Path) -> None:
    for epoch in range(2):
        own = tmp_path / f"epoch={epoch}-step={2 * epoch + 2}.ckpt.detector"
        own.mkdir()
        (own / "mine.txt").write_text("precious")
    trained(watcher(), ModelCheckpoint(tmp_path, save_weights_only=True))
    assert len(list(tmp_path.glob("*/mine.txt"))) == 2


def test_a_stage_that_is_not_watched_has_no_scores_of_the_run_before() -> None:
    class Breaking(Flow):
        breaks = False

        def test_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
            if self.breaks:
                raise KeyError("a user's own mistake")

    callback, module = watcher(), Breaking()
    callback.calibrate(run := trainer(callback), module, loader(images(64, seed=1)))
    run.test(module, loader(images(32)), verbose=False)
    module.breaks = True
    with pytest.raises(KeyError):
        run.test(module, loader(images(32)), verbose=False)
    with pytest.raises(ValueError, match="Expected a stage of"):
        callback.scores("test")


def test_a_link_leads_to_the_detector_beside_what_it_links_to(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_last="link", save_weights_only=True)
    module = trained(watcher(), keeper)
    detector = om.Detector.from_checkpoint(tmp_path / "last.ckpt", om.LogLikelihood(module))
    assert detector.fitted.model == digest(module)


def test_validation_data_that_come_once_are_refused() -> None:
    once = iter([images(64, seed=1)])
    with pytest.raises(ValueError, match="can be gone through again, got an iterator"):
        trainer(watcher()).fit(Flow(), loader(images(64)), once)


def test_a_given_detector_stands_in_a_checkpoint_of_its_weights(tmp_path: Path) -> None:
    module = Flow()
    given = om.Detector(om.LogLikelihood(module)).fit([images(64, seed=1)], progress=False)
    run = trainer(callback := watcher(detector=given))
    run.predict(module, loader(images(32)))
    run.save_checkpoint(tmp_path / "own.ckpt")
    with torch.no_grad():
        next(module.parameters()).add_(1)
    run.save_checkpoint(tmp_path / "other.ckpt")
    assert inside(tmp_path / "own.ckpt", callback)
    assert not inside(tmp_path / "other.ckpt", callback)
