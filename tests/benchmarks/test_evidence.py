"""What the evidence rests on: the sets, the split, the models, and that methods see the same."""

import dataclasses
import functools
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import (
    colour,
    datasets,
    denoisers,
    evidence_page,
    kinds,
    methods,
    protocol,
    summary,
    train,
    zoo,
)
from benchmarks.detection.pixelcnn import PixelCNN
from benchmarks.detection.trained import Watched

FOLDER = datasets.SOURCES["MNIST"].folder
LABELS = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)
IMAGES = np.random.default_rng(0).integers(256, size=(6, 28, 28), dtype=np.uint8)


def as_npz(folder: Path, images: np.ndarray) -> None:
    labels = {"train_labels": LABELS[:4], "test_labels": LABELS}
    np.savez_compressed(folder / "mnist_28x28.npz", train=images[:4], test=images, **labels)


def as_idx(folder: Path, images: np.ndarray, *, zipped: bool) -> None:
    files = {
        "train-images-idx3-ubyte": images[:4],
        "t10k-images-idx3-ubyte": images,
        "train-labels-idx1-ubyte": LABELS[:4],
        "t10k-labels-idx1-ubyte": LABELS,
    }
    for stem, part in files.items():
        head = bytes([0, 0, 8, part.ndim])
        data = head + np.array(part.shape, ">u4").tobytes() + part.tobytes()
        name = stem + ".gz" * zipped
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / name).write_bytes(gzip.compress(data) if zipped else data)


def as_dataset(folder: Path, images: np.ndarray) -> None:
    splits = {"train": images[:4], "test": images}
    found = {
        k: Dataset.from_dict(
            {"image": [Image.fromarray(i) for i in v], "label": LABELS[: len(v)].tolist()}
        )
        for k, v in splits.items()
    }
    DatasetDict(found).save_to_disk(folder / FOLDER)


FORMS = {
    "npz": as_npz,
    "IDX": functools.partial(as_idx, zipped=False),
    "IDX, zipped": functools.partial(as_idx, zipped=True),
    "dataset": as_dataset,
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_sets_are_read_in_every_form(write: Any, tmp_path: Path) -> None:
    write(tmp_path, IMAGES)
    assert np.array_equal(datasets.read(tmp_path, "MNIST", "test"), IMAGES)
    assert np.array_equal(datasets.read(tmp_path, "MNIST", "train"), IMAGES[:4])
    assert not datasets.missing(tmp_path, ["MNIST"])
    assert np.array_equal(datasets.labels(tmp_path, "MNIST", "test"), LABELS)
    assert np.array_equal(datasets.labels(tmp_path, "MNIST", "train"), LABELS[:4])


def test_what_is_not_there_is_named_with_its_origin(tmp_path: Path) -> None:
    words = datasets.missing(tmp_path, datasets.SOURCES)
    assert all(
        source.file in words and source.origin in words for source in datasets.SOURCES.values()
    )
    with pytest.raises(FileNotFoundError, match="mnist_28x28"):
        datasets.read(tmp_path, "MNIST", "test")


@pytest.mark.parametrize("name", kinds.kinds())
def test_denoisers_of_every_kind_train_and_are_measured_with_their_label(name: str) -> None:
    kind = kinds.kinds()[name]
    network = kind.make()
    x = torch.randn(4, *((4, 8, 8) if kind.latent else (1, 16, 16)))
    labelled = kinds.with_labels(x, torch.tensor([0, 3, 9, 5]))
    kinds.denoising(kind, network, labelled).backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())
    bound = kinds.bound(kind, network.eval(), null_condition=denoisers.none_of)
    assert bound.conditions(labelled)["class_labels"].tolist() == [0, 3, 9, 5]
    names = [name for name, _ in bound.residuals(labelled)]
    assert len(names) == 3
    assert names[-1].endswith("/null")
    _, labels = kinds.parted(denoisers.mislabelled(labelled))
    assert (labels != torch.tensor([0, 3, 9, 5])).all()
    assert (labels < kinds.NONE).all()


