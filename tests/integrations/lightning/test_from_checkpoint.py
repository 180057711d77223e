"""A detector comes out of a Lightning checkpoint, or of the folder beside it, without Lightning."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher

import ood_monitor as om
from ood_monitor.saving import CONFIG, TENSORS
from ood_monitor.saving.checkpoints import folder_beside, states_of

pytestmark = QUIET

NAME = "production"


class Opaque:
    """What no file of weights alone holds."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``all.ckpt``, of a whole training, and ``weights.ckpt``, of its weights."""
    folder = tmp_path_factory.mktemp("made")
    saving = ModelCheckpoint(folder, filename="all", save_on_train_epoch_end=True)
    trained(watcher(name=NAME), saving)
    run = trainer()
    run.strategy.connect(Flow.load_from_checkpoint(folder / "all.ckpt"))
    run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def adapter(folder: Path) -> om.LogLikelihood:
    return om.LogLikelihood(Flow.load_from_checkpoint(folder / "all.ckpt"))


def of_other_weights(by: float) -> om.LogLikelihood:
    with torch.no_grad():
        for weight in (module := Flow()).parameters():
            weight.add_(by)
    return om.LogLikelihood(module)


def fitted(model: om.LogLikelihood) -> om.Detector:
    return om.Detector(model).fit([images(128, seed=1)], progress=False)


def of_callback(folder: Path) -> str:
    """The fingerprint of the detector in the checkpoint."""
    states = torch.load(folder / "all.ckpt", weights_only=True)["callbacks"]
    state = states[f"OODMonitor{{'name': '{NAME}'}}"]
    return om.Detector.from_state_dict(state, adapter(folder)).fitted.fingerprint


def read(path: Path, model: om.LogLikelihood, name: str = NAME) -> om.Detector:
    return om.Detector.from_checkpoint(path, model, name=name)


def sharded(folder: Path) -> Path:
    """As `ModelParallelStrategy` writes one, the shards left out."""
    checkpoint = torch.load(folder / "all.ckpt", weights_only=True)
    del checkpoint["state_dict"], checkpoint["optimizer_states"]
    (path := folder / "sharded.ckpt").mkdir()
    torch.save(checkpoint, path / "meta.pt")
    return path


