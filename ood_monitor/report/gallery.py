"""The samples themselves: pictures or texts, with the places that surprise the model."""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_monitor.adapters.base import Batch, first_tensor
from ood_monitor.densities import Array
from ood_monitor.detector.detector import Detector
from ood_monitor.detector.explaining import Explanation

__all__ = ["MOST", "Exhibit", "Gallery"]

#: Samples that are shown of each kind.
MOST = 8

#: The longest side of a picture, and the shortest that it is enlarged to, in pixels.
_LARGEST, _SMALLEST = 112, 96

#: Tokens of a text that are shown.
_TOKENS = 160

#: Standard deviations at which a place is marked in full; and the levels that a token is marked by.
_FULL, _LEVELS = 4.0, 4

#: Less likely than expected, and more, in red, green and blue.
_LESS, _MORE = (213, 94, 0), (0, 114, 178)


@dataclass(frozen=True)
class Exhibit:
    """One sample as a page shows it.

    Attributes:
        id: What it is called.
        p_value: Its conformal p-value.
        image: (H, W, 3), bytes; None where it is no image.
        tokens: Of a text its tokens, as text; None where it is none.
        surprise: Where elements are known, log p less what the model expected: (H', W') of an image
            in ``unit``, (T,) of T tokens in nats; below 0 it is less likely than expected.
        unit: ``"sd"``, standard deviations of held-out samples at that place, or ``"nats"``.
    """

    id: str
    p_value: float
    image: NDArray[np.uint8] | None = None
    tokens: Sequence[str] | None = None
    surprise: Array | None = None
    unit: str = "nats"

    @classmethod
    def each(
        cls,
        detector: Detector,
        batch: Batch,
        *,
        ids: Sequence[str],
        p_values: Sequence[float],
        images: Tensor | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> tuple[Self, ...]:
        """Of B samples, with what the detector says of their places.

        Args:
            detector: Explains them by place, in one pass.
            batch: As the detector scores it.
            ids: What they are called.
            p_values: Theirs.
            images: (B, 1 or 3, H, W) in [0, 1], where they are images.
            tokens: Of B texts, where they are such, from their first token on, without padding.

        Raises:
            ValueError: As :meth:`~ood_monitor.Detector.explain`; other numbers of samples; or
                tokens that are not those of the batch's columns.
        """
        counts = [len(it) for it in (ids, p_values, images, tokens) if it is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"Expected one of each kind a sample, got {counts}.")
        why = detector.explain(batch)
        maps = [_surprise(why, i, 2 if tokens is None else 1) for i in range(len(ids))]
        if tokens is not None:
            columns = first_tensor(batch).shape[-1]
            maps = [
                (_by_token(known, len(text), columns), "nats")
                for (known, _), text in zip(maps, tokens, strict=True)
            ]
        return tuple(
            cls(
                id=ids[i],
                p_value=p_values[i],
                image=None if images is None else _bytes(images[i]),
                tokens=None if tokens is None else tuple(tokens[i]),
                surprise=maps[i][0],
                unit=maps[i][1],
            )
            for i in range(len(ids))
        )


@dataclass(frozen=True)
class Gallery:
    """Samples to look at, at most eight of each kind are shown.

    Attributes:
        anomalous: The most anomalous of a stream, the worst first.
        typical: Held-out samples in the middle of all, beside them.
        since: The sample of the stream from which on they are the most anomalous.
    """

    anomalous: Sequence[Exhibit] = ()
    typical: Sequence[Exhibit] = ()
    since: int = 1

    @property
    def has_maps(self) -> bool:
        """Whether places are known of any."""
        return any(each.surprise is not None for each in (*self.anomalous, *self.typical))

    @property
    def full(self) -> float:
        """What marks a place in full; of nats what few places of typical samples reach."""
        shown = [*self.typical, *self.anomalous]
        if any(each.unit == "sd" for each in shown):
            return _FULL
        maps = [each.surprise for each in self.typical or shown]
        known = [np.abs(each).ravel() for each in maps if each is not None]
        found = float(np.nanquantile(np.concatenate(known), 0.99)) if known else 0.0
        return found if found > 0 and math.isfinite(found) else 1.0


def picture(exhibit: Exhibit) -> str | None:
    """The image as an address that holds it."""
    return None if exhibit.image is None else _address(_sized(exhibit.image))


def mapped(exhibit: Exhibit, full: float) -> str | None:
    """The image with the surprise over it; None where either is not known."""
    if exhibit.image is None or exhibit.surprise is None:
        return None
    image = _sized(exhibit.image)
    height, width = image.shape[:2]
    surprise = Image.fromarray(np.nan_to_num(exhibit.surprise).astype(np.float32), mode="F")
    values = np.asarray(surprise.resize((width, height), Image.Resampling.NEAREST)) / full
    strength = np.minimum(np.abs(values), 1.0)[..., None] * 0.85
    colour = np.where(values[..., None] < 0, _LESS, _MORE)
    grey = image.mean(-1, keepdims=True) * 0.6 + 80
    return _address((grey * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8))


def marked(exhibit: Exhibit, full: float) -> Iterator[tuple[str, int, str]]:
    """Tokens with how strongly each is less likely than expected, from 0 to 4, and in words."""
    if exhibit.tokens is None:
        return
    tokens = list(exhibit.tokens)
    known = exhibit.surprise
    nats = [math.nan] * len(tokens) if known is None else known.tolist()
    for token, value in list(zip(tokens, nats, strict=True))[:_TOKENS]:
        level = 0 if math.isnan(value) else round(min(max(-value / full, 0.0), 1.0) * _LEVELS)
        yield token, level, "" if math.isnan(value) else f"{value:.1f} nats"
    if len(tokens) > _TOKENS:
        yield f" … and {len(tokens) - _TOKENS:,} more", 0, ""


def _surprise(why: Explanation, row: int, dimensions: int) -> tuple[Array | None, str]:
    """Of one sample, by place, over terms: in standard deviations if these are known, else nats."""
    for terms, unit in ((why.surprise_z, "sd"), (why.surprise, "nats")):
        maps = [each[row].numpy() for each in terms.values() if each[row].ndim == dimensions]
        if maps:
            return _together(maps, mean=unit == "sd"), unit
    return None, "nats"


def _together(maps: Sequence[Array], *, mean: bool) -> Array:
    """Maps of several sizes as one of the largest: their mean, or their sum."""
    largest = max(maps, key=lambda each: each.size)
    if largest.ndim == 1:
        maps = [each for each in maps if len(each) == len(largest)]
    stretched = [_stretched(each, largest.shape) for each in maps]
    whole: Array = np.mean(stretched, 0) if mean else np.sum(stretched, 0)
    return whole


def _by_token(known: Array | None, count: int, columns: int) -> Array | None:
    """The surprise at each of so many tokens; nan for a first one that is given, not predicted.

    Raises:
        ValueError: There are other places than columns of tokens, or less one.
    """
    if known is None:
        return None
    given = columns - len(known)
    if given not in (0, 1) or count > columns:
        raise ValueError(
            f"Expected at most {columns} tokens and as many places, or one less, got {count} "
            f"tokens and {len(known)} places."
        )
    return np.concatenate([np.full(given, math.nan), known])[:count]


def _stretched(values: Array, shape: tuple[int, ...]) -> Array:
    """A map with each place repeated, to another size."""
    for axis, length in enumerate(shape):
        values = values.take(np.arange(length) * values.shape[axis] // length, axis)
    return values


def _bytes(image: Tensor) -> NDArray[np.uint8] | None:
    """(C, H, W) in [0, 1] as (H, W, 3); None of what is no such image."""
    values = image.detach().float().cpu().numpy()
    is_image = values.ndim == 3 and values.shape[0] in (1, 3) and bool(np.isfinite(values).all())
    if not is_image or values.min() < 0 or values.max() > 1:
        return None
    pixels = (values.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _sized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Not larger than there is room for; a small one enlarged, with its pixels to be seen."""
    found, longest = Image.fromarray(np.ascontiguousarray(image)), max(image.shape[:2])
    if longest > _LARGEST:
        found.thumbnail((_LARGEST, _LARGEST))
    elif (times := _SMALLEST // longest) > 1:
        found = found.resize((found.width * times, found.height * times), Image.Resampling.NEAREST)
    return np.asarray(found)


def _address(pixels: NDArray[np.uint8]) -> str:
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