def test_another_file_is_no_idx(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(ValueError, match=re.escape("got b'oth'")):
        datasets.idx(tmp_path / "file")


def test_what_is_trained_on_may_be_in_several_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("Expected sets of images")):
        datasets.read(tmp_path, "CIFAR-10", "train")
    np.savez(tmp_path / "cifar10_test_32x32.npz", test=IMAGES)
    with pytest.raises(FileNotFoundError, match=re.escape("Expected cifar10_train_*.npz")):
        datasets.read(tmp_path, "CIFAR-10", "train")
    for part in (1, 2):
        np.savez(tmp_path / f"cifar10_train_part{part}.npz", train=IMAGES + part)
    found = datasets.read(tmp_path, "CIFAR-10", "train")
    assert np.array_equal(found, np.concatenate([IMAGES + 1, IMAGES + 2]))
    assert np.array_equal(datasets.read(tmp_path, "CIFAR-10", "test"), IMAGES)


def test_sets_of_both_sizes_have_the_same_rim() -> None:
    grey = datasets.harmonised(IMAGES)
    colour = datasets.harmonised(np.full((2, 32, 32, 3), 200, np.uint8))
    assert torch.equal(grey[:, 0, 2:-2, 2:-2], torch.from_numpy(IMAGES))
    assert colour.shape == (2, 1, 32, 32)
    assert (colour[:, :, 2:-2, 2:-2] == 200).all()
    for images in (grey, colour):
        assert images[:, :, :2].sum() + images[:, :, :, -2:].sum() == 0


def test_an_image_in_two_sets_is_refused() -> None:
    images = torch.from_numpy(IMAGES)
    protocol.check_disjoint({"fit": images[:3], "test": images[3:]})
    with pytest.raises(ValueError, match="in fit and in test"):
        protocol.check_disjoint({"fit": images[:3], "test": images[2:]})
    assert len(protocol.unlike(images, images[:2], images[5:])) == 3


