"""Images that a Python program has: files, encoded bytes, Pillow images, arrays and tensors."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lift_ray.data.bad_image import BadImage
from lift_ray.data.bit_depth import Rendering
from lift_ray.data.decode import Pixels, decode
from lift_ray.data.jpeg_header import TURNS, orientation
from lift_ray.errors import BadInput, one_line
from lift_ray.storage.store import PATIENCE_S, fetch

AnyImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | torch.Tensor"
"""A path or URL, encoded bytes, a Pillow image, an array (H, W, 3) or (H, W), or a tensor (3, H, W); the last two in uint8."""
ARRAYS = "must be uint8 (H, W), (H, W, 1) or (H, W, 3)"
TENSORS = "must be uint8 (3, H, W) or (1, H, W)"


def pixels_of(image: AnyImage, rendering: Rendering) -> Pixels:
    """Return an image as (H, W, 3) uint8, RGB and upright: that of a file exactly as every verb decodes it.

    Args:
        rendering: how more than 8 bits, several pages and transparency become 8-bit RGB.

    Raises BadInput with the reason.
    """
    place = str(image) if isinstance(image, str | os.PathLike) else type(image).__name__
    try:
        if isinstance(image, str | os.PathLike):
            return decode(fetch(str(image), None, None, PATIENCE_S), rendering=rendering)
        if isinstance(image, bytes | bytearray | memoryview):
            return decode(bytes(image), rendering=rendering)
        if isinstance(image, Image.Image):
            return _of_pillow(image, rendering)
        if isinstance(image, torch.Tensor):
            return _of_array(np.moveaxis(_three_axes(image, TENSORS), 0, -1), TENSORS, tuple(image.shape))
        if isinstance(image, np.ndarray):
            return _of_array(image if image.ndim != 2 else image[..., None], ARRAYS, image.shape)
    except (BadImage, OSError) as error:
        raise BadInput(place, "must be an image that can be read", one_line(error)) from None
    raise BadInput("images", "must be paths, bytes, Pillow images, arrays or tensors", place)


def _of_pillow(image: Image.Image, rendering: Rendering) -> Pixels:
    rgb = rendering.applied(image).convert("RGB")
    turn = TURNS.get(orientation(image))
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _three_axes(image: torch.Tensor, rule: str) -> NDArray[Any]:
    if image.ndim != 3:
        raise BadInput("images", rule, f"{image.dtype} {tuple(image.shape)}")
    return image.detach().cpu().numpy()


def _of_array(image: NDArray[Any], rule: str, shape: tuple[int, ...]) -> Pixels:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        raise BadInput("images", rule, f"{image.dtype} {shape}", "convert it, or pass a Pillow image")
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()
