"""Samples to fit on or to score: a folder of images, an npz, a Hugging Face dataset on disk."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_monitor.cli.images import MODES, ImageFormat, is_image, no_image, opened

__all__ = ["Samples", "batches", "open_samples", "readable"]

#: What marks a folder as a dataset, and as several by the name of their split.
_DATASET, _DATASETS = "dataset_info.json", "dataset_dict.json"


class Samples(Protocol):
    """A number of samples, each with a name, read when asked for.

    Attributes:
        ids: File names, or numbers.
        images: How images are read; settled where these are images.
    """

    ids: Sequence[str]
    images: ImageFormat

    def read(self, index: int) -> Tensor:
        """One sample.

        Raises:
            ValueError: It cannot be read.
        """


class ImageFolder:
    """The images below a folder, in the order of their names."""

    def __init__(self, root: Path, images: ImageFormat) -> None:
        files = sorted(p for p in root.rglob("*") if is_image(p.name) and p.is_file())
        if not files:
            raise ValueError(f"Expected images in {root}, got a folder without any.")
        self._files = files
        self.ids: Sequence[str] = [file.relative_to(root).as_posix() for file in files]
        self.images = images if _is_settled(images) else _settled(images, files[0])

    def read(self, index: int) -> Tensor:
        """One image, (C, H, W)."""
        return self.images.read(self._files[index])


class Arrays:
    """Rows of an array; those of bytes are images (N, H, W) or (N, H, W, 1 or 3)."""

    def __init__(self, path: Path, key: str | None, images: ImageFormat) -> None:
        self._rows = _array(path, key)
        if self._rows.ndim == 0 or not len(self._rows):
            raise ValueError(f"Expected samples in {path}, got shape {self._rows.shape}.")
        self.ids: Sequence[str] = [str(i) for i in range(len(self._rows))]
        self.images = images.like(self.read(0).shape)

    def read(self, index: int) -> Tensor:
        """One row; of bytes (C, H, W) in [0, 1]."""
        return _row(self._rows[index])


class StoredDataset:
    """What `datasets.Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path, key: str | None, split: str | None, images: ImageFormat) -> None:
        self._rows = _dataset(path, split)
        self._key = _column(self._rows.column_names, key)
        if not len(self._rows):
            raise ValueError(f"Expected samples in {path}, got a dataset without any.")
        self.ids: Sequence[str] = [str(i) for i in range(len(self._rows))]
        first = self._rows[0][self._key]
        pictures = isinstance(first, Image.Image) and not _is_settled(images)
        self.images = images.settled(first) if pictures else images

    def read(self, index: int) -> Tensor:
        """One image, (C, H, W), or another value as a tensor."""
        try:
            value = self._rows[index][self._key]
            if isinstance(value, Image.Image):
                return self.images.tensor(value)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"row {index}: {error}") from error
        return _row(np.asarray(value))


def open_samples(
    path: Path,
    images: ImageFormat,
    *,
    key: str | None = None,
    split: str | None = None,
) -> Samples:
    """The samples at a path, by what it holds.

    Args:
        path: A folder or a file.
        images: How images are read.
        key: Which array or column.
        split: Which of several datasets.

    Raises:
        ValueError: Nothing that is known, or nothing in it.
        FileNotFoundError: There is none.
        ImportError: It takes a library that is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected data at {path}, got nothing there.")
    if (path / _DATASET).exists() or (path / _DATASETS).exists():
        return StoredDataset(path, key, split, images)
    if path.is_dir():
        return ImageFolder(path, images)
    if path.suffix == ".npz":
        return Arrays(path, key, images)
    raise ValueError(
        f"Expected a folder of images, an .npz file or a Hugging Face dataset on disk, got {path}."
    )


def batches(samples: Samples, indices: Sequence[int], size: int) -> Iterator[Tensor]:
    """Samples (B, ...), in the order of the indices.

    Raises:
        ValueError: One cannot be read, or differs from its neighbours.
    """
    for start in range(0, len(indices), size):
        yield torch.stack([samples.read(i) for i in indices[start : start + size]])


def readable(samples: Samples, indices: Sequence[int]) -> tuple[Tensor, dict[str, str]]:
    """Samples (B, ...), and why others could not be read, by name; those are nan."""
    rows: dict[int, Tensor] = {}
    reasons: dict[str, str] = {}
    for i in indices:
        try:
            rows[i] = samples.read(i)
        except (OSError, ValueError) as error:
            reasons[samples.ids[i]] = str(error)
    shape = next(iter(rows.values())).shape if rows else samples.images.shape
    nothing = no_image(shape)
    return torch.stack([rows.get(i, nothing) for i in indices]), reasons


def _is_settled(images: ImageFormat) -> bool:
    return images.mode is not None and images.size is not None


def _settled(images: ImageFormat, file: Path) -> ImageFormat:
    with opened(file) as image:
        return images.settled(image)


def _array(path: Path, key: str | None) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            if key is None and len(names) == 1:
                key = names[0]
            if key not in names:
                raise ValueError(f"Expected `--key` to name one of {names}, got {key!r}.")
            return np.asarray(file[key])
    except Exception as error:  # zip's, numpy's and pickle's refusals of damaged files
        raise ValueError(f"{path}: {error}") from error


def _row(row: np.ndarray) -> Tensor:
    if row.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers, got an array of {row.dtype}.")
    if row.dtype != np.uint8:
        return torch.from_numpy(np.array(row))
    image = row[..., None] if row.ndim == 2 else row
    if image.ndim != 3 or image.shape[2] not in MODES.values():
        raise ValueError(f"Expected bytes of images (H, W) or (H, W, 1 or 3), got {row.shape}.")
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)


def _dataset(path: Path, split: str | None) -> Any:
    try:
        datasets = importlib.import_module("datasets")  # which mypy cannot see
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected the package `datasets` to read {path}: pip install datasets."
        ) from error
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, dict):
        return found
    if split is None and len(found) == 1:
        [split] = found
    if split not in found:
        raise ValueError(f"Expected `--split` to name one of {list(found)}, got {split!r}.")
    return found[split]


def _column(names: Sequence[str], key: str | None) -> str:
    if key is None:
        key = next((name for name in ("image", "img") if name in names), None)
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        raise ValueError(f"Expected `--key` to name one of {list(names)}, got {key!r}.")
    return str(key)
