"""Two views of an unlabeled image: pseudo-labels come from the weak view, and the strong view is trained to agree.

A view is a pure function of an image and a few random numbers, so threads that make views share no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lift_ray.data.augment import Draws, Preprocessing, evaluation_image
from lift_ray.data.decode import Pixels

NUM_OPERATIONS = 2
STRENGTHS = 9  # 0.1, 0.2, ... 0.9
PAD = 4 / 32  # of the side
GRAY = 127
WEAK_DRAWS = 3
STRONG_DRAWS = WEAK_DRAWS + 4 * NUM_OPERATIONS + 2
NUM_DRAWS = WEAK_DRAWS + STRONG_DRAWS


@dataclass(frozen=True)
class TwoViews:
    """`weak_view` and `strong_view` of the evaluation crop.

    Args:
        preprocessing: size of the views, and how images are resized.
        cutout_frac: side of the gray square as a fraction of the image's side, in [0, 1].
    """

    preprocessing: Preprocessing
    cutout_frac: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image's views, channels first: (2, 3, size, size)."""
        return (2, 3, self.preprocessing.size_px, self.preprocessing.size_px)

    def image(self, encoded: bytes, draw: Draws) -> Pixels:
        """Return both views, (2, size, size, 3) uint8.

        Args:
            draw: (NUM_DRAWS,) random numbers in [0, 1).
        """
        image = evaluation_image(encoded, self.preprocessing)
        return np.stack([weak_view(image, draw[:WEAK_DRAWS]), strong_view(image, draw[WEAK_DRAWS:], self.cutout_frac)])


def weak_view(image: Pixels, draw: Draws) -> Pixels:
    """Return the weak view, (size, size, 3): shifted by up to 1/8 of the side, mirrored border, half flipped (arXiv 2001.07685).

    Args:
        draw: (3,) random numbers in [0, 1): flip, left, top.
    """
    size = len(image)
    pad = round(PAD * size)
    left, top = (int((2 * pad + 1) * number) for number in draw[1:])
    moved = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), "reflect")[top : top + size, left : left + size]
    return moved[:, ::-1] if draw[0] < 0.5 else moved


def strong_view(image: Pixels, draw: Draws, cutout_frac: float) -> Pixels:
    """Return the strong view, (size, size, 3): a weak view, RandAugment, and cutout (arXiv 1909.13719, 1708.04552).

    As in the published code of FixMatch and LoFT, two operations are drawn, each is used with probability 1/2, and its strength is
    uniform in 0.1, 0.2, ... 0.9. The center of the gray square is uniform in the image, so part of the square may be outside.

    Args:
        draw: (STRONG_DRAWS,) random numbers in [0, 1): those of the weak view; whether, operation, strength and sign, twice; center
            of the square.
        cutout_frac: side of the square as a fraction of the image's side, in [0, 1].
    """
    size, side = len(image), round(cutout_frac * len(image))
    view = torch.from_numpy(np.ascontiguousarray(weak_view(image, draw[:WEAK_DRAWS]))).permute(2, 0, 1)
    operations = list(OPERATIONS.values())
    for whether, which, strength, sign in draw[WEAK_DRAWS:-2].reshape(NUM_OPERATIONS, 4):
        level = (1 + int(STRENGTHS * strength)) / 10
        if whether < 0.5:
            view = operations[int(len(operations) * which)](view, level if sign < 0.5 else -level)
    out: Pixels = view.permute(1, 2, 0).numpy().copy()
    left, top = (int(size * number) - side // 2 for number in draw[-2:])
    out[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = GRAY
    return out


def _moved(view: Tensor, level: float, *, angle: float = 0, right: float = 0, down: float = 0) -> Tensor:
    """Rotate by degrees, and shift by fractions of the side."""
    pixels = [int(fraction * level * view.shape[-1]) for fraction in (right, down)]
    return _affine(view, angle=angle * level, translate=pixels, shear=[0.0, 0.0])


def _sheared(view: Tensor, level: float, *, right: float = 0, down: float = 0) -> Tensor:
    degrees = [math.degrees(math.atan(slope * level)) for slope in (right, down)]
    return _affine(view, angle=0.0, translate=[0, 0], shear=degrees, center=[0.0, 0.0])


def _affine(view: Tensor, **options: float | list[int] | list[float]) -> Tensor:
    out: Tensor = F.affine(view, scale=1.0, **options)
    return out


# (3, H, W) uint8 and a level in [-1, 1] -> (3, H, W); color operations only weaken, whatever the sign of the level
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda view, level: view,
    "shear_x": partial(_sheared, right=0.3),
    "shear_y": partial(_sheared, down=0.3),
    "translate_x": partial(_moved, right=0.3),
    "translate_y": partial(_moved, down=0.3),
    "rotate": partial(_moved, angle=-30),
    "brightness": lambda view, level: F.adjust_brightness(view, 0.05 + 0.9 * abs(level)),
    "color": lambda view, level: F.adjust_saturation(view, 0.05 + 0.9 * abs(level)),
    "contrast": lambda view, level: F.adjust_contrast(view, 0.05 + 0.9 * abs(level)),
    "sharpness": lambda view, level: F.adjust_sharpness(view, 0.05 + 0.9 * abs(level)),
    "posterize": lambda view, level: F.posterize(view, 4 + int(4 * abs(level))),
    "solarize": lambda view, level: F.solarize(view, 256 - int(256 * abs(level))),
    "auto_contrast": lambda view, level: F.autocontrast(view),
    "equalize": lambda view, level: F.equalize(view),
}
