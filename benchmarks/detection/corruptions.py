"""Images corrupted in fifteen ways, each in five strengths: shifts near a model's own images.

In the manner of CIFAR-10-C (Hendrycks & Dietterich, 2019) and MNIST-C (Mu & Gilmer, 2019); the
effects and their strengths are ours, chosen by eye on Fashion-MNIST at 32x32, so numbers on them
compare with no number of those papers.

Written over numpy, scipy and Pillow, since no library fits. imagecorruptions (last release 2020)
fails for three types on numpy 2 and scikit-image 0.26. Its fork imagecorruptions-imaug 1.1.5 runs,
but brings OpenCV, numba and scikit-image, draws from numpy's global random state, and has strengths
for photographs far larger than 32x32. kornia 0.9 is light, but draws from torch's global random
state and has no strengths, nor shot noise, glass and defocus blur, fog and pixelation.

References:
    Benchmarking neural network robustness to common corruptions and perturbations (Hendrycks,
    Dietterich, 2019), https://arxiv.org/abs/1903.12261;
    MNIST-C: a robustness benchmark for computer vision (Mu, Gilmer, 2019),
    https://arxiv.org/abs/1906.02337
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ood_monitor.adapters.base import describe

#: One image, (H, W), black 0 and white 1.
Grey: TypeAlias = NDArray[np.float64]

#: Of an image, a strength in the effect's own unit, and a source of randomness.
Effect: TypeAlias = Callable[[Grey, float, np.random.Generator], Grey]


@dataclass(frozen=True)
class Corruption:
    """An effect and its strengths, the mildest first.

    Attributes:
        effect: On one image; what it gives may leave [0, 1], and is cut off there.
        strengths: At severity 1 to 5, in the effect's unit, for images of 32x32.
    """

    effect: Effect
    strengths: tuple[float, float, float, float, float]

    def __call__(self, images: Tensor, severity: int, generator: np.random.Generator) -> Tensor:
        """Corrupt each image by randomness of its own.

        Args:
            images: Grey, uint8, (N, 1, H, W).
            severity: 1 to 5.
            generator: The i-th image depends on its seed and on i, whatever the other images are.

        Returns:
            As the images.

        Raises:
            ValueError: Another severity, or other images.
        """
        if severity not in range(1, 6):
            raise ValueError(f"Expected a severity from 1 to 5, got {severity}.")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"Expected uint8 images (N, 1, H, W), got {describe(images)}.")
        strength = self.strengths[severity - 1]
        pairs = zip(images[:, 0].numpy() / 255, generator.spawn(len(images)), strict=True)
        changed = [np.clip(self.effect(image, strength, own), 0, 1) for image, own in pairs]
        return torch.from_numpy(np.rint(255 * np.stack(changed)).astype(np.uint8))[:, None]


def corrupted(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Images (N, 1, H, W), uint8, corrupted by one of :data:`CORRUPTIONS`.

    The same seed gives the same images; the global random state has no part in it. The i-th image
    has the same randomness at every severity, whatever the other images are.

    Raises:
        ValueError: No such corruption, a severity that is not 1 to 5, or other images.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"Expected a corruption of {list(CORRUPTIONS)}, got {name!r}.")
    return CORRUPTIONS[name](images, severity, np.random.default_rng(seed))


def gaussian_noise(image: Grey, sd: float, generator: np.random.Generator) -> Grey:
    return image + generator.normal(0, sd, image.shape)


def shot_noise(image: Grey, photons: float, generator: np.random.Generator) -> Grey:
    """Counts of light, where white is ``photons`` on average: bright places are noisy."""
    return generator.poisson(image * photons) / photons


def impulse_noise(image: Grey, share: float, generator: np.random.Generator) -> Grey:
    """Black or white in a share of the pixels."""
    hit = generator.random(image.shape) < share
    return np.where(hit, generator.integers(2, size=image.shape), image)


def defocus_blur(image: Grey, radius: float, generator: np.random.Generator) -> Grey:
    """The mean over a disc, with the radius in pixels and a soft edge."""
    reach = int(radius + 1)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    return np.asarray(ndimage.convolve(image, disc / disc.sum(), mode="nearest"))


def glass_blur(image: Grey, reach: float, generator: np.random.Generator) -> Grey:
    """Every pixel is fetched from near its place, at most ``reach`` pixels off on each axis."""
    return fetched(image, generator.uniform(-reach, reach, (2, *image.shape)))


def motion_blur(image: Grey, length: float, generator: np.random.Generator) -> Grey:
    """The mean along a way of this length, in pixels, in a random direction."""
    angle = generator.uniform(0, np.pi)
    way = np.outer(np.linspace(-length / 2, length / 2, 15), [np.sin(angle), np.cos(angle)])
    moved = np.stack([fetched(image, step[:, None, None]) for step in way])
    return np.asarray(moved.mean(axis=0))


def rotate(image: Grey, degrees: float, generator: np.random.Generator) -> Grey:
    angle = generator.choice([-degrees, degrees])
    return np.asarray(ndimage.rotate(image, angle, reshape=False))


def translate(image: Grey, distance: float, generator: np.random.Generator) -> Grey:
    """In a random direction, to the nearest whole pixel: interpolation would blur as well."""
    angle = generator.uniform(0, 2 * np.pi)
    step = distance * np.array([np.sin(angle), np.cos(angle)])
    return np.asarray(ndimage.shift(image, step, order=0))


def elastic(image: Grey, distance: float, generator: np.random.Generator) -> Grey:
    """Smooth displacements, ``distance`` pixels in root mean square on each axis."""
    smooth = ndimage.gaussian_filter(generator.normal(size=(2, *image.shape)), (0, 3, 3))
    return fetched(image, distance * smooth / np.sqrt(np.mean(smooth**2)))


def brightness(image: Grey, amount: float, generator: np.random.Generator) -> Grey:
    return image + amount


def contrast(image: Grey, factor: float, generator: np.random.Generator) -> Grey:
    """Differences from the image's mean, times a factor below 1."""
    return np.asarray(image.mean() + factor * (image - image.mean()))


