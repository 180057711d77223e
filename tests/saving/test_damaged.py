"""Damaged files of a detector: each is refused by a clear error, and none is loaded in part."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save
from support.density_cases import DENSITIES
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.saving.fitted import CONFIG, FORMAT, TENSORS, Fitted, _checksum

BRANCHES = SMALL["branches"]
OLD = Path(__file__).parents[1] / "data" / "format-1"


def two_terms() -> om.Adapter:
    """Gradient norms' density has values of terms too, so that every kind of array is in files."""
    return SMALL["glow"]()


def groups_of(batch: Any) -> list[str]:
    return [str(int(v > 0)) for v in batch[1]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("detector")
    x = SMALL["glow"].data(120)
    detector = om.Detector(two_terms(), method="both", groups=groups_of, minimum_group=20)
    detector.fit([(x, x[:, 0, 0, 0])], progress=False).save_pretrained(directory, card=False)
    return directory


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    for name in (CONFIG, TENSORS):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def load_from(directory: Path) -> om.Detector:
    return om.Detector.from_pretrained(directory, two_terms(), groups=groups_of)


# What a machine or a careless hand does


def positions(size: int, count: int = 40) -> list[int]:
    return sorted({0, size - 1, *np.random.default_rng(0).integers(size, size=count).tolist()})


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_truncated_file_is_refused(name: str, saved: Path) -> None:
    content = (saved / name).read_bytes()
    for length in positions(len(content.rstrip())):
        (saved / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(saved)):
            load_from(saved)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("mask", [0x01, 0x80], ids=hex)
def test_file_with_a_flipped_bit_is_refused(name: str, mask: int, saved: Path) -> None:
    content = (saved / name).read_bytes()
    for at in positions(len(content.rstrip())):
        damaged = bytearray(content)
        damaged[at] ^= mask
        (saved / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=str(saved)):
            load_from(saved)


@pytest.mark.parametrize("key", ["model", "fit_count", "samples", "parts", "method", "options"])
def test_edited_config_is_refused(key: str, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    edits = {
        "model": "0123456789ab",
        "fit_count": 61,
        "samples": [],
        "parts": config["parts"][::-1],
        "method": "forward",
        "options": config["options"] | {"seed": 1},
    }
    (saved / CONFIG).write_text(json.dumps(config | {key: edits[key]}))
    with pytest.raises(ValueError, match=str(saved)):
        load_from(saved)


@pytest.mark.parametrize("swapped", [CONFIG, TENSORS])
def test_files_of_two_detectors_are_refused(swapped: str, saved: Path, tmp_path: Path) -> None:
    other = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False)
    other.save_pretrained(tmp_path / "other", card=False)
    (tmp_path / "other" / swapped).replace(saved / swapped)
    with pytest.raises(ValueError, match="do not belong together"):
        load_from(saved)


@pytest.mark.parametrize("found", [FORMAT + 1, 0, None, "1"], ids=repr)
def test_another_format_is_refused(found: Any, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text()) | {"format": found}
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"Expected a detector of format {FORMAT} in .*, got"):
        load_from(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'"format"', b'{"format": 1}', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "object", "binary", "string", "format alone", "deep"],
)
def test_config_that_is_none_is_refused(content: bytes, saved: Path) -> None:
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=str(saved)):
        load_from(saved)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_missing_file_is_named(missing: str, saved: Path) -> None:
    (saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_from(saved)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_from(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["config", "tensors"])
def test_state_without_a_part_is_refused(key: str) -> None:
    state = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False).state_dict()
    del state[key]
    with pytest.raises(ValueError, match=key):
        om.Detector.from_state_dict(state, BRANCHES())


