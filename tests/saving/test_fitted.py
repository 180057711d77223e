"""A detector's files: all that was learned comes back to the bit, and nothing damaged does."""

import io
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.density_cases import DENSITIES
from support.pickles import pickles_in
from support.small_cases import SMALL, Branches
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch
from ood_monitor.saving.fitted import CONFIG, FORMAT, TENSORS, digest

BRANCHES = SMALL["branches"]


def fitted(seed: int = 0, **options: Any) -> om.Detector:
    detector = om.Detector(BRANCHES(), seed=seed, **options)
    return detector.fit([BRANCHES.data(100, seed=int(seed))], progress=False)


def same_scores(a: om.Scores, b: om.Scores) -> bool:
    """To the bit, in everything."""
    return all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        if isinstance(x, dict)
        else (x is y is None) or torch.equal(x, y)
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(om.Scores))
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fitted().save_pretrained(tmp_path, card=False)
    return tmp_path


def load(directory: Path) -> om.Detector:
    return om.Detector.from_pretrained(directory, BRANCHES())


# Round trips


@pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_scores_come_back_to_the_bit(small: Any, granularity: Any, tmp_path: Path) -> None:
    x = small.data(100)
    detector = om.Detector(small(), granularity=granularity, chunk_size=40)
    detector.fit([x], progress=False).save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, small())
    assert same_scores(loaded.score(x[:9]), detector.score(x[:9]))


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_density_comes_back(make: Callable[[], Any], tmp_path: Path) -> None:
    detector, x = fitted(density=make()), BRANCHES.data(9, seed=1)
    detector.save_pretrained(tmp_path, card=False)
    assert same_scores(load(tmp_path).score(x), detector.score(x))


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_loaded_detector_fits_as_the_saved_one(make: Callable[[], Any], tmp_path: Path) -> None:
    detector, x = fitted(density=make(), calibration_fraction=0.3, seed=5), BRANCHES.data(9)
    detector.save_pretrained(tmp_path, card=False)
    again = load(tmp_path).fit([BRANCHES.data(150, seed=2)], progress=False).score(x)
    expected = detector.fit([BRANCHES.data(150, seed=2)], progress=False).score(x)
    assert same_scores(again, expected)


