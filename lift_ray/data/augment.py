"""Convert decoded images to square uint8 images: random crops for training, a center crop or several crops for evaluation.

Images are resized by torch, bicubic or bilinear with antialiasing, like torchvision's transforms of tensors. Its vectorized
code takes a third of Pillow's time. It differs from Pillow by one level in 0.3% of the values, by two in a few per million.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lift_ray.data.decode import Pixels, decode, decode_on
from lift_ray.data.longtail import Int64s

Draws = NDArray[np.float64]  # random numbers in [0, 1)

SMALLEST_AREA = 0.08
CROP_DRAWS = 3
MOST_RESIZED = 8  # pixels of a whole resized image, as a multiple of the pixels of its crops
GROWTH: dict[str, Callable[[float], float]] = {
    "convex": lambda t: 1 - math.sqrt(1 - t * t),
    "linear": lambda t: t,
    "concave": lambda t: math.sqrt(1 - (1 - t) ** 2),
    "min": lambda t: 0.0,
    "max": lambda t: 1.0,
}


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image in pixels, and whether it is flipped."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


@dataclass(frozen=True)
class Preprocessing:
    """How images become the square inputs of a backbone, in training and evaluation.

    Args:
        size_px: side of the inputs.
        interpolation: bicubic or bilinear, both with antialiasing.
        squash: resize a whole image to a square for evaluation, whatever its aspect; False keeps the aspect and crops.
    """

    size_px: int
    interpolation: str = "bicubic"
    squash: bool = False


FindCrop = Callable[[int, int], Crop]
DrawCrop = Callable[..., Crop]  # (width, height, draw=(CROP_DRAWS,) numbers in [0, 1))


@dataclass(frozen=True)
class Augmentation:
    """Changes of the training images of an epoch.

    Args:
        preprocessing: side of the square images, and how they are resized.
        crop: draws the crop of an image; None for the evaluation crop.
        reduced: decode large JPEGs at 1/2, 1/4 or 1/8 if the crop does not need more.
        device: decodes and resizes random crops; None for threads on the CPU.
        num_patches: patches per image; required by patch_dropout only.
        patch_dropout: fraction of the patches to drop, in [0, 1); at least one stays.
    """

    preprocessing: Preprocessing
    crop: DrawCrop | None
    reduced: bool = False
    device: torch.device | None = None
    num_patches: int = 0
    patch_dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image, channels first: (3, size, size)."""
        return (3, self.preprocessing.size_px, self.preprocessing.size_px)

    def image(self, encoded: bytes, draw: Draws) -> Pixels:
        """Return the augmented image, (size, size, 3) uint8."""
        if self.crop is None:
            return evaluation_image(encoded, self.preprocessing)
        return training_image(encoded, self.preprocessing, partial(self.crop, draw=draw), reduced=self.reduced)

    def patches(self, random: np.random.Generator, positions: Int64s, *shape: int) -> torch.Tensor | None:
        """Draw the patches to keep for each image of a batch independently: (b, P) or (b, 2, P), ascending; None for all.

        Args:
            positions: this rank's positions in the global batch, (b,).
            shape: shape of the global batch: (B,), or (B, 2) for pairs of views.
        """
        if not self.patch_dropout:
            return None
        number = max(1, int(self.num_patches * (1 - self.patch_dropout)))
        order = np.argsort(random.random((*shape, self.num_patches), dtype=np.float32)[positions], axis=-1)
        return torch.from_numpy(np.sort(order[..., :number], axis=-1))


def smallest_area(schedule: str, epoch: int, epochs: int) -> float:
    """Return the smallest crop as a fraction of the image area: 0.08 + 0.92 g(t), t = epoch / (epochs - 1) (arXiv 2504.13282).

    Args:
        epoch: from 0; t is 0 when there is only one epoch.
    """
    t = epoch / (epochs - 1) if epochs > 1 else 0.0
    return SMALLEST_AREA + (1 - SMALLEST_AREA) * GROWTH[schedule](t)