# What somebody does who can make a new checksum

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def forge(directory: Path, change: Change) -> None:
    """Change settings and arrays in place, and make the files belong together again."""
    settings, arrays = json.loads((directory / CONFIG).read_text()), load_file(directory / TENSORS)
    change(settings, arrays)
    settings.pop("checksum")
    tensors = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    settings["checksum"] = _checksum(settings, tensors)
    (directory / TENSORS).write_bytes(tensors)
    (directory / CONFIG).write_text(json.dumps(settings))


def setting(key: str, value: Any) -> Change:
    return lambda settings, arrays: settings.__setitem__(key, value)


def option(key: str, value: Any) -> Change:
    return lambda settings, arrays: settings["options"].__setitem__(key, value)


def array(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    return lambda settings, arrays: arrays.__setitem__(name, np.array(change(arrays[name])))


def value(name: str, number: float) -> Change:
    return array(name, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, number, a))


NORMS = -1  # the part of gradient norms, the last
GAUSSIAN, MIXTURE = "gradient_norms.density.norms", "gradient_norms.density.terms"


def part(key: str, value: Any, at: int = NORMS) -> Change:
    return lambda settings, arrays: settings["parts"][at].__setitem__(key, value)


def swap(a: str, b: str) -> Change:
    return lambda settings, arrays: arrays.update({a: arrays[b], b: arrays[a]})