def test_loaded_detector_is_saved_as_the_same_files(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "again")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_state_goes_through_a_checkpoint() -> None:
    detector, x, file = fitted(), BRANCHES.data(9), io.BytesIO()
    torch.save({"detector": detector.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["detector"]
    loaded = om.Detector.from_state_dict(state, BRANCHES())
    assert same_scores(loaded.score(x), detector.score(x))


@pytest.mark.parametrize(
    "option",
    [
        {"layers": "left.*"},
        {"layers": ("left.*", "right.bias")},
        {"granularity": "row"},
        {"chunk_size": 7},
        {"calibration_fraction": 0.4},
        {"seed": 3},
        {"source": "images of March"},
    ],
    ids=str,
)
def test_options_come_back(option: dict[str, Any], tmp_path: Path) -> None:
    fitted(**option).save_pretrained(tmp_path, card=False)
    [(name, value)] = option.items()
    found = getattr(load(tmp_path), name)
    assert (tuple(found) if isinstance(value, tuple) else found) == value


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_options_may_be_numbers_of_any_library(kind: Callable[[int], Any], tmp_path: Path) -> None:
    fraction = np.float32(0.5)
    fitted(seed=kind(3), chunk_size=kind(7), calibration_fraction=fraction).save_pretrained(
        tmp_path, card=False
    )
    loaded = load(tmp_path)
    assert (loaded.seed, loaded.chunk_size, loaded.calibration_fraction) == (3, 7, 0.5)
    assert loaded.fitted.fingerprint == fitted(seed=3).fitted.fingerprint


def test_files_are_two_and_a_card_with_its_figure(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md", "calibration.png"}


def test_files_are_two_without_a_card(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {CONFIG, TENSORS}
    assert json.loads((saved / CONFIG).read_text())["format"] == FORMAT
    with safe_open(saved / TENSORS, "numpy") as file:
        assert "calibration" in file.keys()  # noqa: SIM118 - it is no mapping


def test_no_file_is_a_pickle_or_holds_one(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert not pickles_in(path.read_bytes()), path.name


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_would_be_found(protocol: int) -> None:
    assert pickles_in(b"before" + pickle.dumps({"a": [1, 2]}, protocol) + b"after")


def test_a_checkpoint_of_torch_would_be_found() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    assert pickles_in(file.getvalue())


def test_directory_may_be_new_deep_and_a_string(tmp_path: Path) -> None:
    directory = str(tmp_path / "a" / "b")
    fitted().save_pretrained(directory)
    assert om.Detector.from_pretrained(directory, BRANCHES()).is_fitted


def test_saving_again_replaces_the_files(saved: Path) -> None:
    other = fitted(seed=1)
    other.save_pretrained(saved)
    assert load(saved).fitted.fingerprint == other.fitted.fingerprint


def test_files_hold_no_sample_and_no_weight(tmp_path: Path) -> None:
    detector, x = om.Detector(BRANCHES()), BRANCHES.data(100)
    detector.fit([x], progress=False).save_pretrained(tmp_path)
    raw = (tmp_path / TENSORS).read_bytes() + (tmp_path / CONFIG).read_bytes()
    numbers = torch.cat([x.flatten(), *map(torch.flatten, detector.adapter.module.parameters())])
    assert not any(number.tobytes() in raw for number in numbers.detach().numpy())


# What cannot be saved


def test_unfitted_detector_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fitted detector"):
        om.Detector(BRANCHES()).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("write", ["save_pretrained", "state_dict"])
def test_layers_as_a_function_cannot_be_saved(write: str, tmp_path: Path) -> None:
    detector = fitted(layers=lambda name: "bias" in name)
    arguments = [tmp_path / "new"] if write == "save_pretrained" else []
    with pytest.raises(ValueError, match="layers as name patterns to save, got a function"):
        getattr(detector, write)(*arguments)
    assert not (tmp_path / "new").exists()


class Custom(om.DiagonalGaussian):
    """A user's own density."""


def test_a_density_that_no_file_can_name_cannot_be_saved(tmp_path: Path) -> None:
    detector = fitted(density=Custom())
    with pytest.raises(ValueError, match="Custom"):
        detector.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The model it belongs to


def test_other_weights_warn_that_the_calibration_is_stale(saved: Path) -> None:
    adapter = BRANCHES()
    with torch.no_grad():
        adapter.module.left.bias.add_(0.1)  # type: ignore[operator, union-attr]
    with pytest.warns(UserWarning, match="Stale calibration: the detector was fitted on") as caught:
        detector = om.Detector.from_pretrained(saved, adapter)
    assert caught[0].filename == __file__
    assert torch.isfinite(detector.score(BRANCHES.data(3)).score).all()


class Other(Branches):
    """Branches with parameters more, fewer, or of another shape."""

    def __init__(self, change: str) -> None:
        super().__init__()
        if change == "more":
            self.scale = nn.Parameter(torch.ones(6))
        if change == "fewer":
            self.right = nn.Linear(3, 3, bias=False)
        if change == "shape":
            self.right = nn.Linear(3, 5)
        if change == "name":
            self.center, self.right = self.right, nn.Identity()

    def log_prob(self, x: Tensor) -> Tensor:
        right = self.center if hasattr(self, "center") else self.right
        x = x * self.scale if hasattr(self, "scale") else x
        return -0.5 * (self.left(x[:, :3]).square().sum(1) + right(x[:, 3:]).square().sum(1))


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
@pytest.mark.parametrize("change", ["more", "fewer", "shape", "name"])
@pytest.mark.filterwarnings("ignore:Stale calibration")
def test_model_with_other_layers_is_refused(change: str, granularity: Any, tmp_path: Path) -> None:
    fitted(granularity=granularity).save_pretrained(tmp_path, card=False)
    with pytest.raises(ValueError, match="layers"):
        om.Detector.from_pretrained(tmp_path, om.LogLikelihood(Other(change).double()))


def test_a_layer_that_was_left_out_may_differ(tmp_path: Path) -> None:
    fitted(layers="left.*").save_pretrained(tmp_path)
    adapter = om.LogLikelihood(Other("fewer").double())
    with pytest.warns(UserWarning, match="Stale calibration"):
        assert om.Detector.from_pretrained(tmp_path, adapter).is_fitted


class Renamed(om.Adapter):
    """The same terms by another name."""

    def __init__(self, adapter: om.Adapter) -> None:
        self.module, self._adapter = adapter.module, adapter

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        for term, value in self._adapter.log_likelihood(batch):
            yield f"other {term}", value


def test_adapter_with_other_terms_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="term"):
        om.Detector.from_pretrained(saved, Renamed(BRANCHES())).score(BRANCHES.data(3))


# Fingerprints


def test_fingerprint_identifies_what_was_learned() -> None:
    first, same, other = fitted(), fitted(), fitted(seed=1)
    assert first.fitted.fingerprint == same.fitted.fingerprint != other.fitted.fingerprint
    assert len(first.fitted.fingerprint) == 12
    int(first.fitted.fingerprint, 16)


def test_digest_is_of_the_weights() -> None:
    assert digest(BRANCHES.model()) == digest(BRANCHES.model()) == digest(BRANCHES.model().train())
    assert len(digest(BRANCHES.model())) == 12


def rename(module: Any) -> None:
    module.center, module.left = module.left, nn.Identity()


def reshape(module: Any) -> None:
    module.left.weight = nn.Parameter(module.left.weight.detach().reshape(9, 1))


@pytest.mark.parametrize(
    "change", [lambda m: m.left.bias.data[0].add_(1e-12), lambda m: m.float(), rename, reshape]
)
def test_digest_notices_a_change(change: Callable[[Any], Any]) -> None:
    module = BRANCHES.model()
    change(module)
    assert digest(module) != digest(BRANCHES.model())


class Counting(nn.Module):
    """A batch norm, a table that no file holds, and a bias by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.tied = nn.Linear(2, 2)
        self.tied.bias = self.norm.bias
        self.register_buffer("table", torch.zeros(2), persistent=False)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_digest_is_of_the_buffers_that_are_saved(name: str) -> None:
    module = Counting()
    before = digest(module)
    module.table.add_(1)  # type: ignore[operator]
    assert digest(module) == before
    getattr(module.norm, name).add_(1)
    assert digest(module) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_digest_takes_any_parameter(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
    before = digest(module)
    module.weight.data.zero_()
    assert (digest(module) == before) == (shape == (0,))


def test_a_file_in_the_place_of_a_folder_is_refused_with_what_reads_it(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"got the file .*last\.ckpt: .* by `from_checkpoint`"):
        om.Detector.from_pretrained(
            tmp_path / "last.ckpt", om.LogLikelihood(om.models.Glow(channels=1, size=4))
        )
