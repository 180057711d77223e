"""Images from files, as a model takes them: colours and size are settled by the fit.

A file is anybody's. It is decoded by :data:`FORMATS` alone, after its header has said a size that
the model takes, and whatever its decoder raises is a ``ValueError``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ood_monitor.cli.files import open_regular

__all__ = ["FORMATS", "MODES", "ImageFormat", "identified", "is_image", "no_image", "opened"]

#: What is decoded, by the file's content: what cameras, scanners, browsers and data sets write.
#: Pillow reads forty more, one of which (EPS) it hands to another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: Pixels of an image that is resized, at most; one that is not has those that the model takes.
MOST_PIXELS = 2**26

#: Bytes of a file, at most: of so many pixels without compression, in 16 bits and four channels.
_MOST_BYTES = 8 * MOST_PIXELS

#: PIL's names of grey and colour images, with their channels.
MODES = {"L": 1, "RGB": 3}

_LARGEST = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0}


@dataclass(frozen=True)
class ImageFormat:
    """How images become tensors (C, H, W) in [0, 1].

    Attributes:
        mode: ``"L"`` for grey, ``"RGB"`` for colour; None as the first image is.
        size: Height and width in pixels; None as those of the first image.
        resize: Whether images of another size are resized, or refused.
    """

    mode: str | None = None
    size: tuple[int, int] | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"Expected mode {' or '.join(MODES)}, got {self.mode!r}.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"Expected a height and a width of at least 1, got {self.size}.")

    @classmethod
    def parse(cls, settings: dict[str, Any]) -> Self:
        """What :meth:`settings` gave."""
        size = settings.get("size")
        whole = None if size is None else tuple(int(side) for side in size)
        return cls(settings.get("mode"), whole, bool(settings.get("resize", False)))  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """As JSON can hold it."""
        size = None if self.size is None else list(self.size)
        return {"mode": self.mode, "size": size, "resize": self.resize}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image's tensor.

        Raises:
            ValueError: Colours or size are not known yet.
        """
        if self.mode is None or self.size is None:
            raise ValueError(
                "Expected the images' mode and size, as model.json has them, got none: no image "
                "could be read, or the detector came without that file."
            )
        return MODES[self.mode], *self.size

    def settled(self, image: Image.Image) -> Self:
        """This format, with what is open as in an image.

        Raises:
            ValueError: It is too large to be a model's.
        """
        _check_pixels(image)
        grey = image.mode in ("1", "L", "LA", *_LARGEST)
        size = self.size or (image.height, image.width)
        return replace(self, mode=self.mode or ("L" if grey else "RGB"), size=size)

    def like(self, shape: Sequence[int]) -> Self:
        """This format, with what is open as in a sample (C, H, W), if that is an image's shape."""
        modes = {channels: mode for mode, channels in MODES.items()}
        if len(shape) != 3 or shape[0] not in modes:
            return self
        size = self.size or (int(shape[1]), int(shape[2]))
        return replace(self, mode=self.mode or modes[shape[0]], size=size)

    def read(self, path: str | PathLike[str]) -> Tensor:
        """The image in a file, (C, H, W) in [0, 1].

        Raises:
            ValueError: No image, a damaged one, or one of another size.
        """
        with opened(path) as image:
            return self.tensor(image)

    def tensor(self, image: Image.Image) -> Tensor:
        """An image as (C, H, W) in [0, 1]; it is decoded when its size is known to be right.

        Raises:
            ValueError: Its pixels have no known range, or its size is another.
        """
        channels, height, width = self.shape
        if (image.height, image.width) != (height, width) and not self.resize:
            raise ValueError(
                f"Expected an image of {height} x {width} pixels, got {image.height} x "
                f"{image.width}: `--size {height}x{width}` when fitting resizes."
            )
        _check_pixels(image)
        values = _values(image, str(self.mode), (width, height))
        return torch.from_numpy(values).reshape(height, width, channels).permute(2, 0, 1)


def no_image(shape: Sequence[int]) -> Tensor:
    """What stands for an image that cannot be read: nan, of the type of those that can."""
    return torch.full(tuple(shape), torch.nan, dtype=torch.float32, device="cpu")


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[Image.Image]:
    """The image in a file, not yet decoded; what is raised inside is a ``ValueError`` too.

    Raises:
        ValueError: It holds none, or it is no regular file.
    """
    try:
        file = open_regular(path, _MOST_BYTES)
    except OSError as error:
        raise ValueError(str(error)) from error
    with file, identified(file, str(path)) as image:
        yield image


@contextmanager
def identified(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """The image in an open file, not yet decoded; what is raised inside is a ``ValueError`` too.

    Raises:
        ValueError: It holds none of :data:`FORMATS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"Expected an image in {name} ({', '.join(FORMATS)}), got something else."
        ) from error
    except Exception as error:  # decoders raise anything: MemoryError, struct's, their own
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {kind}{error}") from error


def _check_pixels(image: Image.Image) -> None:
    """Refuse an image that would take too much memory, by what its header says.

    Raises:
        ValueError: It has more than :data:`MOST_PIXELS`.
    """
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"Expected an image of at most {MOST_PIXELS:,} pixels, got {image.height:,} x "
            f"{image.width:,}."
        )


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return name.lower().endswith(_suffixes()) and not name.startswith(".")


def _suffixes() -> tuple[str, ...]:
    readable: Sequence[str] = [
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    ]
    return tuple(readable)


def _values(image: Image.Image, mode: str, size: tuple[int, int]) -> np.ndarray:
    largest = _LARGEST.get(image.mode)
    if largest is None and image.mode in ("I", "F"):
        raise ValueError(f"Expected 8 or 16 bits a channel, got an image of mode {image.mode!r}.")
    if largest is not None:  # which PIL would clip at 255
        pixels = np.asarray(image, dtype=np.float32) / largest
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image = image.convert(mode)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / 255