def rename_feature(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    settings["parts"][NORMS]["columns"][0] = "latent_1/nowhere.weight"


def explanation(key: str, value: Any) -> Change:
    return lambda settings, arrays: settings["explanation"].__setitem__(key, value)


FORGED: dict[str, Change] = {
    "a nan among the calibration scores": value("calibration", np.nan),
    "calibration scores out of order": array("calibration", lambda a: a[::-1]),
    "too few calibration scores": array("calibration", lambda a: a[:5]),
    "no calibration score": array("calibration", lambda a: a[:0]),
    "one calibration score less": array("calibration", lambda a: a[1:]),
    "other scores by group": array("grouped", lambda a: a + 1),
    "an infinite floor": value("gradient_norms.floor", np.inf),
    "a negative floor": value("gradient_norms.floor", -1.0),
    "a floor of another length": array("gradient_norms.floor", lambda a: a[1:]),
    "a nan in the density": value("gradient_norms.density.norms.mean", np.nan),
    "a standard deviation of zero": value("gradient_norms.density.norms.sd", 0.0),
    "a mean that would be broadcast": array("gradient_norms.density.norms.mean", lambda a: a[:1]),
    "axes of another width": array("gradient_norms.density.norms.axes", lambda a: a[:, 1:]),
    "fewer variances than axes": array("gradient_norms.density.norms.variances", lambda a: a[1:]),
    "an unknown rule of shrinkage": value("gradient_norms.density.norms.shrinkage", 9.0),
    "weights that do not add up to one": array(f"{MIXTURE}.weights", lambda a: 2 * a),
    "terms that the density has not": value("gradient_norms.density.sizes", 1.0),
    "single precision": array("layer_mean", lambda a: a.astype(np.float32)),
    "text in the place of numbers": array("layer_sd", lambda a: np.zeros(len(a), np.uint8)),
    "a scalar in the place of an array": array("layer_sd", lambda a: 1.0),
    "swapped arrays": swap(f"{GAUSSIAN}.axes", f"{MIXTURE}.centres"),
    "an array too few": lambda settings, arrays: arrays.pop("layer_sd"),
    "an array too many": lambda settings, arrays: arrays.update(more=np.zeros(3)),
    "the arrays of another density": part("density", "Maximum"),
    "an unknown density": part("density", "os.system"),
    "a density that is no name": part("density", ["Maximum"]),
    "no column": part("columns", []),
    "a column twice": lambda settings, arrays: settings["parts"][NORMS]["columns"].append(
        settings["parts"][NORMS]["columns"][0]
    ),
    "a feature of no layer": rename_feature,
    "every column dropped": lambda s, arrays: s["parts"][NORMS].update(
        dropped=dict.fromkeys(s["parts"][NORMS]["columns"], "dead")
    ),
    "a dropped column that is none": part("dropped", {"nowhere": "dead"}),
    "no part": setting("parts", []),
    "parts that are no list": setting("parts", {"kind": "values"}),
    "a part that is no mapping": setting("parts", ["values"]),
    "a part twice": lambda s, arrays: s["parts"].append(s["parts"][0]),
    "a part too few": lambda s, arrays: s["parts"].pop(),
    "an unknown kind of part": part("kind", "os.system"),
    "a kind that is no name": part("kind", ["values"]),
    "an unknown key of a part": part("more", 1),
    "a floor of gradient norms": part("floor", "median"),
    "an unknown floor": part("floor", "most", at=1),
    "no floor of sums of squares": lambda s, arrays: s["parts"][1].pop("floor"),
    "terms of a forward pass": part("terms", {"latent_1": True}, at=0),
    "an unknown method": setting("method", "os.system"),
    "a method that is no name": setting("method", ["forward"]),
    "an unknown kind of sample": setting("sample", "sound"),
    "a reason that is no text": setting("reason", 1),
    "known scores out of order": array("values.tail", lambda a: a[::-1]),
    "a known score less": array("values.tail", lambda a: a[1:]),
    "a scale of zero": value("expected_norms.scale", 0.0),
    "a centre of another length": array("values.centre", lambda a: a[1:]),
    "layers in another order": lambda settings, arrays: settings["layers"].reverse(),
    "a negative shape": lambda settings, arrays: settings["parameters"].update(a=[3, -1]),
    "a shape of fractions": lambda settings, arrays: settings["parameters"].update(a=[2.5]),
    "no shape at all": setting("parameters", {}),
    "samples that are no shapes": setting("samples", ["__import__('os')"]),
    "weights that are no digest": setting("model", "../../etc"),
    "weights that are whole numbers": setting("dtype", "torch.int64"),
    "a count that is text": setting("fit_count", "many"),
    "a count that is true": setting("fit_count", True),
    "a format that is true": setting("format", True),
    "no options": setting("options", None),
    "an unknown option": option("adapter", "mine"),
    "an option of another type": option("calibration_fraction", "half"),
    "an option out of range": option("trim", 0.9),
    "a seed below zero": option("seed", -1),
    "a flag that is a number": option("any_size", 1),
    "any size of what has another at each": option("any_size", True),
    "groups of the adapter by a number": setting("groups_of_adapter", 1),
    "patterns that are none": option("layers", [1, 2]),
    "groups of other samples": setting("groups", ["a", "b"]),
    "memories of other scores": setting(
        "probe", {"samples": ["a"], "scores": [9e9], "groups": [0]}
    ),
    "groups of which none is told to be large": lambda settings, arrays: settings.pop(
        "large_groups"
    ),
    "a large group twice": setting("large_groups", ["a", "a"]),
    "a large group called as the others": setting("large_groups", ["others"]),
    "terms that are no flags": part("terms", {"latent_1": "yes"}),
    "no layers": lambda settings, arrays: settings.pop("layers"),
    "an explanation that is no mapping": setting("explanation", [1]),
    "an explanation of other layers": explanation("layers", ["nowhere"]),
    "an explanation of places without arrays": explanation("places", {"nowhere": [2]}),
    "places of another shape": lambda s, arrays: next(
        iter(s["explanation"]["places"].values())
    ).append(2),
    "an explanation without a reason": lambda s, arrays: s["explanation"].pop("without"),
    "an unknown key of an explanation": explanation("more", 1),
    "a deviation of zero": value("explanation.sd", 0.0),
    "a deviation of a place that is none": value("explanation.latent_1.place_sd", -1.0),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_forged_files_are_refused(change: Change, saved: Path) -> None:
    forge(saved, change)
    with pytest.raises(ValueError, match=f"{saved}: .*(Expected|format)"):
        load_from(saved)


def test_files_forged_without_a_change_are_loaded(saved: Path) -> None:
    forge(saved, lambda settings, arrays: None)
    assert load_from(saved).is_fitted


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_every_array_of_every_density_is_looked_at(make: Callable[[], Any], tmp_path: Path) -> None:
    detector = om.Detector(BRANCHES(), density=make())
    detector.fit([BRANCHES.data(100)], progress=False).save_pretrained(tmp_path, card=False)
    kept = {name: (tmp_path / name).read_bytes() for name in (CONFIG, TENSORS)}
    for name in set(load(kept[TENSORS])) - {"log_likelihood"}:
        for bad in (
            value(name, np.nan),
            array(name, lambda a: a[None]),
            array(name, lambda a: a[1:]),
        ):
            for file, content in kept.items():
                (tmp_path / file).write_bytes(content)
            forge(tmp_path, bad)
            with pytest.raises(ValueError, match=str(tmp_path)):
                om.Detector.from_pretrained(tmp_path, BRANCHES())


TEXTS: dict[str, Callable[[str], str]] = {
    "a key twice": lambda text: text.replace("{", '{"format": 1,', 1),
    "not a number": lambda text: text.replace('"fit_count": 60', '"fit_count": NaN'),
    "nested too deeply": lambda text: text.replace(
        "{", '{"a": ' + "[" * 10**5 + "]" * 10**5 + ",", 1
    ),
    "a number too long to read": lambda text: text.replace(
        '"fit_count": 60', '"fit_count": ' + "6" * 5000
    ),
    "half of it": lambda text: text[: len(text) // 2],
    "something after it": lambda text: text + "{}",
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_text_that_is_no_plain_json_is_refused(change: Callable[[str], str], saved: Path) -> None:
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(change(text))
    assert change(text) != text
    with pytest.raises(ValueError, match=f"{saved}: Expected JSON in {CONFIG}"):
        load_from(saved)


HEADERS: dict[str, bytes] = {
    "a header beyond any file": (2**63).to_bytes(8, "little"),
    "a header longer than the file": (10**6).to_bytes(8, "little"),
    "a header of a gigabyte": (2**30).to_bytes(8, "little") + b"{" * 100,
    "an empty header": bytes(8),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "nothing": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_tensors_that_are_none_are_refused(content: bytes, saved: Path) -> None:
    settings = json.loads((saved / CONFIG).read_text())
    del settings["checksum"]
    settings["checksum"] = _checksum(settings, content)
    (saved / CONFIG).write_text(json.dumps(settings))
    (saved / TENSORS).write_bytes(content)
    with pytest.raises(ValueError, match=f"{saved}: {TENSORS}: Expected safetensors"):
        load_from(saved)


# Files of older versions


def test_a_file_of_the_first_format_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"got 1\. It is of an earlier version: fit it again\."):
        Fitted.load(OLD / "plain")


# A process that dies

DIES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.small_cases import SMALL
import ood_monitor as om

replace, calls = Path.replace, 0

def dying(self, target):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

detector = om.Detector(SMALL["branches"](), seed=1)
detector.fit([SMALL["branches"].data(100)], progress=False)
Path.replace = dying
detector.save_pretrained({directory!r}, card=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_saving_never_mixes_two_detectors(at: int, tmp_path: Path) -> None:
    first = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False)
    first.save_pretrained(tmp_path, card=False)
    program = DIES.format(tests=str(Path(__file__).parents[1]), at=at, directory=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    if at == 1:
        found = om.Detector.from_pretrained(tmp_path, BRANCHES())
        assert found.fitted.fingerprint == first.fitted.fingerprint
    else:
        with pytest.raises(ValueError, match="do not belong together"):
            om.Detector.from_pretrained(tmp_path, BRANCHES())


def test_a_save_that_fails_leaves_the_old_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        load_from(saved).save_pretrained(saved, card=False)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
