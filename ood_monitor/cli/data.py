"""Samples to fit on or to score: a folder of images, an npz, a csv, a Hugging Face dataset."""

import csv
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Protocol
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_monitor.cli.files import open_regular
from ood_monitor.cli.images import MODES, ImageFormat, identified, is_image, no_image, opened
from ood_monitor.escaping import utf8

__all__ = ["Samples", "batches", "open_samples", "readable"]

#: What marks a folder as a dataset, and as several by the name of their split.
_DATASET, _DATASETS = "dataset_info.json", "dataset_dict.json"

#: Kinds of numpy's types that samples are made of.
_NUMBERS = "biuf"

#: How an array in an .npz says what it is, by version; later ones are for names of columns.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NPY = ".npy"


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
        # Of all kinds but folders: what is no regular file is refused by its name when it is read.
        files = sorted(p for p in root.rglob("*") if is_image(p.name) and not p.is_dir())
        if not files:
            raise ValueError(
                f"Expected images in {root}, got a folder without any: files that end in .png "
                "or .jpg, or in another suffix of an image, in it or below."
            )
        self._files = files
        self.ids: Sequence[str] = [utf8(file.relative_to(root).as_posix()) for file in files]
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


class Rows:
    """Rows of numbers in a .csv, whose first line may name the columns."""

    def __init__(self, path: Path, key: str | None, images: ImageFormat) -> None:
        if key is not None:
            raise ValueError(f"Expected no `--key` of a .csv, which is read whole, got {key!r}.")
        self._rows = _rows(path)
        if not len(self._rows):
            raise ValueError(f"Expected samples in {path}, got a file without any row of numbers.")
        self.ids: Sequence[str] = [str(i) for i in range(len(self._rows))]
        self.images = images.like(self.read(0).shape)

    def read(self, index: int) -> Tensor:
        """One row, (D,), in the default type."""
        return torch.from_numpy(self._rows[index]).to(torch.get_default_dtype())


class StoredDataset:
    """What `datasets.Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path, key: str | None, split: str | None, images: ImageFormat) -> None:
        rows = _dataset(path, split)
        self._key = _column(rows.column_names, key)
        self._rows = _undecoded(rows, self._key)
        if not len(self._rows):
            raise ValueError(f"Expected samples in {path}, got a dataset without any.")
        self.ids: Sequence[str] = [str(i) for i in range(len(self._rows))]
        self.images = images if _is_settled(images) else self._settled(images)

    def read(self, index: int) -> Tensor:
        """One image, (C, H, W), or another value as a tensor."""
        try:
            value = self._rows[index][self._key]
            if _is_picture(value):
                with _picture(value, f"row {index}") as image:
                    return self.images.tensor(image)
            return _row(np.asarray(value))
        except Exception as error:  # of the library's, of whatever the files hold
            raise ValueError(f"row {index}: {error}") from error

    def _settled(self, images: ImageFormat) -> ImageFormat:
        first = self._rows[0][self._key]
        if not _is_picture(first):
            return images
        with _picture(first, "row 0") as image:
            return images.settled(image)


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
    if (path / _DATASET).is_file() or (path / _DATASETS).is_file():
        return StoredDataset(path, key, split, images)
    if path.is_dir():
        return ImageFolder(path, images)
    if path.suffix == ".npz":
        return Arrays(path, key, images)
    if path.suffix == ".csv":
        return Rows(path, key, images)
    raise ValueError(
        "Expected a folder of images, an .npz file, a .csv of numbers or a Hugging Face dataset on "
        f"disk, got {path}."
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
        with open_regular(path, _most_bytes()) as file, ZipFile(file) as archive:
            names = [name.removesuffix(_NPY) for name in archive.namelist()]
            if key is None and len(names) == 1:
                key = names[0]
            if key not in names:
                raise ValueError(f"Expected `--key` to name one of {names}, got {key!r}.")
            member = archive.infolist()[names.index(key)]
            _check_header(archive, member)
            with archive.open(member) as stored:
                return np.asarray(np.lib.format.read_array(stored, allow_pickle=False))
    except OSError:
        raise
    except Exception as error:  # zip's, numpy's and pickle's refusals of damaged files
        raise ValueError(f"{path}: {error}") from error


def _check_header(archive: ZipFile, member: ZipInfo) -> None:
    """Compare what an array says of itself with what is there, before there is memory for it."""
    with archive.open(member) as stored:
        version = np.lib.format.read_magic(stored)
        if version not in _HEADERS:
            raise ValueError(f"Expected numbers, got an array of format {version}.")
        shape, _, dtype = _HEADERS[version](stored)
        said, there = math.prod(shape) * dtype.itemsize, member.file_size - stored.tell()
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"Expected numbers, got an array of {dtype}.")
    if said != there:
        raise ValueError(f"Expected {said:,} bytes of {dtype} {shape}, got {there:,}.")
    if said > _most_bytes():
        raise ValueError(
            f"Expected an array of at most {_most_bytes():,} bytes, half of this machine's memory, "
            f"got {said:,}: give a folder of images, or fewer samples."
        )


def _rows(path: Path) -> np.ndarray:
    """The numbers of a .csv, (N, D); what is no number is refused by its row and column."""
    with open_regular(path, _most_bytes()) as file, TextIOWrapper(file, "utf-8-sig") as lines:
        skipped = 0 if _are_numbers(next(csv.reader([lines.readline()]), [])) else 1
        lines.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a file without rows
                return np.loadtxt(
                    lines, delimiter=",", ndmin=2, skiprows=skipped, quotechar='"', comments=None
                )
        except ValueError as error:
            after = ", after the line of names" if skipped else ""
            raise ValueError(
                f"{path}: expected numbers alone, and as many in each row, counted from 0{after}: "
                f"{error}"
            ) from error


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _most_bytes() -> int:
    """Half of this machine's memory; 8 GiB where it cannot be asked."""
    if not hasattr(os, "sysconf"):
        return 2**33
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _row(row: np.ndarray) -> Tensor:
    if row.dtype.kind not in _NUMBERS:
        raise ValueError(f"Expected numbers, got an array of {row.dtype}.")
    if row.dtype != np.uint8:
        try:
            return torch.from_numpy(np.array(row))
        except TypeError as error:  # such as numbers of 128 bits
            raise ValueError(f"Expected numbers that torch has, got {row.dtype}.") from error
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


def _undecoded(rows: Any, key: str) -> Any:
    """Rows with images as files, which no decoder of Pillow's choice has met."""
    image = importlib.import_module("datasets").Image
    is_images = isinstance(rows.features[key], image)
    return rows.cast_column(key, image(decode=False)) if is_images else rows


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _picture(value: dict[str, Any], name: str) -> AbstractContextManager[Image.Image]:
    content, path = value["bytes"], value["path"]
    return opened(str(path)) if content is None else identified(BytesIO(content), name)


def _column(names: Sequence[str], key: str | None) -> str:
    if key is None:
        key = next((name for name in ("image", "img") if name in names), None)
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        raise ValueError(f"Expected `--key` to name one of {list(names)}, got {key!r}.")
    return str(key)
