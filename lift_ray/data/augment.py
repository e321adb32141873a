"""Encoded bytes to square uint8 pictures: minimalist data augmentation for training, a centre crop for evaluation."""

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


def evaluation_picture(encoded: bytes, size_px: int) -> NDArray[np.uint8]:
    """(3, size, size) uint8: short side to 8/7 of the size (224 -> 256), then the centre."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = tv.center_crop(tv.resize(image, [round(size_px * 8 / 7)], InterpolationMode.BICUBIC), [size_px, size_px])
    return np.asarray(image).transpose(2, 0, 1)