def fog(image: Grey, density: float, generator: np.random.Generator) -> Grey:
    """A blend with clouds from black to white; the density is their share of it."""
    noise = generator.normal(size=image.shape)
    # Smoothing divides the noise's amplitude by the width: each octave has twice the last one's.
    octaves = [w**2 * ndimage.gaussian_filter(noise, w, mode="wrap") for w in (1, 2, 4, 8)]
    clouds = np.stack(octaves).sum(axis=0)
    shade = (clouds - clouds.min()) / np.ptp(clouds)
    return np.asarray((1 - density) * image + density * shade)


def pixelate(image: Grey, share: float, generator: np.random.Generator) -> Grey:
    """A share of the rows and columns, each of their means shown as a block."""
    height, width = image.shape
    whole = Image.fromarray(image.astype(np.float32))
    few = whole.resize((round(share * width), round(share * height)), Image.Resampling.BOX)
    return np.asarray(few.resize((width, height), Image.Resampling.NEAREST), dtype=np.float64)


def jpeg(image: Grey, quality: float, generator: np.random.Generator) -> Grey:
    """Compressed by Pillow, with its quality of 95 to 1."""
    file = io.BytesIO()
    Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file)) / 255


def spatter(image: Grey, share: float, generator: np.random.Generator) -> Grey:
    """Drops of light grey, a few pixels wide, over this share of the image."""
    drops = ndimage.gaussian_filter(generator.normal(size=image.shape), 1.2)
    return np.where(drops > np.quantile(drops, 1 - share), 0.7, image)


def fetched(image: Grey, offsets: Grey) -> Grey:
    """Each pixel from its place plus an offset (2, H, W) in rows and columns, interpolated."""
    places = np.indices(image.shape) + offsets
    return np.asarray(ndimage.map_coordinates(image, places, order=1, mode="nearest"))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": Corruption(gaussian_noise, (0.03, 0.06, 0.1, 0.15, 0.22)),
    "shot noise": Corruption(shot_noise, (200, 80, 35, 15, 7)),
    "impulse noise": Corruption(impulse_noise, (0.01, 0.025, 0.05, 0.1, 0.18)),
    "defocus blur": Corruption(defocus_blur, (0.7, 1, 1.4, 1.9, 2.5)),
    "glass blur": Corruption(glass_blur, (0.4, 0.7, 1.1, 1.6, 2.3)),
    "motion blur": Corruption(motion_blur, (1.5, 2.5, 4, 6, 8)),
    "rotate": Corruption(rotate, (3, 7, 12, 20, 30)),
    "translate": Corruption(translate, (1, 2, 3, 4, 5)),
    "elastic": Corruption(elastic, (0.3, 0.6, 0.9, 1.3, 1.8)),
    "brightness": Corruption(brightness, (0.04, 0.1, 0.18, 0.28, 0.4)),
    "contrast": Corruption(contrast, (0.85, 0.7, 0.55, 0.4, 0.25)),
    "fog": Corruption(fog, (0.08, 0.16, 0.26, 0.38, 0.5)),
    "pixelate": Corruption(pixelate, (0.8, 0.65, 0.5, 0.4, 0.3)),
    "JPEG": Corruption(jpeg, (75, 50, 30, 15, 7)),
    "spatter": Corruption(spatter, (0.01, 0.03, 0.06, 0.11, 0.18)),
}