def square_crop(width: int, height: int, smallest: float, draw: Draws) -> Crop:
    """Draw a square whose fraction of the area is uniform in [smallest, 1], without flip or change of aspect (arXiv 2504.13282).

    Both bounds are capped at the fraction of the largest square.

    Args:
        draw: three numbers in [0, 1): area, left, top.
    """
    area = width * height
    largest = min(width, height) ** 2 / area
    low, high = min(smallest, largest), min(1.0, largest)
    side = min(max(1, round(math.sqrt(area * (low + (high - low) * draw[0])))), width, height)
    return Crop(int((width - side + 1) * draw[1]), int((height - side + 1) * draw[2]), side, side)


def any_crop(width: int, height: int, draw: Draws) -> Crop:
    """Draw a crop of 8% to 100% of the area and aspect 3/4 to 4/3, flipped with probability 1/2 (arXiv 2309.10019).

    Args:
        draw: three numbers in [0, 1) that decide everything.
    """
    random = np.random.default_rng([int(d * 2**32) for d in draw])
    for _ in range(10):
        area = width * height * random.uniform(SMALLEST_AREA, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            break
    else:  # the largest center crop that the aspect allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return Crop(left, top, w, h, bool(random.random() < 0.5))


def training_image(encoded: bytes, preprocessing: Preprocessing, find: FindCrop, *, reduced: bool = False) -> Pixels:
    """Return a resized crop of an encoded image, (size, size, 3) uint8.

    Args:
        preprocessing: size and interpolation.
        find: returns the crop for an image of (width, height).
        reduced: decode a JPEG at a lower resolution if the crop still has at least as many pixels per side as the result.
    """
    size_px = preprocessing.size_px

    def spare(width: int, height: int) -> float:
        crop = find(width, height)
        return min(crop.width, crop.height) / size_px

    image = decode(encoded, spare if reduced else None)
    return _cut(image, find(image.shape[1], image.shape[0]), preprocessing)


def _cut(image: Pixels, crop: Crop, preprocessing: Preprocessing) -> Pixels:
    part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    small = resized(part, preprocessing.size_px, preprocessing.size_px, preprocessing.interpolation)
    return small[:, ::-1] if crop.flip else small


def training_images_on(
    device: torch.device, encoded: list[bytes], preprocessing: Preprocessing, finds: list[FindCrop]
) -> torch.Tensor:
    """Return images decoded and resized on a device, (b, 3, size, size) uint8."""
    size_px, mode = preprocessing.size_px, preprocessing.interpolation
    out = torch.empty(len(encoded), 3, size_px, size_px, dtype=torch.uint8, device=device)
    for row, image, find in zip(out, decode_on(device, encoded), finds, strict=True):
        crop = find(image.shape[2], image.shape[1])
        part = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
        small = F.interpolate(part[None], size=(size_px, size_px), mode=mode, antialias=True)[0]
        row.copy_((small.flip(-1) if crop.flip else small).round_().clamp_(0, 255))
    return out


def evaluation_image(encoded: bytes, preprocessing: Preprocessing) -> Pixels:
    """Return `centre_crop` of an encoded image, (size, size, 3) uint8."""
    return centre_crop(decode(encoded), preprocessing)


def centre_crop(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Return the evaluation image of a decoded image, (size, size, 3).

    The short side is resized to 8/7 of the size (224 -> 256), then the center is cropped. A squashed image is not cropped.
    """
    size_px = preprocessing.size_px
    short_px = size_px if preprocessing.squash else round(size_px * 8 / 7)
    return _crops(image, short_px, preprocessing, lambda right, bottom: [(round(right / 2), round(bottom / 2))])[0]


def corners_and_centre(image: Pixels, preprocessing: Preprocessing, expand_px: int | None = None) -> Pixels:
    """Return the corners and the center for test-time ensembling, (5, size, size, 3) uint8 (arXiv 2309.10019).

    Args:
        expand_px: the short side (of a squashed image both sides) is resized to size + expand_px; None for 24 px, which shrink in
            proportion for sizes below 224 px.
    """

    def places(right: int, bottom: int) -> list[tuple[int, int]]:
        return [(0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2))]

    size_px = preprocessing.size_px
    expand_px = min(24, round(size_px * 24 / 224)) if expand_px is None else expand_px
    return np.stack(_crops(image, size_px + expand_px, preprocessing, places))


@dataclass(frozen=True)
class View:
    """Input of a model at evaluation: the center crop of an image, or several crops for test-time ensembling.

    Args:
        preprocessing: size of the crops, and how they are resized.
        tte: off, five_crops, ten_crops or augmented.
        expand_px: argument of `corners_and_centre`.
        num_augmented: number of random crops of augmented.
    """

    preprocessing: Preprocessing
    tte: str = "off"
    expand_px: int | None = None
    num_augmented: int = 10

    @property
    def num_crops(self) -> int:
        """Number of crops of an image."""
        return {"off": 1, "five_crops": 5, "ten_crops": 10, "augmented": self.num_augmented}[self.tte]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `of`, channels first: (3, size, size), or (crops, 3, size, size) with test-time ensembling."""
        size_px = self.preprocessing.size_px
        return (3, size_px, size_px) if self.tte == "off" else (self.num_crops, 3, size_px, size_px)

    def image(self, encoded: bytes, draw: Draws) -> Pixels:
        """Return `of` the decoded image; `draw` is not used."""
        return self.of(decode(encoded))

    def of(self, image: Pixels) -> Pixels:
        """Crop a decoded image: (H, W, 3) -> (size, size, 3) or (crops, size, size, 3) uint8."""
        if self.tte == "off":
            return centre_crop(image, self.preprocessing)
        if self.tte == "augmented":
            return self._augmented(image)
        # as torchvision's ten crops: the center of a mirrored image may be a pixel away from that of the image
        sides = (image, image[:, ::-1]) if self.tte == "ten_crops" else (image,)
        return np.concatenate([corners_and_centre(side, self.preprocessing, self.expand_px) for side in sides])

    def _augmented(self, image: Pixels) -> Pixels:
        """Return random crops and flips. Their random numbers are the same for every image, so that an image has one result."""
        draws = np.random.default_rng(0).random((self.num_augmented, CROP_DRAWS))
        height, width = image.shape[:2]
        return np.stack([_cut(image, any_crop(width, height, draw), self.preprocessing) for draw in draws])


def resized(image: Pixels, width: int, height: int, mode: str = "bicubic") -> Pixels:
    """Resize an image to (height, width, 3) with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    # numpy copies in this thread; a copy in torch may start more threads
    dense = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    small: Pixels = F.interpolate(dense, size=(height, width), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
    return small


def growing_px(start_px: int, full_px: int, patch_px: int, epoch: int, epochs: int) -> int:
    """Return the side of the training images in an epoch: from start to full in equal steps, rounded to whole patches."""
    t = epoch / (epochs - 1) if epochs > 1 else 1.0
    return max(1, round((start_px + (full_px - start_px) * t) / patch_px)) * patch_px


def _crops(
    image: Pixels,
    short_px: int,
    preprocessing: Preprocessing,
    places: Callable[[int, int], list[tuple[int, int]]],
) -> list[Pixels]:
    """Return square crops of the image whose short side is resized, each (size, size, 3).

    A long strip would take far more memory as a whole than its crops do: then only the pixels of the crops are computed.

    Args:
        short_px: short side after resizing; both sides of a squashed image.
        places: returns left and top of the crops for the largest left and top.
    """
    (height, width), size_px, mode = image.shape[:2], preprocessing.size_px, preprocessing.interpolation
    if preprocessing.squash:
        width = height = short_px
    elif width < height:
        width, height = short_px, int(short_px * height / width)
    else:
        width, height = int(short_px * width / height), short_px
    wanted = places(width - size_px, height - size_px)
    if width * height > MOST_RESIZED * len(wanted) * size_px**2:
        return [resized_part(image, width, height, left, top, size_px, mode) for left, top in wanted]
    whole = resized(image, width, height, mode)
    return [whole[top : top + size_px, left : left + size_px] for left, top in wanted]


def resized_part(
    image: Pixels, width: int, height: int, left: int, top: int, size_px: int, mode: str = "bicubic"
) -> Pixels:
    """Return a square of `resized(image, width, height, mode)` from the pixels that it depends on, (size, size, 3).

    It repeats the arithmetic of torch's code for uint8: columns first, then rows, each with weights of 16 bits, rounded to uint8.
    Other code of torch (for processors without AVX2) may differ by one level.
    """
    across, down = _Side(image.shape[1], width, mode), _Side(image.shape[0], height, mode)
    columns, rows = across.weights(across.centres(left, size_px)), down.weights(down.centres(top, size_px))
    first, last = rows[0][0], rows[-1][0] + len(rows[-1][1])
    narrow = _filtered(image[first:last].transpose(1, 0, 2), columns, across.bits).transpose(1, 0, 2)
    return _filtered(narrow, [(start - first, weights) for start, weights in rows], down.bits)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    return weights * (x < 2)


def _linear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - x, 0)


# mode -> weight at a distance in pixels, and the distance from which on it is 0
FILTERS: dict[str, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], int]] = {
    "bicubic": (_cubic, 2),
    "bilinear": (_linear, 1),
}


@dataclass(frozen=True)
class _Side:
    """A side that is resized with antialiasing from `source` to `target` pixels; `mode` is a key of FILTERS."""

    source: int
    target: int
    mode: str

    def centres(self, start: int, number: int) -> NDArray[np.float64]:
        """Return where the centers of pixels [start, start + number) lie in the source."""
        return (np.arange(start, start + number, dtype=np.float64) + 0.5) * (self.source / self.target)

    def weights(self, centres: Iterable[float]) -> list[tuple[int, NDArray[np.float64]]]:
        """Return the first pixel of the source and the weights for each center."""
        stretch = max(self.source / self.target, 1.0)
        return [self._weights(centre, stretch) for centre in centres]

    def _weights(self, centre: float, stretch: float) -> tuple[int, NDArray[np.float64]]:
        weight, reach = FILTERS[self.mode]
        reach_px = reach * stretch
        first, stop = max(int(centre - reach_px + 0.5), 0), min(int(centre + reach_px + 0.5), self.source)
        weights = weight(np.abs((np.arange(first, stop) - centre + 0.5) / stretch))
        return first, weights / weights.sum()

    @cached_property
    def bits(self) -> int:
        """Precision of the weights: the largest of the whole side must be below 2^15, as in torch.

        The largest is that of a pixel close to an end, where the weights beyond it are missing, or of the pixel whose center is closest
        to one of the source: by 0 if both sides are odd after division by their common factor, otherwise by half a step.
        """
        common = math.gcd(self.source, self.target)
        number = min(self.target, math.ceil(2 * max(self.target / self.source, 1.0)) + 1)
        offset = 0.0 if self.source // common % 2 and self.target // common % 2 else common / (2 * self.target)
        ends = (*self.centres(0, number), *self.centres(self.target - number, number))
        largest = max(float(weights.max()) for _, weights in self.weights((*ends, self.source // 2 + 0.5 + offset)))
        return next(bits for bits in range(22) if int(0.5 + largest * 2 ** (bits + 1)) >= 2**15)


def _filtered(image: Pixels, places: list[tuple[int, NDArray[np.float64]]], bits: int) -> Pixels:
    """Return weighted sums of rows, (n, W, 3). The weights are whole numbers after `bits` binary places, so the sums are exact."""
    out = np.empty((len(places), *image.shape[1:]), np.uint8)
    for row, (first, weights) in zip(out, places, strict=True):
        whole = np.trunc(weights * 2**bits + np.copysign(0.5, weights))
        sums = np.tensordot(whole, image[first : first + len(whole)].astype(np.float64), 1)
        row[...] = np.clip(np.floor(sums / 2**bits + 0.5), 0, 255)
    return out
