"""Convert decoded images to square uint8 images: random crops for training, a center crop or five crops for evaluation.

Images are resized by torch, bicubic or bilinear with antialiasing, like torchvision's transforms of tensors. Its vectorized
code takes a third of Pillow's time. It differs from Pillow by one level in 0.3% of the values, by two in a few per million.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lift_ray.data.bit_depth import AS_STORED, Rendering
from lift_ray.data.decode import Pixels, decode, decode_on
from lift_ray.data.longtail import Int64s

Draws = NDArray[np.float64]  # random numbers in [0, 1)

SMALLEST_AREA = 0.08
CROP_DRAWS = 3
GROWTH: dict[str, Callable[[float], float]] = {
    "convex": lambda t: 1 - math.sqrt(1 - t * t),
    "linear": lambda t: t,
    "concave": lambda t: math.sqrt(1 - (1 - t) ** 2),
    "min": lambda t: 0.0,
    "max": lambda t: 1.0,
}


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image in pixels, with its interpolation mode and flip."""

    left: int
    top: int
    width: int
    height: int
    mode: str = "bicubic"
    flip: bool = False


FindCrop = Callable[[int, int], Crop]
DrawCrop = Callable[..., Crop]  # (width, height, draw=(CROP_DRAWS,) numbers in [0, 1))


@dataclass(frozen=True)
class Augmentation:
    """Changes of the training images of an epoch.

    Args:
        size_px: side of the square images.
        crop: draws the crop of an image; None for the evaluation crop.
        reduced: decode large JPEGs at 1/2, 1/4 or 1/8 if the crop does not need more.
        device: decodes and resizes random crops; None for threads on the CPU.
        num_patches: patches per image; required by patch_dropout only.
        patch_dropout: fraction of the patches to drop, in [0, 1); at least one stays.
    """

    size_px: int
    crop: DrawCrop | None
    reduced: bool = False
    device: torch.device | None = None
    num_patches: int = 0
    patch_dropout: float = 0.0

    def image(self, encoded: bytes, draw: Draws) -> Pixels:
        """Return the augmented image, (size, size, 3) uint8."""
        if self.crop is None:
            return evaluation_image(encoded, self.size_px)
        return training_image(encoded, self.size_px, partial(self.crop, draw=draw), reduced=self.reduced)

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
    """Draw a crop of 8% to 100% of the area and aspect 3/4 to 4/3, bilinear, flipped with probability 1/2 (arXiv 2309.10019).

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
    return Crop(left, top, w, h, "bilinear", bool(random.random() < 0.5))


def training_image(encoded: bytes, size_px: int, find: FindCrop, *, reduced: bool = False) -> Pixels:
    """Return a resized crop of an encoded image, (size, size, 3) uint8.

    Args:
        find: returns the crop for an image of (width, height).
        reduced: decode a JPEG at a lower resolution if the crop still has at least `size_px` pixels per side.
    """

    def spare(width: int, height: int) -> float:
        crop = find(width, height)
        return min(crop.width, crop.height) / size_px

    image = decode(encoded, spare if reduced else None)
    crop = find(image.shape[1], image.shape[0])
    part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    small = resized(part, size_px, size_px, crop.mode)
    return small[:, ::-1] if crop.flip else small


def training_images_on(device: torch.device, encoded: list[bytes], size_px: int, finds: list[FindCrop]) -> torch.Tensor:
    """Return images decoded and resized on a device, (b, 3, size, size) uint8."""
    out = torch.empty(len(encoded), 3, size_px, size_px, dtype=torch.uint8, device=device)
    for row, image, find in zip(out, decode_on(device, encoded), finds, strict=True):
        crop = find(image.shape[2], image.shape[1])
        part = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
        small = F.interpolate(part[None], size=(size_px, size_px), mode=crop.mode, antialias=True)[0]
        row.copy_((small.flip(-1) if crop.flip else small).round_().clamp_(0, 255))
    return out


def evaluation_image(encoded: bytes, size_px: int, rendering: Rendering = AS_STORED) -> Pixels:
    """Return the evaluation crop, (size, size, 3) uint8: short side resized to 8/7 of the size (224 -> 256), then a center crop."""
    return centre_crop(decode(encoded, rendering=rendering), size_px)


def centre_crop(image: Pixels, size_px: int) -> Pixels:
    """Return the evaluation crop of a decoded image, (size, size, 3)."""
    image = _short_side(image, round(size_px * 8 / 7))
    left, top = (round((side - size_px) / 2) for side in (image.shape[1], image.shape[0]))
    return image[top : top + size_px, left : left + size_px]


def five_crops(encoded: bytes, size_px: int, rendering: Rendering = AS_STORED) -> Pixels:
    """Return the corners and the center for test-time ensembling, (5, size, size, 3) uint8 (arXiv 2309.10019).

    The short side is resized to size + 24 px; for sizes below 224 px, the margin of 24 shrinks in proportion.
    """
    return corners_and_centre(decode(encoded, rendering=rendering), size_px)


def corners_and_centre(image: Pixels, size_px: int) -> Pixels:
    """Return the five crops of a decoded image, (5, size, size, 3)."""
    image = _short_side(image, size_px + min(24, round(size_px * 24 / 224)))
    bottom, right = image.shape[0] - size_px, image.shape[1] - size_px
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return np.stack([image[top : top + size_px, left : left + size_px] for top, left in corners])


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


def _short_side(image: Pixels, side_px: int) -> Pixels:
    height, width = image.shape[:2]
    if width < height:
        return resized(image, side_px, int(side_px * height / width))
    return resized(image, int(side_px * width / height), side_px)