def test_the_split_leaves_out_what_was_trained_on(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for source in datasets.SOURCES.values():
        few = generator.integers(256, size=(5, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / f"{source.file}.npz", test=few)
    trained_on = zoo.TRAINED_ON["MNIST"].images
    every = generator.integers(256, size=(trained_on + 9, 28, 28), dtype=np.uint8)
    every[-1], test = every[0], np.concatenate([every[:2], every[-5:-4], IMAGES])
    np.savez(tmp_path / "mnist_28x28.npz", train=every, test=test)
    found = protocol.sets(tmp_path, "MNIST", protocol.Sizes(fit=4, calibration=4, test=6, ood=3))
    assert {name: len(images) for name, images in found.items()} == {
        **{"fit": 4, "calibration": 4, "test": 6, "Fashion-MNIST": 3, "EMNIST letters": 3},
        **{"GTSRB": 3, "Chars74K": 3, "CIFAR-10": 3},
    }
    seen = set(protocol.digests(datasets.harmonised(every[:trained_on])))
    assert not seen & {d for images in found.values() for d in protocol.digests(images)}


def test_auroc_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    normal, odd = generator.normal(size=50).round(1), generator.normal(0.5, size=30).round(1)
    expected = roc_auc_score([0] * 50 + [1] * 30, np.concatenate([normal, odd]))
    assert protocol.auroc(normal, odd) == pytest.approx(expected)
    low, high = protocol.interval(normal, odd)
    assert low < expected < high


def test_the_flagged_share_and_the_delay_are_those_of_the_library() -> None:
    generator = np.random.default_rng(0)
    calibration, test = generator.normal(size=(2, 500))
    found = protocol.flagged(calibration, test)
    assert found["nominal_within"]
    assert not protocol.flagged(calibration, test + 1)["nominal_within"]
    assert protocol.flagged(calibration[:50], test)["flagged"] is None
    assert protocol.delay(calibration, test, test + 10, runs=3) < 60
    assert protocol.delay(calibration, test, test, runs=3) > 60


def test_a_pixel_is_predicted_from_those_before_it() -> None:
    torch.manual_seed(0)
    net = PixelCNN(4, width=8, depth=2)
    tokens = torch.randint(4, (1, 5, 5))
    changed = tokens.clone()
    changed[0, 2, 3] = (tokens[0, 2, 3] + 1) % 4
    different = (net(tokens) != net(changed)).any(1)[0].flatten()
    at = 2 * 5 + 3
    assert not different[: at + 1].any()
    assert different[at + 1 :].any()


def tiny(steps: int) -> Watched:
    return dataclasses.replace(zoo.tiny()["VAE"], steps=steps, batch=4)


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_training_keeps_weights_along_the_way_and_goes_on_where_it_was(tmp_path: Path) -> None:
    file, folder = tmp_path / "weights.safetensors", tmp_path / "folder"
    data, held_out = images(40), images(8)
    train.train(tiny(100), data, held_out, folder, file)
    steps = sorted(int(path.stem) for path in folder.glob("*.safetensors"))
    assert steps == [1, 3, 10, 30, 100]
    module, facts = zoo.load(tiny(100), file)
    assert facts["steps"] == "100"
    assert not module.training
    train.train(tiny(100), data, held_out, folder, file)  # from its checkpoint: nothing is left
    again, _ = zoo.load(tiny(100), file)
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_the_time_of_training_counts_from_its_first_start(tmp_path: Path) -> None:
    file, folder = tmp_path / "weights.safetensors", tmp_path / "folder"
    for _ in range(2):  # the second goes on from the last checkpoint, to the same end
        train.train(tiny(0), images(40), images(8), folder, file, seconds=3.0)
        _, facts = zoo.load(tiny(0), file)
        assert float(facts["seconds"]) >= 3
    assert (folder / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_models_of_colour_images_are_trained_by_the_clock_and_compared(tmp_path: Path) -> None:
    images, tested = colour.photographs()
    found = list(colour.rows("a photograph", colour.tiny(), images, tested, tmp_path, seconds=1.0))
    default = [row for row in found if row["method"] == methods.DEFAULT]
    assert [row["group"] for row in default] == [1, 5]
    assert list(default[0]["auroc"]) == ["flower"]
    assert float(default[0]["training"]["seconds"]) >= 1
    assert default[0]["training"]["images"] == "500"


def test_colour_images_are_split_as_others_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in (colour.ON, *colour.OTHERS):
        few = generator.integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{datasets.EVERY[name].file}.npz", test=few)
    every = generator.integers(256, size=(colour.HELD_OUT + 9, 32, 32, 3), dtype=np.uint8)
    every[-1] = every[0]
    np.savez(tmp_path / "cifar10_train_1.npz", train=every)
    sizes = protocol.Sizes(fit=4, calibration=4, test=6, ood=3)
    images, found = colour.sets(tmp_path, sizes)
    assert np.array_equal(images, every[:9].transpose(0, 3, 1, 2))
    assert {name: len(images) for name, images in found.items()} == {
        **{"fit": 4, "calibration": 4, "test": 6, "CIFAR-100": 3, "GTSRB": 3, "Chars74K": 3},
    }
    assert not {*protocol.digests(images)} & {
        digest for images in found.values() for digest in protocol.digests(images)
    }


@pytest.mark.parametrize("model", zoo.tiny())
def test_every_method_sees_every_model(model: str) -> None:
    watched = zoo.tiny()[model]
    torch.manual_seed(0)
    module = watched.make().eval()
    found = {name: methods.seen(watched, module, images(40), 1) for name in ("fit", "test", "odd")}
    views = methods.views(found)
    missing = {name for name, method in methods.METHODS.items() if method.view not in views}
    of_one_model = {"default, rows": "VAE", "MSMA": "UNet"} | dict.fromkeys(
        ("log-likelihood, T = 1", "typicality, T = 1"), "UNet"
    )
    assert missing == {name for name, its in of_one_model.items() if its != model}
    for name in methods.METHODS.keys() - missing:
        method = methods.METHODS[name]
        scores = protocol.scored(method.make(found["fit"].terms), views[method.view])
        assert scores.keys() == {"test", "odd"}
        assert np.isfinite(scores["test"]).all()


def test_the_default_density_is_the_detectors() -> None:
    watched = zoo.tiny()["Glow"]
    module = watched.make().eval()
    x = watched.prepare(images(80))
    made = om.Detector(watched.adapter(module), method="gradient_norms", chunk_size=50)
    detector = made.fit([x], progress=False)
    fit = detector.measure(x)
    order = detector._fitting(detector.measure(x))._split(80)[0]
    view = methods.default_view({"fit": fit.take(order), "test": fit})
    scores = protocol.scored(methods.default(fit.take(order)), view)
    assert scores["test"] == pytest.approx(detector.score(x).score.numpy(), rel=1e-6)


def test_passes_are_kept_as_they_were(tmp_path: Path) -> None:
    watched = zoo.tiny()["UNet"]
    torch.manual_seed(0)
    module = watched.make().eval()
    make = functools.partial(methods.seen, watched, module, images(10), 1)
    first = methods.cached(tmp_path / "x.npz", make)
    second = methods.cached(tmp_path / "x.npz", lambda: pytest.fail("measured twice"))
    assert np.array_equal(first.terms.norms, second.terms.norms)
    assert np.array_equal(first.bits, second.bits)
    assert first.scores is not None
    assert second.scores is not None
    assert np.array_equal(first.scores, second.scores)


def test_a_group_is_as_likely_as_its_samples_are_on_average() -> None:
    watched = zoo.tiny()["VAE"]
    adapter = watched.adapter(watched.make().eval())
    x = watched.prepare(images(10))
    single, grouped = methods.measured(adapter, x, 1), methods.measured(adapter, x, 5)
    means = single.log_likelihood.reshape(2, 5, -1).mean(1)
    assert grouped.log_likelihood == pytest.approx(means)
    assert len(grouped) == 2


def test_the_committed_pages_are_of_the_committed_results() -> None:
    """Where they are not, `python -m benchmarks.detection.evidence_page` writes them anew."""
    root = Path(__file__).parents[2]
    for name, text in evidence_page.rendered(root / "benchmarks" / "results").items():
        assert (root / "docs" / name).read_text() == text


def test_what_was_not_measured_is_named_with_its_command(tmp_path: Path) -> None:
    written = evidence_page.rendered(tmp_path)
    for page in evidence_page.PAGES:
        for name in page.sections:
            text = f"Not measured yet: `python -m benchmarks.{page.package}.{name}`."
            assert text in written[page.file]


def test_the_first_screen_is_one_figure_and_one_table_of_twelve_lines() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    page = evidence_page.rendered(results)["evidence.md"]
    assert page.count("![") == 1
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == 1 + 12
    assert len(page.replace("|", " ").split()) < 700
    assert len(summary.figure(evidence_page.read(results)).axes) == len(summary.MODELS)


def rate_by_loop(normal: np.ndarray, odd: np.ndarray) -> float:
    """Of the highest threshold that finds 95 %, tried one by one."""
    for threshold in sorted({*normal, *odd}, reverse=True):
        if sum(score >= threshold for score in odd) >= 0.95 * len(odd):
            return sum(score >= threshold for score in normal) / len(normal)
    raise AssertionError


# Ties; a threshold on a straight piece of the curve, which has no corner there; all and none.
@pytest.mark.parametrize(
    ("normal", "odd"),
    [
        (np.arange(60) % 7, 3 + np.arange(40) % 9),
        (np.arange(100) / 10, np.r_[np.full(20, 50.0), np.arange(20) / 2.5]),
        (np.arange(50.0), np.arange(50.0) + 100),
        (np.arange(50.0), np.arange(50.0) - 100),
    ],
)
def test_a_rate_is_of_the_highest_threshold_that_finds_95_percent(
    normal: np.ndarray, odd: np.ndarray
) -> None:
    assert protocol.fpr_at_tpr(normal, odd) == pytest.approx(rate_by_loop(normal, odd))


def test_a_curve_without_corners_has_the_rates_between_its_ends() -> None:
    normal = odd = np.arange(100.0)
    assert protocol.fpr_at_tpr(normal, odd) == pytest.approx(0.95)


def test_what_is_found_goes_by_p_values_and_is_not_told_where_none_can_be_small() -> None:
    scores = {"calibration": np.arange(99.0), "test": np.zeros(2), "odd": np.array([98.5, 98, 200])}
    assert protocol.caught(scores) == {"odd": 0.6667}
    assert protocol.judged(scores, 2)["found"] == {"odd": 0.6667}
    few = scores | {"calibration": np.arange(98.0)}
    assert protocol.caught(few) == {}


def test_an_image_that_overflows_is_as_unlikely_as_can_be() -> None:
    adapter = om.LogLikelihood(om.models.Glow(channels=1, size=8))
    x = images(40) / 255
    far = torch.cat([x[:2], torch.full_like(x[:1], 1e30)])
    found = {name: methods.measured(adapter, v, 1) for name, v in (("fit", x), ("far", far))}
    scores = protocol.scored(om.DiagonalGaussian(), methods.log_norms(found))
    assert np.isfinite(found["far"].log_likelihood).all()
    assert np.isfinite(scores["far"]).all()
    assert scores["far"][2] > scores["far"][:2].max()
