"""Encoded bytes to square uint8 pictures: augmentation for training, a centre crop or five crops for evaluation."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

SMALLEST_AREA = 0.08
GROWTH: dict[str, Callable[[float], float]] = {
    "convex": lambda t: 1 - math.sqrt(1 - t * t),
    "linear": lambda t: t,
    "concave": lambda t: math.sqrt(1 - (1 - t) ** 2),
    "min": lambda t: 0.0,
    "max": lambda t: 1.0,
}


def smallest_area(schedule: str, epoch: int, epochs: int) -> float:
    """Smallest crop as a share of the picture: 0.08 + 0.92 g(t), t = epoch / (epochs - 1) (arXiv 2504.13282).

    Args:
        epoch: from 0; t is 0 when there is only one epoch.
    """
    t = epoch / (epochs - 1) if epochs > 1 else 0.0
    return SMALLEST_AREA + (1 - SMALLEST_AREA) * GROWTH[schedule](t)


def square_crop(width: int, height: int, smallest: float, draw: NDArray[np.float64]) -> tuple[int, int, int]:
    """(left, top, side) in pixels of a square whose area share is uniform in [smallest, 1].

    Both ends are capped at the largest square's share.

    Args:
        draw: three numbers in [0, 1): area, left, top.
    """
    area = width * height
    largest = min(width, height) ** 2 / area
    low, high = min(smallest, largest), min(1.0, largest)
    side = min(max(1, round(math.sqrt(area * (low + (high - low) * draw[0])))), width, height)
    return int((width - side + 1) * draw[1]), int((height - side + 1) * draw[2]), side


def training_picture(encoded: bytes, size_px: int, smallest: float, draw: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(3, size, size) uint8: a random square, resized (bicubic, antialiased); no flip, no change of aspect."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    left, top, side = square_crop(image.width, image.height, smallest, draw)
    crop = tv.resized_crop(image, top, left, side, side, [size_px, size_px], InterpolationMode.BICUBIC)
    return np.asarray(crop).transpose(2, 0, 1)


def crop_flip_picture(encoded: bytes, size_px: int, draw: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(3, size, size) uint8: a random crop of 8% to all of the area and 3/4 to 4/3 aspect, bilinear, half of them flipped.

    Args:
        draw: three numbers in [0, 1) that decide everything.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    random = np.random.default_rng([int(d * 2**32) for d in draw])
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(SMALLEST_AREA, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            break
    else:  # the middle, as far as the aspect allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    crop = tv.resized_crop(image, top, left, h, w, [size_px, size_px], InterpolationMode.BILINEAR)
    if random.random() < 0.5:
        crop = tv.horizontal_flip(crop)
    return np.asarray(crop).transpose(2, 0, 1)


def evaluation_picture(encoded: bytes, size_px: int) -> NDArray[np.uint8]:
    """(3, size, size) uint8: short side to 8/7 of the size (224 -> 256), then the centre."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = tv.center_crop(tv.resize(image, [round(size_px * 8 / 7)], InterpolationMode.BICUBIC), [size_px, size_px])
    return np.asarray(image).transpose(2, 0, 1)


def five_crops(encoded: bytes, size_px: int) -> NDArray[np.uint8]:
    """(5, 3, size, size) uint8 for test-time ensembling: the corners and the centre (arXiv 2309.10019).

    The short side is resized to size + 24; for pictures under 224 px by the same share.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    short = size_px + min(24, round(size_px * 24 / 224))
    crops = tv.five_crop(tv.resize(image, [short], InterpolationMode.BICUBIC), [size_px, size_px])
    return np.stack([np.asarray(crop) for crop in crops]).transpose(0, 3, 1, 2)


def growing_px(start_px: int, full_px: int, patch_px: int, epoch: int, epochs: int) -> int:
    """Side of the training pictures in an epoch: from start to full in equal steps, in whole patches."""
    t = epoch / (epochs - 1) if epochs > 1 else 1.0
    return max(1, round((start_px + (full_px - start_px) * t) / patch_px)) * patch_px