@pytest.mark.parametrize(
    "form", [lambda folder: folder / "all.ckpt", sharded], ids=["file", "sharded"]
)
def test_the_detector_of_the_callback_is_read(form: Callable[[Path], Path], folder: Path) -> None:
    found = read(form(folder), adapter(folder))  # a warning of other weights would be an error
    assert found.fitted.fingerprint == of_callback(folder)
    watched = watcher(name=NAME)
    stream = images(64, seed=2)
    trainer(watched).predict(Flow(), loader(stream), ckpt_path=folder / "all.ckpt")
    p_value = found.score(stream).p_value
    torch.testing.assert_close(p_value, watched.scores("predict").p_value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_weights_alone_have_their_detector_in_the_folder_beside(
    is_sharded: bool, folder: Path
) -> None:
    path = folder / "weights.ckpt"
    if is_sharded:
        path.unlink()
        path.mkdir()
        torch.save({"epoch": 1}, path / "meta.pt")
    detector = fitted(adapter(folder))
    detector.save_pretrained(folder_beside(path), card=False)
    assert folder_beside(path) == folder / "weights.ckpt.detector"
    assert read(path, adapter(folder)).fitted.fingerprint == detector.fitted.fingerprint


def test_the_folder_is_read_where_the_checkpoint_has_gone(folder: Path) -> None:
    detector = fitted(adapter(folder))
    detector.save_pretrained(folder / "gone.ckpt.detector", card=False)
    found = read(folder / "gone.ckpt", adapter(folder))
    assert found.fitted.fingerprint == detector.fitted.fingerprint


@pytest.mark.parametrize("of", ["callback", "folder", "neither"])
def test_of_two_the_one_of_these_weights_is_taken(of: str, folder: Path) -> None:
    """And of neither the callback's, with the usual warning; the callback itself takes the same."""
    beside = fitted(of_other_weights(0.1))
    beside.save_pretrained(folder / "all.ckpt.detector", card=False)
    if of == "neither":
        with pytest.warns(UserWarning, match="Stale calibration"):
            found = read(folder / "all.ckpt", of_other_weights(0.2))
    else:
        model = adapter(folder) if of == "callback" else of_other_weights(0.1)
        found = read(folder / "all.ckpt", model)
        watched = watcher(name=NAME, detector=folder / "all.ckpt", calibrate="never")
        trainer(watched).predict(model.module, loader(images(8)))
        assert watched.detector is not None
        assert watched.detector.fitted.fingerprint == found.fitted.fingerprint
    expected = beside.fitted.fingerprint if of == "folder" else of_callback(folder)
    assert found.fitted.fingerprint == expected


def test_a_subclass_of_the_callback_is_found_by_its_name(folder: Path) -> None:
    checkpoint = torch.load(folder / "all.ckpt", weights_only=True)
    states = checkpoint["callbacks"]
    states[f"Mine{{'name': '{NAME}'}}"] = states.pop(f"OODMonitor{{'name': '{NAME}'}}")
    torch.save(checkpoint, folder / "mine.ckpt")
    assert len(states_of(folder / "mine.ckpt", NAME)) == 1


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        (
            "all.ckpt",
            "other",
            r"Expected a detector of the name 'other' in .*all\.ckpt, or one in .*"
            r"all\.ckpt\.detector, got detectors of the names 'production' among the callbacks "
            r".*ModelCheckpoint.*OODMonitor.*, and no such folder: give one of these as `name=`",
        ),
        (
            "weights.ckpt",
            NAME,
            r"got no detector among the callbacks \[\], and no such folder: save it by "
            r"`detector\.save_pretrained\('.*weights\.ckpt\.detector'\)`",
        ),
    ],
)
def test_what_holds_no_such_detector_is_refused(
    file: str, name: str, told: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        read(folder / file, adapter(folder), name)


def test_a_callback_that_fitted_no_detector_is_refused(folder: Path) -> None:
    trained(watcher(name=NAME, watch=["train"]), ModelCheckpoint(folder, filename="early"))
    told = r"got no detector among the callbacks \[.*OODMonitor.*\]"
    with pytest.raises(ValueError, match=told):
        read(folder / "early.ckpt", adapter(folder))


@pytest.mark.parametrize("place", ["nowhere.ckpt", "."])
def test_a_path_where_nothing_is_is_refused(place: str, tmp_path: Path, made: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint in .*, got no checkpoint"):
        read(tmp_path / place, adapter(made))


def test_a_file_that_must_be_unpickled_is_refused_by_what_it_holds(folder: Path) -> None:
    checkpoint = torch.load(folder / "all.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"data": Opaque()}
    torch.save(checkpoint, path := folder / "opaque.ckpt")
    told = rf"loads as weights only in {re.escape(str(path))}, got one with .*\.Opaque: "
    with pytest.raises(ValueError, match=told):
        read(path, adapter(folder))
    with torch.serialization.safe_globals([Opaque]):
        assert read(path, adapter(folder)).is_fitted


def written(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def saved(value: Any, **options: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        torch.save(value, path, **options)

    return damage


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (written(b""), "a file that PyTorch cannot read"),
        (written(b"no checkpoint"), "a file that PyTorch cannot read"),
        (cut, "a file that PyTorch cannot read"),
        (saved({"callbacks": {}}, **OLD), "a file that PyTorch cannot read: mmap can only be used"),
        (saved([1]), "a file of another kind"),
        (saved({"callbacks": [1]}), "a file of another kind"),
        (saved({"weight": torch.ones(2)}), r"no detector among the callbacks \[\]"),
        (saved({"callbacks": {f"X{{'name': '{NAME}'}}": 3}}), "no detector among the callbacks"),
        (
            saved({"callbacks": {f"X{{'name': '{NAME}'}}": {"config": "{}", "tensors": b"x"}}}),
            ": Expected a detector of format",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(
    damage: Callable[[Path], None], told: str, folder: Path
) -> None:
    model = adapter(folder)
    damage(folder / "all.ckpt")
    with pytest.raises(ValueError, match=rf"all\.ckpt.*{told}"):
        read(folder / "all.ckpt", model)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_damaged_folder_is_refused(file: str, folder: Path) -> None:
    beside = folder / "weights.ckpt.detector"
    fitted(adapter(folder)).save_pretrained(beside, card=False)
    content = bytearray((beside / file).read_bytes())
    content[len(content) // 2] ^= 0x80
    (beside / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.ckpt: Expected"):
        read(folder / "weights.ckpt", adapter(folder))


PLAIN = """
import sys, torch, ood_monitor as om
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
    def log_prob(self, x):
        return self.flow.log_prob(x)
model = Plain()
model.load_state_dict(torch.load(sys.argv[1], weights_only=True)["state_dict"])
found = om.Detector.from_checkpoint(sys.argv[1], om.LogLikelihood(model.eval()), name=sys.argv[2])
print(found.fitted.fingerprint, *(name for name in sys.modules if "lightning" in name))
"""


def test_lightning_is_not_needed(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PLAIN, str(folder / "all.ckpt"), NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [of_callback(folder)]
